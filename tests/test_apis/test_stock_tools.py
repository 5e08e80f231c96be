# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""MMSegmentation's tools for analysis with our configs and weights."""
import json
import os.path as osp
import re
import runpy
import sys

import pytest
from mmengine.analysis.print_helper import _format_size
from mmengine.config import Config
from mmseg.registry import MODELS
from processes import TOOLS
from tiny import SIZE
from tool_modules import load_tool

pytestmark = pytest.mark.stacks

GET_FLOPS = osp.join(TOOLS, 'analysis_tools', 'get_flops.py')
# Of the tiny head: channels, width of the text, classes; pixels at 1/4.
CHANNELS, DIM, CLASSES, PIXELS = 16, 16, 8, SIZE[0] * SIZE[1] // 16


def get_flops(path, monkeypatch, capsys):
    """Run the tool; the two figures that it prints."""
    monkeypatch.setattr(sys, 'argv',
                        ['get_flops.py', path, '--size', *map(str, SIZE)])
    runpy.run_path(GET_FLOPS, run_name='__main__')
    out = capsys.readouterr().out
    return [
        re.search(rf'^{name}: (\S+)$', out, re.MULTILINE)[1]
        for name in ('Flops', 'Params')
    ]


def test_get_flops_counts_as_torch_does(trained, tmp_path, monkeypatch,
                                        capsys):
    cfg = Config.fromfile(trained.config)
    flops, params = get_flops(trained.config, monkeypatch, capsys)
    number = sum(p.numel() for p in MODELS.build(cfg.model).parameters())
    assert params == _format_size(number)

    cfg.model.decode_head.pop('text')
    cfg.model.decode_head.type = 'FCNHead'
    cfg.dump(tmp_path / 'stock.py')
    stock, fewer = get_flops(str(tmp_path / 'stock.py'), monkeypatch, capsys)
    # Projection, its batch norm, scale, biases and learned offsets come in
    # the place of the last layer.
    more = DIM * (CHANNELS + 2) + 1 + CLASSES + CLASSES * DIM
    assert fewer == _format_size(number - more + CLASSES * (CHANNELS + 1))
    # MMEngine counts two for each value of a batch norm.
    more = DIM * (CHANNELS + 2) + DIM * CLASSES - CHANNELS * CLASSES
    assert kilo(flops) - kilo(stock) == pytest.approx(
        PIXELS * more / 1e3, abs=1.01)


def kilo(size):
    """Read '0.497M', rounded to a thousand, as thousands."""
    assert size.endswith('M')
    return float(size[:-1]) * 1e3


def test_benchmark_measures_our_weights(trained, tmp_path, monkeypatch,
                                        capsys):
    """It takes 200 images, also from a data set of six; no random weights."""
    monkeypatch.setattr(sys, 'argv', ['stock_tool.py'])
    tool = load_tool('stock_tool.py')
    with pytest.raises(SystemExit, match='no checkpoint none.pth'):
        tool.main(['benchmark', trained.config, 'none.pth'])
    tool.main([
        'benchmark', trained.config, trained.weights, '--work-dir',
        str(tmp_path)
    ])
    out = capsys.readouterr().out
    assert f'from path: {trained.weights}' in out
    assert 'unexpected' not in out and 'missing' not in out
    file, = tmp_path.glob('fps_*.json')
    found = json.loads(file.read_text())
    fps = float(re.search(r'Overall fps: (\S+) img', out)[1])
    assert fps > 1 and found['average_fps'] == fps
    assert f'Average fps of 1 evaluations: {fps}' in out
