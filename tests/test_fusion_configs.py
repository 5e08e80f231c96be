# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The configs in which image and text meet."""
import copy
import math
import re

import pytest
from mmengine.config import Config
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_config, load_model, two_iterations
from tiny import tiny_config

from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.models import ContextAwareText, TwoWayBridge
from mmseg_textkd.models.text_parameters import text_parameters

PATHS = sorted((CONFIGS / 'fusion').glob('*.py'))
KINDS = {
    '-bridge': (TwoWayBridge, False),
    '-bridge-kept': (TwoWayBridge, True),
    '-context': (ContextAwareText, False),
}
TAG = re.compile(r'_(?:vit-b16|toyclip)(-[a-z-]+)_')


def twin(path):
    """The config of the same name without a fusion."""
    tag = TAG.search(path.name)[1]
    found = CONFIGS / 'textkd' / path.name.replace(tag, '', 1)
    assert found.exists()
    return found


def test_all_combinations_are_there():
    assert len(PATHS) == 12
    for kind in KINDS:
        names = [p.name for p in PATHS if TAG.search(p.name)[1] == kind]
        assert len(names) == 4
        for part in ('bisenetv2_fcn', 'ddrnet_23-slim', 'camvid',
                     'toy-scenes'):
            assert sum(part in name for name in names) == 2


@pytest.mark.stacks
@pytest.mark.parametrize('path', PATHS, ids=[p.name for p in PATHS])
def test_config_is_its_twin_and_a_fusion(path):
    ours, plain = (load_config(p).to_dict() for p in (path, twin(path)))
    fusion = ours['model']['decode_head'].pop('fusion')
    fragment = {k for k in ours if k not in plain}
    assert fragment and all(k.startswith('text_') for k in fragment)
    assert {k: v for k, v in ours.items() if k in plain} == plain
    head = MODELS.build(load_model(path).decode_head)
    kind, kept = KINDS[TAG.search(path.name)[1]]
    built = head.text_branch.fusion
    assert type(built) is kind and built.kept == kept
    # It is no network of its own: every default is that of the class.
    assert set(fusion) <= {'type', 'use'}
    cfg = load_config(path)
    if kept:
        with pytest.raises(ValueError, match='model.decode_head: a TwoWay'):
            to_stock_cfg(cfg)
    else:
        stock = to_stock_cfg(cfg)
        assert stock.to_dict() == to_stock_cfg(load_config(
            twin(path))).to_dict()


@pytest.mark.parametrize('name', [
    'ddrnet_23-slim_toyclip-bridge_', 'ddrnet_23-slim_toyclip-bridge-kept_',
    'ddrnet_23-slim_toyclip-context_'
])
def test_both_stages_of_a_config(tmp_path, name):
    path, = (p for p in PATHS if name in p.name)
    runner, watch = two_iterations(path, tmp_path, (64, 128))
    first, second = watch.changed
    params = dict(runner.model.named_parameters())
    fusion = {n for n in params if '.fusion.' in n}
    assert fusion and fusion <= first
    # In stage 2 it rests, as the network does.
    assert second & set(params) == set(text_parameters(runner.model))
    assert not any('.fusion.' in n for n in second)
    assert all(map(math.isfinite, watch.losses))


def test_optimizer_settings_of_a_fusion_do_not_get_into_stock_configs():
    path = next(p for p in PATHS if '-bridge_' in p.name)
    cfg = Config(copy.deepcopy(load_config(path).to_dict()))
    expected = to_stock_cfg(cfg).to_dict()
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    keys['.fusion.'] = dict(lr_mult=.5)
    assert to_stock_cfg(cfg).to_dict() == expected


def test_cost_is_that_of_the_arithmetic(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(CONFIGS.parent / 'tools' / 'analysis_tools')
    import fusion_cost
    text = dict(type='ControlEmbeddings', kind='random', dim=16)
    cfg = tiny_config(tmp_path, text)
    c, d, k, dim, size = 16, 8, 8, 16, (64, 128)
    pixels = 4 * 8  # of the map at 1/16
    block = (
        k * d * d * (1 + 1 + 3 + 1 + 4 + 2)  # linear layers of the tokens
        + 2 * 2 * k * pixels * d + 2 * k * k * d  # attentions
        + (9 * d + d * d) * pixels)  # convolutions
    expected = ((9 * c + c * d) * pixels + 3 * k * dim * d + 3 * block +
                k * pixels * d + k * dim * c)
    plain = fusion_cost.cost(to_stock_cfg(cfg).model, size)
    cfg.model.decode_head.fusion = dict(
        type='TwoWayBridge',
        use='inference',
        width=d,
        num_heads=2,
        num_blocks=3)
    found = fusion_cost.cost(cfg.model, size)
    # The classifier itself has as many as before: none is of width D.
    assert 1e9 * (found[1] - plain[1]) == pytest.approx(expected, rel=.01)
    cfg.dump(tmp_path / 'config.py')
    fusion_cost.main([
        str(tmp_path / 'config.py'), '--size', '64', '128', '--vary',
        'width=8,16', 'num_heads=2'
    ])
    said = capsys.readouterr().out
    assert said.count('| width ') == 2 and '| none (stock) |' in said
