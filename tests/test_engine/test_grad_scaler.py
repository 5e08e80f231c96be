# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""float16 with a scaled loss, through the switch to stage 2."""
import copy
from contextlib import contextmanager

import pytest
import torch
from each_case import each_case
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmseg.registry import HOOKS, OPTIM_WRAPPERS
from tiny import RESIDUAL, assert_equal, run, tiny_config

from mmseg_textkd.models.text_parameters import text_parameters

SWITCH, SCALE = 3, 1024.


@OPTIM_WRAPPERS.register_module()
class CPUFloat16OptimWrapper(AmpOptimWrapper):
    """MMEngine's, which insists on a GPU, with the scaler of a CPU."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler(
            'cpu', init_scale=SCALE, growth_interval=2)
        self.cast_dtype = torch.float16

    @contextmanager
    def optim_context(self, model):
        with OptimWrapper.optim_context(self, model), torch.autocast(
                'cpu', self.cast_dtype):
            yield


@HOOKS.register_module()
class ScaleHook(Hook):
    """Note the scale and what changes; let the gradient overflow once."""

    def __init__(self, overflow_at=None):
        self.overflow_at = overflow_at
        self.scales, self.changed, self.dtypes = [], [], set()

    def before_train(self, runner):

        def note(conv, args, output):
            if conv.training:
                self.dtypes.add(output.dtype)

        runner.model.backbone.conv1.register_forward_hook(note)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.overflow_at:
            # It learns in both stages.
            scale = runner.model.decode_head.conv_seg.scale.log_scale
            self.handle = scale.register_hook(
                lambda grad: torch.full_like(grad, torch.inf))
        self.before = copy.deepcopy(dict(runner.model.named_parameters()))

    def after_train_iter(self, runner, outputs, **kwargs):
        if runner.iter == self.overflow_at:
            self.handle.remove()
        self.scales.append(runner.optim_wrapper.loss_scaler.get_scale())
        params = runner.model.named_parameters()
        self.changed.append(
            {n
             for n, p in params if not torch.equal(p, self.before[n])})


def train(folder, resume=False, stop_at=None, **options):
    cfg = tiny_config(folder, RESIDUAL, dict(switch_at=SWITCH), save_every=1)
    cfg.optim_wrapper.type = 'CPUFloat16OptimWrapper'
    cfg.custom_hooks.append(dict(type='ScaleHook', **options))
    cfg.custom_hooks.append(dict(type='StopHook', at=stop_at))
    runner = run(cfg, resume=resume)
    hook, = (h for h in runner.hooks if isinstance(h, ScaleHook))
    return runner, hook


def test_both_stages_learn_what_they_learn_in_float32(tmp_path):
    runner, hook = train(tmp_path)
    assert hook.dtypes == {torch.float16}
    params = dict(runner.model.named_parameters())
    text = set(text_parameters(runner.model))
    prompts = {n for n in text if n.endswith('.offset')}
    assert prompts and prompts < text
    for changed in hook.changed[:SWITCH]:
        # But for a gradient that is too small for float16.
        assert changed < set(params) and not changed & prompts
        assert len(set(params) - prompts - changed) < 5
    for changed in hook.changed[SWITCH:]:
        assert changed == text
    # No step is lost: the scale doubles after each two, across the switch.
    assert hook.scales == [SCALE * 2**(i // 2) for i in range(1, 7)]
    plain = run(
        tiny_config(tmp_path, RESIDUAL, dict(switch_at=SWITCH)),
        work_dir=str(tmp_path / 'plain'))
    # Rounded ten bits earlier, but not 1024 times too far.
    for name, param in text_parameters(plain.model).items():
        torch.testing.assert_close(params[name], param, rtol=0, atol=.05)


@each_case('at', [SWITCH - 1, SWITCH])
def test_an_overflow_at_the_switch_costs_one_step(tmp_path, at):
    runner, hook = train(tmp_path, overflow_at=at)
    assert [i for i, changed in enumerate(hook.changed) if not changed] == [at]
    assert hook.scales[at] == hook.scales[at - 1] / 2
    assert all(p.isfinite().all() for p in runner.model.parameters())


def test_a_killed_run_goes_on_with_its_scale(tmp_path):
    whole, hook = train(tmp_path / 'whole')
    for stop in (SWITCH, SWITCH + 1):
        folder = tmp_path / f'killed{stop}'
        with pytest.raises(KeyboardInterrupt):
            train(folder, stop_at=stop)
        resumed, again = train(folder, resume=True)
        assert again.scales == hook.scales[stop:]
        assert_equal(resumed.model.state_dict(), whole.model.state_dict())
        assert_equal(resumed.optim_wrapper.loss_scaler.state_dict(),
                     whole.optim_wrapper.loss_scaler.state_dict())
