# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""demo/cpp, built and run."""
import importlib.util
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmseg.registry import MODELS
from processes import ROOT, start
from tiny import tiny_config
from tool_modules import load_tool

from mmseg_textkd.deploy.run import Network

deploy = load_tool('deployment/deploy.py')
needed = [name for name in ('cmake', 'c++') if shutil.which(name) is None]
needed += ['openvino'] * (importlib.util.find_spec('openvino') is None)


@pytest.mark.runtimes
@pytest.mark.skipif(bool(needed), reason=f'{", ".join(needed)} not installed')
def test_cpp_shows_what_python_predicts(tmp_path):
    import openvino.utils
    cfg = tiny_config(tmp_path)
    model = MODELS.build(cfg.model)
    model.decode_head.conv_seg.weight.data.normal_()
    cfg.dump(tmp_path / 'cfg.py')
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    deploy.main([
        str(tmp_path / 'cfg.py'),
        str(tmp_path / 'model.pth'), '--out',
        str(tmp_path / 'net'), '--to', 'openvino'
    ])
    build = str(tmp_path / 'build')
    cmake = openvino.utils.get_cmake_path()
    for words in (('-S', f'{ROOT}/demo/cpp', '-B', build,
                   f'-DOpenVINO_DIR={cmake}'), ('--build', build)):
        done = start('cmake', *words, cwd=str(tmp_path))
        assert done.status == 0, done.output

    def segment(*words):
        return start(f'{build}/segment', *words, cwd=str(tmp_path))

    image = cv2.imread(str(tmp_path / 'data' / 'img' / '0.png'))
    cv2.imwrite(str(tmp_path / 'in.ppm'), image)
    done = segment('net', 'in.ppm', 'out.ppm')
    assert done.status == 0, done.output
    network = Network(tmp_path / 'net')
    labels = network(image)
    counts = np.bincount(labels.ravel())
    assert (counts > 0).sum() > 1
    shown = cv2.imread(str(tmp_path / 'out.ppm'))
    assert np.array_equal(shown, network.colors[labels])
    assert done.output.split('\n')[1:-1] == [
        f'{network.classes[k]} {n}' for k, n in enumerate(counts) if n
    ]
    # An image of another size is resized, and so is what is predicted.
    cv2.imwrite(
        str(tmp_path / 'large.ppm'),
        np.kron(image, np.ones((2, 2, 1), np.uint8)))
    assert segment('net', 'large.ppm', 'large_out.ppm').status == 0
    shown = cv2.imread(str(tmp_path / 'large_out.ppm'))
    assert shown.shape == (64, 128, 3)
    assert (shown[::2, ::2] == network.colors[labels]).all(2).mean() > .9
    (tmp_path / 'in.ppm').write_bytes(b'P6 64 32 255\n')
    for message, *words in [('in.ppm is cut short', 'net', 'in.ppm', 'no'),
                            ('is no binary PPM', 'net', 'net/run.py', 'no'),
                            ('names no classes', 'gone', 'in.ppm', 'no'),
                            ('usage', 'net')]:
        done = segment(*words)
        assert done.status and message in done.output
    assert not (tmp_path / 'no').exists()
