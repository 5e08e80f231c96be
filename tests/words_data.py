# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Two tiny data sets with different classes, and a network for both."""
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import DATASET, SIZE, residual, tiny_config

from mmseg_textkd.text import TextEmbeddings

OWN = dict(
    town=('sky', 'road', 'vehicle', 'person'),
    lane=('road', 'car', 'truck', 'tree'))
WORDS = ('sky', 'road', 'vehicle', 'person', 'car', 'truck', 'tree')
# For each word what it counts as.
SPACES = dict(town=[0, 1, 2, 3, 2, 2, -1], lane=[-1, 1, -1, -1, 4, 5, 6])
RELATIONS = dict(vehicle=['car', 'truck'])
DIM = 16


def dataset_cfg(root, name, **changes):
    """One of the data sets."""
    palette = [[40 * i, i, 9] for i in range(4)]
    cfg = dict(DATASET, data_root=str(root / name))
    cfg['metainfo'] = dict(classes=OWN[name], palette=palette)
    return dict(cfg, **changes)


def multi_cfg(root, **changes):
    """Both."""
    cfg = dict(
        type='MultiDataset',
        names=list(OWN),
        datasets=[dataset_cfg(root, name) for name in OWN],
        relations=RELATIONS)
    return dict(cfg, **changes)


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Images and vectors: `root` and the `files`."""
    root = tmp_path_factory.mktemp('words')
    rng = np.random.default_rng(0)
    for name, number in zip(OWN, (5, 3)):
        colors = rng.integers(0, 256, (4, 3))
        for i in range(number):
            labels = np.kron(
                rng.integers(0, 4, (2, 4)),
                np.ones((SIZE[0] // 2, SIZE[1] // 4), int))
            image = colors[labels] + rng.normal(0, 10, (*SIZE, 3))
            labels[0, :3] = 255
            for kind, array in (('img', image.clip(0, 255)), ('ann', labels)):
                path = root / name / kind / f'{i}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), array.astype(np.uint8))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(WORDS), DIM, generator=generator)
    vectors = dict(zip(WORDS, F.normalize(vectors, dim=1)))
    files = []
    for name, words in OWN.items():
        files.append(str(root / f'{name}.safetensors'))
        TextEmbeddings(torch.stack([vectors[w] for w in words]),
                       words).save(files[-1])
    return SimpleNamespace(root=root, files=files)


@pytest.fixture
def network_cfg(data, tmp_path):
    """Config of a run on both; `role` is that of its text head."""

    def make(role='classifier', **options):
        text = residual(data.files)
        cfg = tiny_config(tmp_path, text, dict(switch_at=3), 4, save_every=2)
        stock = dict(cfg.model.decode_head, type='FCNHead', channels=8)
        stock.pop('text')
        cfg.model.decode_head.role = role
        for head in (cfg.model.decode_head, stock):
            head['num_classes'] = len(WORDS)
        cfg.model.update(
            type='MultiDatasetEncoderDecoder', auxiliary_head=[stock])
        cfg.train_dataloader.batch_size = 4
        cfg.train_dataloader.sampler = dict(type='BalancedDatasetSampler')
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset = multi_cfg(data.root)
        cfg.test_dataloader = cfg.val_dataloader
        metric = dict(type='DatasetIoUMetric', iou_metrics=['mIoU'])
        cfg.val_evaluator = [dict(metric, dataset=name) for name in OWN]
        cfg.test_evaluator = cfg.val_evaluator
        cfg.merge_from_dict(options)
        return cfg

    return make
