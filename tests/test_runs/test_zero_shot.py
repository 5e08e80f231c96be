# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Zero-shot training from the labels to the metric, and LSeg on DPT."""
import math

import cv2
import numpy as np
import pytest
import torch
from mmseg.registry import MODELS
from tiny import (CLASSES, CONTROL, SIZE, assert_equal, changed, run,
                  tiny_config, write_dataset)
from torch import nn

from mmseg_textkd import zero_shot
from mmseg_textkd.text import TextEmbeddings

pytestmark = pytest.mark.stacks

UNSEEN = ['sidewalk', 'truck']
INDICES = [3, 6]
BLOCKS = dict(
    norm='l2', scale=dict(learnable=False), regularization=dict(depth=2))


@MODELS.register_module()
class Colors(nn.Identity):
    """A backbone of which the features are the colors."""

    def forward(self, inputs):
        return [inputs]


def sphere():
    """Vectors that are spread over the sphere, in any order."""
    index = torch.arange(len(CLASSES)) + .5
    z = 1 - 2 * index / len(CLASSES)
    angle = math.pi * (1 + 5**.5) * index
    radius = (1 - z**2).sqrt()
    vectors = torch.stack([radius * angle.cos(), radius * angle.sin(), z], 1)
    order = torch.randperm(
        len(CLASSES), generator=torch.Generator().manual_seed(0))
    return vectors[order]


def write(root, labels_of_unseen=True):
    """Images in which the color of a class is a map of its vector."""
    write_dataset(root, 16, 128 + 100 * sphere().numpy())
    for path in (root / 'ann').iterdir() if not labels_of_unseen else ():
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        labels[np.isin(labels, INDICES)] = 255
        cv2.imwrite(str(path), labels)


def config(root):
    """Zero-shot training of a linear network."""
    file = root / 'text.safetensors'
    TextEmbeddings(sphere(), CLASSES).save(file)
    text = dict(type='ClassEmbeddings', file=str(file))
    cfg = tiny_config(root, text, {}, max_iters=60)
    cfg.model.backbone = dict(type='Colors')
    cfg.model.decode_head.update(in_channels=3, channels=3, num_convs=0)
    branch, cfg.train_dataloader, cfg.val_evaluator = zero_shot(
        cfg.train_dataloader, 'toy_scenes', UNSEEN, before='PackSegInputs')
    cfg.test_evaluator = cfg.val_evaluator
    cfg.model.decode_head.text_branch = dict(BLOCKS, **branch)
    return cfg


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp('zero_shot')
    write(root / 'data')
    return run(config(root))


def test_classes_without_labels_are_found_by_their_text(trained):
    metrics = trained.val_loop.run()
    # Guessing among eight gives an IoU of 7 %.
    assert metrics['mIoU_unseen'] > 50 and metrics['mIoU_seen'] > 50
    # It is their text that does it.
    vectors = trained.model.decode_head.text_branch.text.class_embeddings
    own = vectors.clone()
    vectors[INDICES] = own[INDICES[::-1]]
    swapped = trained.val_loop.run()
    vectors[INDICES] = -own[INDICES]
    opposite = trained.val_loop.run()
    vectors.copy_(own)
    for other in (swapped, opposite):
        assert other['mIoU_unseen'] < 10
    again = trained.val_loop.run()
    assert again == metrics


def test_labels_of_unseen_classes_never_reach_training(trained, tmp_path):
    """A run on data that do not have them ends with the same weights."""
    write(tmp_path / 'data', labels_of_unseen=False)
    cfg = config(tmp_path)
    pipeline = cfg.train_dataloader.dataset.pipeline
    kinds = [t['type'] for t in pipeline]
    del pipeline[kinds.index('HideClasses')]
    other = run(cfg)
    assert_equal(trained.model.state_dict(), other.model.state_dict())
    text = other.model.decode_head.text_branch.text.class_embeddings
    torch.testing.assert_close(text, sphere())


def test_lseg_on_dpt_learns(tmp_path):
    cfg = tiny_config(tmp_path, CONTROL, {}, max_iters=12)
    every = (0, 1, 2, 3)
    cfg.model.backbone = dict(
        type='VisionTransformer',
        img_size=SIZE,
        embed_dims=16,
        num_layers=4,
        num_heads=2,
        mlp_ratio=2,
        out_indices=every,
        final_norm=False,
        with_cls_token=True,
        output_cls_token=True)
    inputs = dict(in_channels=(16, ) * 4, in_index=every)
    cfg.model.decode_head.update(
        inputs,
        type='TextDPTHead',
        text_branch=dict(BLOCKS, bias=False),
        embed_dims=16,
        post_process_channels=[8, 8, 16, 16],
        readout_type='project',
        input_transform='multiple_select')
    for key in ('num_convs', 'concat_input'):
        cfg.model.decode_head.pop(key)
    start = MODELS.build(cfg.model).state_dict()
    runner = run(cfg)
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert losses[-3:].mean() < .8 * losses[:3].mean()
    after = runner.model.state_dict()
    still = {'text.class_embeddings', 'scale.log_scale'}
    still = {f'decode_head.conv_seg.{key}' for key in still}
    assert changed(start, after) == set(after) - still
    blocks = after['decode_head.conv_seg.regularization.weight']
    identity = torch.zeros(2, 3, 3)
    identity[:, 1, 1] = 1
    assert (blocks != identity).all()
