# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The tool that compares what networks cost."""
import re

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from network_tester import CONFIGS
from tiny import CONTROL, tiny_config
from tool_modules import call, load_tool

from mmseg_textkd.deploy import to_stock_cfg

TAIL = '1xb8-10k_camvid-360x480.py'


def rows(capsys, *argv):
    call('analysis_tools/cost.py', *argv)
    lines = re.findall(r'^\| (.*) \|$', capsys.readouterr().out, re.M)
    head, *lines = [line.split(' | ') for line in lines if '---' not in line]
    assert head[0] == 'network' and {len(head)} == set(map(len, lines))

    def number(cell):
        return None if cell == '-' else float(cell.split(' ')[0])

    return {name: list(map(number, cells)) for name, *cells in lines}


def test_lseg_beside_stock(capsys):
    name = 'ddrnet_23-slim_in1k-pre'
    names = f'stock/{name}_{TAIL}', f'lseg/lseg_{name}_vit-b16_{TAIL}'
    paths = [CONFIGS / name for name in names]
    found = rows(capsys, *paths, '--size', 128, 256)
    stock, lseg = (found[path.stem] for path in paths)
    assert stock[:2] == stock[2:]
    pixels, channels, dim, classes = 16 * 32, 64, 512, 11
    # A projection with a bias, and two blocks of ten parameters.
    more = channels * dim + dim + 20 - (channels + 1) * classes
    assert lseg[0] - stock[0] == pytest.approx(more / 1e6, abs=.0015)
    more = dim * (channels + classes) + 2 * 9 * classes - channels * classes
    assert lseg[1] - stock[1] == pytest.approx(more * pixels / 1e9, abs=.0015)
    # Deployed it is as wide as the features and one.
    more = (channels + 1) * channels + 2 * 9 * classes
    assert lseg[3] - stock[3] == pytest.approx(more * pixels / 1e9, abs=.0015)


def test_what_has_no_deployed_form_is_said(capsys):
    path = CONFIGS / f'lseg/lseg_bisenetv2_fcn_vit-b16_{TAIL}'
    with pytest.warns(UserWarning, match='no deployed form: .*blocks'):
        found = rows(capsys, path, '--size', 64, 64, '--cfg-options',
                     'model.decode_head.text_branch.norm=bn')
    assert found[path.stem][2:] == [None, None]
    assert found[path.stem][0] > 3


def test_configs_of_one_name(capsys, tmp_path):
    """As those of runs are."""
    paths = []
    for k, config in enumerate((CONTROL, None)):
        paths.append(tmp_path / str(k) / 'config.py')
        paths[-1].parent.mkdir()
        tiny_config(tmp_path, config).dump(paths[-1])
    found = rows(capsys, *paths, '--size', 64, 64)
    assert list(found) == [str(path) for path in paths]


def test_ebseg_with_its_towers(capsys):
    path = CONFIGS / 'ebseg/ebseg_toyclip_1xb4-200i_toy-scenes-128x256.py'
    with pytest.warns(UserWarning, match='no deployed form'):
        found = rows(capsys, path, '--size', 32, 64)[path.stem]
    assert found[2:] == [None, None]
    cfg = Config.fromfile(path).model
    cfg.decode_head.text = dict(CONTROL, dim=64)
    cfg.decode_head.pop('test_text')
    model = MODELS.build(cfg).eval()
    trained = sum(p.numel() for p in model.parameters())
    towers = [model.image_encoder, model.backbone]
    for tower in towers:
        tower.init_weights()
    frozen = sum(p.numel() for t in towers for p in t.network.parameters())
    assert found[0] == pytest.approx((trained + frozen) / 1e6, abs=.0006)
    # Attention has no weights, but products: more than one a weight.
    assert found[1] > frozen * 32 / 1e9


def test_times_are_those_of_the_deployed(capsys):
    names = 'ddrnet_23-slim_in1k-pre', 'ddrnet_23_in1k-pre'
    paths = [CONFIGS / f'stock/{name}_{TAIL}' for name in names]
    found = rows(capsys, *paths, '--size', 64, 64, '--runs', 3)
    seconds = [found[path.stem][-1] for path in paths]
    assert all(len(cells) == 5 for cells in found.values())
    assert all(0 < s < 30 for s in seconds)
    with pytest.raises(SystemExit):
        rows(capsys, paths[0], '--runs', 1)


def test_cost_of_a_fusion_is_that_of_the_arithmetic(tmp_path, capsys):
    fusion_cost = load_tool('analysis_tools/fusion_cost.py')
    cfg = tiny_config(tmp_path, CONTROL)
    c, d, k, dim, size = 16, 8, 8, 16, (64, 128)
    pixels = 8 * 16  # of the map at 1/8
    block = (
        k * d * d * (1 + 1 + 3 + 1 + 4 + 2)  # linear layers of the tokens
        + 2 * 2 * k * pixels * d + 2 * k * k * d  # attentions
        + (9 * d + d * d) * pixels)  # convolutions
    expected = ((9 * c + c * d) * pixels + 3 * k * dim * d + 3 * block +
                k * pixels * d + k * dim * c)
    plain = fusion_cost.cost(to_stock_cfg(cfg).model, size)
    bridge = dict(type='TwoWayBridge', use='inference', num_blocks=3)
    cfg.model.decode_head.fusion = dict(bridge, width=d, num_heads=2)
    found = fusion_cost.cost(cfg.model, size)
    # The classifier itself has as many as before: none is of width D.
    assert 1e9 * (found[1] - plain[1]) == pytest.approx(expected, rel=.01)
    cfg.dump(tmp_path / 'config.py')
    words = '--size 64 128 --vary width=8,16 num_heads=2'.split()
    fusion_cost.main([str(tmp_path / 'config.py'), *words])
    said = capsys.readouterr().out
    assert said.count('| width ') == 2 and '| none (stock) |' in said
