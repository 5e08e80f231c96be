# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A trained text network, as its config and its weights."""
from pathlib import Path
from typing import List, NamedTuple

import pytest
from tiny import residual, run, tiny_config, write_vectors


class Trained(NamedTuple):
    """Files of a run whose class vectors are gone."""
    config: str
    weights: str
    images: List[str]


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """Train a tiny text network through both stages."""
    root = tmp_path_factory.mktemp('trained')
    file = root / 'text.safetensors'
    write_vectors(file)
    cfg = tiny_config(
        root,
        residual(file, dim=16),
        dict(switch_at=9),
        max_iters=12,
        visualizer=dict(
            type='SegLocalVisualizer',
            vis_backends=[dict(type='LocalVisBackend')]))
    # Where `inference_model` looks for it.
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.default_hooks.checkpoint.interval = 12
    # Fast enough to tell classes apart by then.
    cfg.optim_wrapper.optimizer.lr = .2
    run(cfg)
    file.unlink()
    cfg.dump(root / 'config.py')
    return Trained(
        str(root / 'config.py'), str(root / 'work' / 'iter_12.pth'),
        sorted(map(str,
                   Path(root, 'data', 'img').iterdir())))
