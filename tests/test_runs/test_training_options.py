# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""MMEngine's options for training, through the switch of the stages."""
import pytest
import torch
from mmengine.runner import Runner
from processes import load
from processes import states as states_of
from tiny import (CLASSES, assert_equal, changed, residual, run,
                  stop_and_resume, tiny_config)

OFFSET = 'decode_head.conv_seg.text.offset'
WEIGHT = 'backbone.conv1.weight'


@pytest.fixture
def text(make_embeddings):
    return residual(make_embeddings(8, names=list(CLASSES)))


def test_accumulation_and_average_together_are_resumed(tmp_path, text):
    """Stopped in stage 1, exactly at the switch, and in stage 2."""
    cfg = tiny_config(tmp_path, text, dict(switch_at=4), 8, save_every=1)
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.custom_hooks.append(
        dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=.3))
    run(cfg, work_dir=str(tmp_path / 'whole'))
    whole = load(tmp_path / 'whole' / 'iter_8.pth')
    for stop in (2, 4, 6):
        stop_and_resume(cfg, stop, tmp_path / f'cut{stop}')
        resumed = load(tmp_path / f'cut{stop}' / 'iter_8.pth')
        for part in ('state_dict', 'ema_state_dict', 'optimizer',
                     'param_schedulers'):
            assert_equal(whole[part], resumed[part], part)

    # Both were at work: a step at every other iteration, and averages.
    states = [load(tmp_path / 'whole' / f'iter_{i}.pth') for i in range(1, 9)]
    for name, moves in ((WEIGHT, [1, 3]), (OFFSET, [5, 7])):
        raw = [state['ema_state_dict'][f'module.{name}'] for state in states]
        still = [torch.equal(*pair) for pair in zip(raw, raw[1:])]
        assert moves == [i for i, same in enumerate(still, 1) if not same]
        assert not torch.equal(raw[-1], states[-1]['state_dict'][name])


@pytest.mark.parametrize('what', ['backbone', 'step'])
def test_compiled_training_learns_the_same(tmp_path, text, what):
    """The backbone in place, or the whole step by MMEngine's ``compile``."""
    cfg = tiny_config(tmp_path, text, dict(switch_at=1), 2, save_every=1)
    cfg.param_scheduler = None
    # Another mode to compile for, and layers by the hundred, take a minute.
    cfg.train_cfg.val_interval = 5
    stages = dict(strides=(1, 1), downsamples=(True, ), num_stages=2)
    convs = dict(enc_num_convs=(1, 1), dec_num_convs=(1, ))
    dilations = dict(enc_dilations=(1, 1), dec_dilations=(1, ))
    cfg.model.backbone = dict(
        type='UNet', base_channels=4, **stages, **convs, **dilations)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    runners = []
    for name in ('plain', 'compiled'):
        cfg.work_dir = cfg.experiment_name = str(tmp_path / name)
        if (name, what) == ('compiled', 'step'):
            cfg.compile = dict(backend='aot_eager')
        runner = Runner.from_cfg(cfg)
        if (name, what) == ('compiled', 'backbone'):
            runner.model.backbone.compile(backend='aot_eager')
        runner.train()
        runners.append(runner)
    # One of each stage at the least.
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 1
    plain, compiled = (
        runner.message_hub.get_scalar('train/loss').data[0]
        for runner in runners)
    assert len(plain) == 2 and compiled == pytest.approx(plain, rel=1e-4)
    before, after = states_of(tmp_path / 'compiled', 1, 2)
    prefix = 'decode_head.conv_seg.'
    keys = changed(before, after)
    assert keys == {
        OFFSET, f'{prefix}text.class_embeddings', f'{prefix}text.started',
        f'{prefix}scale.log_scale', f'{prefix}logit_bias'
    }
    expected, = states_of(tmp_path / 'plain', 2)
    assert list(after) == list(expected)
    after, expected = ({k: s[k] for k in keys} for s in (after, expected))
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
    if what == 'backbone':
        backbone, image = runner.model.backbone, torch.randn(1, 3, 8, 8)
        backbone.eval()
        # `forward` is as it was.
        for a, b in zip(backbone(image), backbone.forward(image)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
