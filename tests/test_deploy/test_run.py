# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What runs a deployed folder, with numpy, OpenCV and its runtime alone."""
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from onnx import TensorProto, helper
from processes import ALONE, start

from mmseg_textkd.deploy import run as tool

CLASSES = ('blue', 'green', 'red')
PALETTE = np.array([[200, 10, 30], [20, 60, 220], [90, 160, 0]])  # RGB
SIZE = (48, 96)
ALONE = ALONE.format(script='net/run.py')


def save_graph(folder, preprocess=None, size=('height', 'width')):
    """Deploy a network by hand: the class is the largest channel."""
    folder.mkdir()
    if preprocess is None:
        nodes = [
            helper.make_node('Cast', ['image'], ['x'], to=TensorProto.FLOAT),
            helper.make_node('ArgMax', ['x'], ['y'], axis=3, keepdims=0),
            helper.make_node('Cast', ['y'], ['labels'], to=TensorProto.UINT8)
        ]
        image = 'image', TensorProto.UINT8, [1, *size, 3]
        out = 'labels', TensorProto.UINT8, [1, *size]
    else:
        nodes = [helper.make_node('Identity', ['image'], ['logits'])]
        image = 'image', TensorProto.FLOAT, [1, 3, *size]
        out = 'logits', TensorProto.FLOAT, [1, 3, *size]
    graph = helper.make_graph(nodes, 'by hand',
                              [helper.make_tensor_value_info(*image)],
                              [helper.make_tensor_value_info(*out)])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    data = model.SerializeToString()
    (folder / 'model.onnx').write_bytes(data)
    meta = dict(
        runtime='onnx',
        needs='onnxruntime',
        precision='fp32',
        size=None if isinstance(size[0], str) else size,
        preprocess=preprocess,
        sha256={'model.onnx': hashlib.sha256(data).hexdigest()})
    (folder / 'network.json').write_text(json.dumps(meta))
    rows = (' '.join(map(str, [*color, name]))
            for color, name in zip(PALETTE, CLASSES))
    (folder / 'classes.txt').write_text('\n'.join(rows))
    shutil.copy(tool.__file__, folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_graph(tmp_path / 'net')


def picture(seed=0):
    """Large areas of blue, green and red, with noise."""
    rng = np.random.default_rng(seed)
    areas = np.eye(3)[rng.integers(0, 3, (2, 4))].repeat(24, 0).repeat(24, 1)
    noise = rng.integers(0, 50, (*SIZE, 3))
    return (areas * 150 + noise).astype(np.uint8)


def blend(image, opacity):
    """What the image and its classes give together."""
    colours = PALETTE[image.argmax(2)][..., ::-1]
    return ((1 - opacity) * image + opacity * colours).astype(np.uint8)


def test_picture_in_a_process_without_torch(model, tmp_path):
    image = picture()
    cv2.imwrite(str(tmp_path / 'in.png'), image)
    done = start(
        'python',
        '-c',
        ALONE,
        'in.png',
        '--out',
        'out.png',
        '--opacity',
        '0.25',
        cwd=str(tmp_path))
    assert done.status == 0, done.output
    assert re.match(
        r'1 images: [\d.]+ fps with reading.*alone [\d.]+ fps \(median\)\n$',
        done.output)
    shown = cv2.imread(str(tmp_path / 'out.png'))
    assert np.array_equal(shown[:, :96], blend(image, 0.25))
    # The legend: the classes that are there, the most frequent first.
    counts = np.bincount(image.argmax(2).ravel(), minlength=3)
    order = np.argsort(-counts, kind='stable')[:2]
    assert counts[order].all()
    patches = shown[[11, 33], 96 + 18]
    assert np.array_equal(patches[:, ::-1], PALETTE[order])
    # Beside each colour stands something.
    assert all((shown[row:row + 22, 96 + 36:] < 128).any() for row in (0, 22))


def test_without_torch_means_that(tmp_path):
    """The process above would fail with torch."""
    code = ALONE.replace('runpy.run_path', 'import torch; runpy.run_path')
    done = start('python', '-c', code, cwd=str(tmp_path))
    assert done.status and 'torch is not installed here' in done.output


def test_large_picture_is_refused(model, tmp_path):
    cv2.imwrite(str(tmp_path / 'in.png'), picture())
    words = 'python', '-c', ALONE, 'in.png', '--out', 'out.png'
    done = start(
        *words, cwd=str(tmp_path), OPENCV_IO_MAX_IMAGE_PIXELS=str(48 * 96 - 1))
    assert done.status == 1 and not (tmp_path / 'out.png').exists()
    assert 'in.png cannot be read as an image of at most 4607' in done.output


def test_folder(model, tmp_path):
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'notes.txt').write_text('no picture')
    for seed, name in enumerate(('b.png', 'a.png', 'c.bmp')):
        cv2.imwrite(str(tmp_path / 'in' / name), picture(seed))
    out = tmp_path / 'new' / 'folder'
    tool.main(
        ['--folder',
         str(model),
         str(tmp_path / 'in'), '--out',
         str(out)])
    assert sorted(p.name for p in out.iterdir()) == ['a.png', 'b.png', 'c.bmp']
    for seed, name in enumerate(('b.png', 'a.png', 'c.bmp')):
        shown = cv2.imread(str(out / name))[:, :96]
        assert np.array_equal(shown, blend(picture(seed), 0.5))


