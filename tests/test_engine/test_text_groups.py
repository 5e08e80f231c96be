# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Settings of an optimizer that do not reach the text are told."""
import re

import pytest
from each_case import each_case
from mmengine.optim import build_optim_wrapper
from mmseg.models import ResNet
from mmseg.registry import MODELS
from processes import load
from tiny import RESIDUAL, run, tiny_config
from tool_modules import load_tool

from mmseg_textkd.engine.hooks.text_groups import group_faults

OFFSET = 'decode_head.conv_seg.text.offset'
TEXT = {'.text.': dict(decay_mult=0.), 'log_scale': dict(decay_mult=0.)}
HEAD = {'head': dict(lr_mult=10.)}


@MODELS.register_module(name='TinyMAE')
class TinyMAE(ResNet):
    """A backbone that MMSegmentation gives rates layer by layer."""


@each_case('keys, faults', [
    (TEXT, []),
    ({**TEXT, **HEAD}, [
        f"{OFFSET} do not get lr_mult=10.0 of the key 'head'.*'.text.', "
        r'alone.*lr_mult=10\.0\); else .*lr_mult=1\.\)\.$',
        "log_scale do not get lr_mult=10.0 of.*'log_scale', alone"]),
    # MMEngine hands any setting on to the group.
    ({**TEXT, 'head': dict(momentum=[.5])}, [
        rf'{OFFSET} do not get momentum=\[0\.5\] .*momentum=\[0\.5\]\)\.$',
        'log_scale do not get momentum']),
    ({**HEAD, '.text.': dict(decay_mult=0., lr_mult=1.),
      'log_scale': dict(decay_mult=0., lr_mult=10.)}, []),
    (HEAD, [rf'{OFFSET}, \S*log_scale decay by 0.0005']),
])  # yapf: disable
def test_the_longest_key_takes_it_all(tmp_path, keys, faults):
    cfg = tiny_config(tmp_path, RESIDUAL)
    cfg.optim_wrapper.paramwise_cfg.custom_keys = keys
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    found = group_faults(model, wrapper, cfg.optim_wrapper)
    assert len(found) == len(faults)
    for text, pattern in zip(found, faults):
        assert re.search(pattern, text), text
    # That is what MMEngine does.
    group = next(
        g for g in wrapper.param_groups if any(
            p is model.get_parameter(OFFSET) for p in g['params']))
    lr = .05 * (10 if keys is HEAD else 1)
    assert (group['lr'], group['weight_decay'] > 0) == (lr, keys is HEAD)


def test_layer_wise_rates_are_told_by_a_run(tmp_path):
    cfg = tiny_config(tmp_path, RESIDUAL, dict(switch_at=1), 2)
    cfg.model.backbone.type = 'TinyMAE'
    cfg.log_level = 'WARNING'
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        constructor='LearningRateDecayOptimizerConstructor',
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=.05))
    keys = dict(num_layers=2, decay_rate=.9, decay_type='layer_wise')
    cfg.optim_wrapper.paramwise_cfg = dict(keys, custom_keys=TEXT)
    run(cfg)
    logs = ''.join(p.read_text() for p in tmp_path.rglob('*.log'))
    assert re.search(
        rf'{OFFSET}, \S*log_scale decay by 0.05.*'
        'LearningRateDecayOptimizerConstructor does not look', logs)


def test_an_optimizer_without_weight_decay(tmp_path, monkeypatch):
    """MMEngine needs it written out where a key changes it."""
    cfg = tiny_config(tmp_path, RESIDUAL, dict(switch_at=1), 2)
    cfg.optim_wrapper.optimizer = dict(type='Adam', lr=1e-3)
    with pytest.raises(ValueError, match='base_wd should not be None'):
        run(cfg)
    cfg.dump(tmp_path / 'config.py')
    monkeypatch.setattr('sys.argv', ['train.py', str(tmp_path / 'config.py')])
    load_tool('train.py').main()
    groups = load(tmp_path / 'work' /
                  'iter_2.pth')['optimizer']['param_groups']
    assert {g['weight_decay'] for g in groups} == {0}
