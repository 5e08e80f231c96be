# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Hooks for runs in processes of their own: one kills them, or reports."""
import json
import os
import os.path as osp
import signal
import sys

from mmengine.dist import get_rank
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmseg.registry import HOOKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_textkd.models.text_parameters import tower_checksums, unwrap

# Files that this process has written; one that it renamed has its new name.
WRITTEN = set()


def _note_written(event, args):
    if event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = args[0]
    elif event == 'os.rename':
        path = args[1]
    else:
        return
    if not isinstance(path, int):  # the number of a file that is open
        WRITTEN.add(osp.abspath(os.fsdecode(path)))


sys.addaudithook(_note_written)


@HOOKS.register_module()
class FateHook(Hook):
    """Kill the process where ``FATE`` says so, and note how a run went.

    ``FATE='iter 3'`` kills before iteration 3 does anything; ``'step 3'``
    when it is done but not saved; ``'write 4'`` when half of the checkpoint
    ``iter_4.pth`` is on the disk; ``'image 9'`` before the 9th image that the
    process validates. A run that comes to its end writes ``report_RANK.json``
    into its ``work_dir``.
    """
    priority = 'HIGHEST'

    def __init__(self):
        fate = os.environ.get('FATE', 'none 0').split()
        self.event, self.at = fate[0], int(fate[1])
        self.iters, self.learns, self.modules, self.held = [], [], [], []
        self.images, self.losses, self.dtypes = [], [], set()
        self.validated = 0
        if self.event == 'write':
            _write_half(f'iter_{self.at}.pth')

    def before_train(self, runner):
        modules = unwrap(runner.model).modules()
        conv = next(m for m in modules if isinstance(m, nn.Conv2d))
        conv.register_forward_hook(
            lambda conv, args, out: self.dtypes.add(str(out.dtype)))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._strike('iter', runner)
        self.images.append(
            [osp.basename(s.img_path) for s in data_batch['data_samples']])
        self.iters.append(runner.iter)
        self.modules.append('open_clip' in sys.modules)
        self.held.append(bool(tower_checksums(unwrap(runner.model))))

    def after_train_iter(self, runner, outputs, **kwargs):
        params = unwrap(runner.model).named_parameters()
        self.learns.append(sorted(n for n, p in params if p.requires_grad))
        self.losses.append(float(outputs['loss']))
        self._strike('step', runner)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.validated += 1
        if (self.event, self.at) == ('image', self.validated):
            _die()

    def _strike(self, event, runner):
        if (event, runner.iter) == (self.event, self.at):
            _die()

    def after_train(self, runner):
        model = unwrap(runner.model)
        names = {id(p): n for n, p in model.named_parameters()}
        groups = runner.optim_wrapper.optimizer.param_groups
        params = [p for group in groups for p in group['params']]
        towers = [getattr(m, 'tower', None) for m in model.modules()]
        towers = nn.ModuleList(filter(None, towers)).named_parameters()
        graded = [
            n for n, p in towers if p.requires_grad or p.grad is not None
        ]
        report = dict(
            iters=self.iters,
            learns=self.learns,
            images=self.images,
            losses=self.losses,
            dtypes=sorted(self.dtypes),
            written=sorted(filter(osp.isfile, WRITTEN)),
            open_clip=self.modules,
            held=self.held,
            towers=list(tower_checksums(model).values()),
            tower_graded=graded,
            optimized=[names.get(id(p), 'UNKNOWN') for p in params],
            inside=[type(m).__name__ for m in model.modules()],
            sums={
                k: float(v.double().sum())
                for k, v in model.state_dict().items()
            },
            graded=sorted(n for n, p in model.named_parameters()
                          if p.grad is not None))
        path = osp.join(runner.work_dir, f'report_{get_rank()}.json')
        with open(path, 'w') as file:
            json.dump(report, file)


@HOOKS.register_module()
class FrozenNormHook(Hook):
    """Keep batch norm in evaluation mode: no image looks at another."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for module in unwrap(runner.model).modules():
            if isinstance(module, _BatchNorm):
                module.eval()


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
