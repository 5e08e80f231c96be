# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A hook for runs in processes of their own: it kills them, or reports."""
import json
import os
import os.path as osp
import signal
import sys

import torch.distributed as dist
from mmengine.config import config
from mmengine.dist import get_rank
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from mmseg_textkd.engine.stages.text_state import tower_checksums, unwrap

if 'RANK' in os.environ and not dist.is_initialized():
    # Before MMEngine, which would ask for a CUDA device first.
    dist.init_process_group('gloo')


@HOOKS.register_module()
class FateHook(Hook):
    """Kill the process where ``FATE`` says so, and note how a run went.

    ``FATE='iter 3'`` kills before iteration 3 does anything; ``'step 3'``
    when it is done but not saved; ``'write 4'`` when half of the checkpoint
    ``iter_4.pth`` is on the disk. A run that comes to its end writes
    ``report_RANK.json`` into its ``work_dir``.
    """
    priority = 'HIGHEST'

    def __init__(self):
        fate = os.environ.get('FATE', 'none 0').split()
        self.event, self.at = fate[0], int(fate[1])
        self.iters, self.learns, self.modules = [], [], []
        config.Config.pretty_text = _remember(config.Config.pretty_text)
        if self.event == 'write':
            _write_half(f'iter_{self.at}.pth')

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._strike('iter', runner)
        self.iters.append(runner.iter)
        self.modules.append('open_clip' in sys.modules)

    def after_train_iter(self,
                         runner,
                         batch_idx,
                         data_batch=None,
                         outputs=None):
        self.learns.append(
            sorted(n for n, p in unwrap(runner.model).named_parameters()
                   if p.requires_grad))
        self._strike('step', runner)

    def _strike(self, event, runner):
        if (event, runner.iter) == (self.event, self.at):
            _die()

    def after_train(self, runner):
        model = unwrap(runner.model)
        state = {k: v.double().sum() for k, v in model.state_dict().items()}
        report = dict(
            iters=self.iters,
            learns=self.learns,
            open_clip=self.modules,
            towers=list(tower_checksums(model).values()),
            sums={
                k: float(v)
                for k, v in state.items()
            },
            graded=sorted(n for n, p in model.named_parameters()
                          if p.grad is not None))
        path = osp.join(runner.work_dir, f'report_{get_rank()}.json')
        with open(path, 'w') as file:
            json.dump(report, file)


def _die():
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _write_half(name):
    """Let the power fail while a checkpoint is being written."""
    put = LocalBackend.put

    def put_half(self, obj, filepath):
        if not str(filepath).endswith(name):
            return put(self, obj, filepath)
        with open(filepath, 'wb') as file:
            file.write(bytes(obj)[:len(obj) // 2])
            file.flush()
            os.fsync(file.fileno())
        _die()

    LocalBackend.put = put_half


def _remember(pretty_text):
    """Format a config once: MMEngine does it anew for every checkpoint."""
    known = {}

    def text(self):
        key = repr(self._cfg_dict.to_dict())
        if key not in known:
            known[key] = pretty_text.fget(self)
        return known[key]

    return property(text)
