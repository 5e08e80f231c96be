# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A trained text network, as its config and its weights."""
from types import SimpleNamespace

import pytest
from tiny import residual, run, tiny_config, write_vectors


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A tiny text network after both stages; its class vectors are gone."""
    root = tmp_path_factory.mktemp('trained')
    file = root / 'text.safetensors'
    write_vectors(file)
    cfg = tiny_config(root, residual(file, dim=16), dict(switch_at=9), 12)
    backends = [dict(type='LocalVisBackend')]
    cfg.visualizer = dict(type='SegLocalVisualizer', vis_backends=backends)
    # Where `inference_model` looks for it.
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.default_hooks.checkpoint.interval = 12
    # Fast enough to tell classes apart by then.
    cfg.optim_wrapper.optimizer.lr = .2
    run(cfg)
    file.unlink()
    cfg.dump(root / 'config.py')
    images = sorted(str(path) for path in (root / 'data/img').iterdir())
    return SimpleNamespace(
        config=f'{root}/config.py',
        weights=f'{root}/work/iter_12.pth',
        images=images)
