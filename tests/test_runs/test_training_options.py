# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""MMEngine's options for training, through the switch of the stages."""
import pytest
import torch
from mmengine.runner import Runner
from processes import load
from tiny import CLASSES, assert_equal, residual, run, tiny_config

OFFSET = 'decode_head.conv_seg.text.offset'
WEIGHT = 'backbone.conv1.weight'


@pytest.fixture
def text(make_embeddings):
    return residual(make_embeddings(8, names=list(CLASSES)))


def test_accumulation_and_average_together_are_resumed(tmp_path, text):
    """Stopped in stage 1, exactly at the switch, and in stage 2."""
    cfg = tiny_config(
        tmp_path,
        text,
        dict(switch_at=4),
        max_iters=8,
        save_every=1,
        **{'optim_wrapper.accumulative_counts': 2})
    cfg.custom_hooks.append(
        dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=.3))
    run(cfg, work_dir=str(tmp_path / 'whole'))
    whole = load(tmp_path / 'whole' / 'iter_8.pth')
    for stop in (2, 4, 6):
        work_dir = tmp_path / f'cut{stop}'
        cut = cfg.copy()
        cut.custom_hooks = [*cfg.custom_hooks, dict(type='StopHook', at=stop)]
        with pytest.raises(KeyboardInterrupt):
            run(cut, work_dir=str(work_dir))
        run(cfg, work_dir=str(work_dir), resume=True)
        resumed = load(work_dir / 'iter_8.pth')
        for part in ('state_dict', 'ema_state_dict', 'optimizer',
                     'param_schedulers'):
            assert_equal(whole[part], resumed[part], part)

    # Both were at work: a step at every other iteration, and averages.
    states = [load(tmp_path / 'whole' / f'iter_{i}.pth') for i in range(1, 9)]
    for name, moves in ((WEIGHT, [1, 3]), (OFFSET, [5, 7])):
        raw = [state['ema_state_dict'][f'module.{name}'] for state in states]
        assert moves == [
            i for i in range(1, 8) if not torch.equal(raw[i], raw[i - 1])
        ]
        assert not torch.equal(raw[-1], states[-1]['state_dict'][name])


@pytest.mark.parametrize('what', ['backbone', 'step'])
def test_compiled_training_learns_the_same(tmp_path, text, what):
    """The backbone in place, or the whole step by MMEngine's ``compile``."""
    cfg = tiny_config(tmp_path, text, dict(switch_at=1), 2, save_every=1)
    cfg.param_scheduler = None
    # Another mode to compile for, and layers by the hundred, take a minute.
    cfg.train_cfg.val_interval = 5
    cfg.model.backbone = dict(
        type='UNet',
        base_channels=4,
        num_stages=2,
        strides=(1, 1),
        enc_num_convs=(1, 1),
        dec_num_convs=(1, ),
        downsamples=(True, ),
        enc_dilations=(1, 1),
        dec_dilations=(1, ))
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
    before, after = (
        load(tmp_path / 'compiled' / f'iter_{i}.pth')['state_dict']
        for i in (1, 2))
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    prefix = 'decode_head.conv_seg.'
    assert changed == {
        OFFSET, f'{prefix}text.class_embeddings', f'{prefix}text.started',
        f'{prefix}scale.log_scale', f'{prefix}logit_bias'
    }
    expected = load(tmp_path / 'plain' / 'iter_2.pth')['state_dict']
    assert list(after) == list(expected)
    for key in changed:
        torch.testing.assert_close(
            after[key], expected[key], rtol=1e-3, atol=1e-4)
    if what == 'backbone':
        backbone, image = runner.model.backbone, torch.randn(1, 3, 8, 8)
        backbone.eval()
        # `forward` is as it was.
        for a, b in zip(backbone(image), backbone.forward(image)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
