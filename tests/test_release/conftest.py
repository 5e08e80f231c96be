# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Runs whose checkpoints are folded, published and compared."""
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import CONTROL, run, tiny_config


class Run(NamedTuple):
    """A finished run and its files."""
    runner: object
    config: Path
    work_dir: Path

    def checkpoint(self, iteration):
        return self.work_dir / f'iter_{iteration}.pth'

    @property
    def log(self):
        path, = self.work_dir.rglob('scalars.json')
        return path


def train(root, cfg):
    cfg.train_cfg.val_interval = cfg.default_hooks.checkpoint.interval
    done = Run(run(cfg), root / 'tiny_1xb2.py', root / 'work')
    # As all configs have it.
    cfg.default_hooks.checkpoint.save_best = 'mIoU'
    cfg.dump(done.config)
    return done


@pytest.fixture(scope='package')
def stock(tmp_path_factory):
    """A stock network whose weights are averaged."""
    root = tmp_path_factory.mktemp('stock')
    cfg = tiny_config(root, max_iters=20, save_every=10)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=.5)]
    cfg.optim_wrapper.optimizer.lr = .2
    return train(root, cfg)


@pytest.fixture(scope='package')
def text(tmp_path_factory):
    """A text network with random vectors."""
    root = tmp_path_factory.mktemp('text')
    return train(root, tiny_config(root, dict(CONTROL, dim=8), max_iters=2))