def test_video_round_trip(model, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ('in.avi', 'out.avi')]
    codec = cv2.VideoWriter_fourcc(*'MJPG')
    writer = cv2.VideoWriter(paths[0], codec, 10, SIZE[::-1])
    for seed in range(3):
        writer.write(picture(seed))
    writer.release()
    tool.main(['--folder', str(model), paths[0], '--out', paths[1]])
    assert capsys.readouterr().out.startswith('3 images: ')
    before, after = (cv2.VideoCapture(path) for path in paths)
    assert after.get(cv2.CAP_PROP_FPS) == 10
    for _ in range(3):
        image, shown = before.read()[1], after.read()[1]
        assert shown.shape == (48, 96 + 160, 3)
        # The file is lossy.
        difference = shown[:, :96].astype(int) - blend(image, 0.5)
        assert np.abs(difference).mean() < 12
    assert not after.read()[0]


def test_graph_that_takes_normalized_input(tmp_path):
    spec = dict(mean=[100., 0., 0.], std=[1., 2., 1.], swap_channels=True)
    network = tool.Network(save_graph(tmp_path / 'a', preprocess=spec))
    image = picture()
    scores = (image[..., ::-1] - [100, 0, 0]) / [1, 2, 1]
    assert len(np.unique(scores.argmax(2))) == 3
    assert np.array_equal(network(image), scores.argmax(2))


def test_graph_of_one_size_sees_resized_images(tmp_path):
    network = tool.Network(save_graph(tmp_path / 'a', size=(24, 48)))
    image = np.kron(picture()[::24, ::24], np.ones((24, 24, 1), np.uint8))
    assert np.array_equal(network(image), image.argmax(2))


def test_errors(model, tmp_path, capsys, monkeypatch):
    image = str(tmp_path / 'in.png')
    cv2.imwrite(image, picture())
    out = str(tmp_path / 'out.png')
    net = '--folder', str(model)
    fixed = save_graph(tmp_path / 'fixed', size=('height', 8))
    damaged, other = save_graph(tmp_path / 'a'), save_graph(tmp_path / 'b')
    (damaged / 'model.onnx').write_bytes(b'x')
    meta = json.loads((other / 'network.json').read_text())
    meta.update(runtime='ncnn', needs='ncnn')
    (other / 'network.json').write_text(json.dumps(meta))
    monkeypatch.setitem(sys.modules, 'ncnn', None)  # not installed
    empty, bad = str(tmp_path / 'empty'), str(tmp_path / 'bad.png')
    os.mkdir(empty)
    Path(bad).write_text('x')
    for message, *args in [
        ('is no folder of', '--folder', empty, image, '--out', out),
        ('is damaged', '--folder', str(damaged), image, '--out', out),
        ('for ncnn.*pip install ncnn', '--folder', str(other), image, '--out',
         out),
        ('no images in', *net, empty, '--out', out),
        ('cannot be read as an image', *net, bad, '--out', out),
        ('does not take 48x96.*--size H W', '--folder', str(fixed), image,
         '--out', out),
        ('cannot open .*gone.mp4', *net, 'gone.mp4', '--out', 'out.mp4'),
        ('cannot open 99', *net, '--webcam', '99', '--out', 'out.mp4'),
        ('cannot write', *net, image, '--out', f'{empty}/no/a.png'),
    ]:
        with pytest.raises(SystemExit, match=f'Error: .*{message}'):
            tool.main(args)
    for message, *args in [
        ('one of them', '--out', out),
        ('one of them', image, '--webcam', '--out', out),
        ('--out, --show or both', image),
        ('--opacity', image, '--out', out, '--opacity', '2'),
    ]:
        with pytest.raises(SystemExit):
            tool.main(args)
        assert message in capsys.readouterr().err
    assert not Path(out).exists() and not os.listdir(empty)


def test_input_is_never_written_over(model, tmp_path, capsys):
    image, video = tmp_path / 'a.png', tmp_path / 'a.avi'
    cv2.imwrite(str(image), picture())
    video.write_bytes(b'video')
    (tmp_path / 'link.png').symlink_to(image)
    before = image.read_bytes()
    for args in ((image, image), (tmp_path / 'link.png', image),
                 (tmp_path, tmp_path / '.'), (video, video)):
        with pytest.raises(SystemExit):
            tool.main(
                ['--folder',
                 str(model),
                 str(args[0]), '--out',
                 str(args[1])])
        assert 'would write over the input' in capsys.readouterr().err
    assert image.read_bytes() == before and video.read_bytes() == b'video'
