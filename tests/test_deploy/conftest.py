# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Trained text networks to fold."""
import functools
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import DefaultScope
from tiny import AUXILIARY, residual, run, tiny_config, write_vectors

# Stage 2 begins after iteration 3.
RUNS = dict(
    plain=dict(),
    auxiliary={'model.decode_head.role': 'auxiliary'},
    ema=dict(custom_hooks=[dict(type='EMAHook', momentum=0.3)]),
    bf16={'optim_wrapper.type': 'CPUAmpOptimWrapper'},
    l2={'model.decode_head.text_branch': dict(norm='l2')})


def train(folder, options):
    """Train for six iterations and forget the class vectors."""
    file, config = folder / 'text.safetensors', folder / 'config.py'
    write_vectors(file)
    cfg = tiny_config(
        folder, residual(file, dim=16), dict(switch_at=3), save_every=3)
    cfg.model.auxiliary_head = [AUXILIARY]
    cfg.optim_wrapper.optimizer.lr = .2
    options = dict(options)
    cfg.custom_hooks += options.pop('custom_hooks', [])
    cfg.merge_from_dict(options)
    runner = run(cfg)
    file.unlink()
    cfg.dump(config)
    averaged = [
        h.ema_model.module for h in runner.hooks if isinstance(h, EMAHook)
    ]
    return SimpleNamespace(
        cfg=Config.fromfile(config),
        config=config,
        stage1=folder / 'work' / 'iter_3.pth',
        weights=folder / 'work' / 'iter_6.pth',
        model=runner.model.eval(),
        averaged=averaged[0].eval() if averaged else None)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """Get a function that gives one of the ``RUNS``, made when asked for."""

    def get(name):
        with DefaultScope.overwrite_default_scope('mmseg'):
            return train(tmp_path_factory.mktemp(name), RUNS[name])

    get = functools.cache(get)
    return lambda name='plain': get(name)


@pytest.fixture
def write_camvid():
    """Get a function that writes a test set with some unlabeled pixels."""

    def write(root, suffix='.png'):
        rng = np.random.default_rng(0)
        for name, shape in ((f'test/%d{suffix}', (36, 48, 3)),
                            ('testannot/%d.png', (36, 48))):
            (root / name).parent.mkdir(parents=True)
            for i in range(2):
                values = rng.integers(0, 12, shape, np.uint8)
                cv2.imwrite(f'{root}/{name % i}', values)

    return write
