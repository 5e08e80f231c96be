# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A real training run, small enough for a test."""
import itertools
import os.path as osp
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from mmseg_textkd.text import TextEmbeddings

CLASSES = ('sky', 'building', 'road', 'sidewalk', 'pole', 'car', 'truck',
           'person')
SIZE = (32, 64)
BACKBONE = dict(
    type='ResNet',
    depth=18,
    num_stages=1,
    stem_channels=8,
    base_channels=8,
    strides=(1, ),
    dilations=(1, ),
    out_indices=(0, ),
    # Else convolutions get no gradient at first.
    zero_init_residual=False,
    norm_cfg=dict(type='BN'))
# A stock auxiliary head of the tiny network.
AUXILIARY = dict(
    type='FCNHead',
    in_channels=8,
    in_index=0,
    channels=8,
    num_convs=1,
    concat_input=False,
    dropout_ratio=0.,
    num_classes=len(CLASSES),
    norm_cfg=dict(type='BN'),
    align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4))
# Text and residual prompts that need no file.
CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)
RESIDUAL = dict(type='ResidualPromptLearner', embeddings=CONTROL)
# A learned context of ToyCLIP's; `embeddings` or `vocabulary` is to be added.
PROMPTS = dict(
    type='ContextPromptLearner', model='toyclip', token_dim=64, n_ctx=4)
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
_RUNS = itertools.count()


@HOOKS.register_module()
class StopHook(Hook):
    """Stop a run before it begins iteration ``at``, as a keyboard does."""
    priority = 'HIGHEST'

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            raise KeyboardInterrupt


def stir(module, amount=.3):
    """Leave nothing of a module at its neutral start value; in place."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith('running_var'):
                value.uniform_(.5, 2)
            elif value.is_floating_point() and 'embeddings' not in name:
                value.add_(torch.randn_like(value) * amount)
    return module


def residual(file, **options):
    """Config of residual prompts on the vectors of a file."""
    file = str(file) if isinstance(file, Path) else file
    return dict(
        type='ResidualPromptLearner',
        embeddings=dict(type='ClassEmbeddings', file=file, **options))


def write_vectors(file, shift=0.):
    """Write random vectors of the classes, of 16 values."""
    vectors = torch.randn(
        len(CLASSES), 16, generator=torch.Generator().manual_seed(0))
    TextEmbeddings(
        torch.nn.functional.normalize(vectors + shift, dim=1),
        CLASSES).save(file)


def save_weights(path, model, classes=CLASSES):
    """Save a model, or its state dict, as a run does; returns the path."""
    state = model if isinstance(model, dict) else model.state_dict()
    colors = [[i, i, i] for i in range(len(classes))]
    meta = dict(dataset_meta=dict(classes=tuple(classes), palette=colors))
    torch.save(dict(state_dict=state, meta=meta), path)
    return str(path)


def predict_logits(model, inputs):
    """Logits of normalized images, at their size."""
    with torch.no_grad():
        return model.encode_decode(inputs, [dict(img_shape=inputs.shape[2:])])


def write_video(path, images, fps):
    codec, size = cv2.VideoWriter_fourcc(*'MJPG'), images[0].shape[1::-1]
    writer = cv2.VideoWriter(path, codec, fps, size)
    for image in images:
        writer.write(image)
    writer.release()


def write_dataset(root, num_images=6):
    """Write images whose colors say their classes, more or less."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (len(CLASSES), 3))
    for folder in ('img', 'ann'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        labels = np.kron(
            rng.integers(0, len(CLASSES), (2, 4)),
            np.ones((SIZE[0] // 2, SIZE[1] // 4), int))
        image = colors[labels] + rng.normal(0, 10, (*SIZE, 3))
        image = image.clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(root / 'img' / f'{i}.png'), image)
        cv2.imwrite(str(root / 'ann' / f'{i}.png'), labels.astype(np.uint8))
    return str(root)


def tiny_config(tmp_path,
                text=None,
                hook=None,
                max_iters=6,
                save_every=None,
                **options):
    """Config of a tiny FCN; with ``text``, of its text twin."""
    root = tmp_path / 'data'
    if not root.exists():
        write_dataset(root)
    norm_cfg = dict(type='BN')
    head = dict(
        type='FCNHead',
        in_channels=8,
        in_index=0,
        channels=16,
        num_convs=1,
        concat_input=False,
        # Random, and MMEngine does not save random states.
        dropout_ratio=0.,
        num_classes=len(CLASSES),
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss'))
    if text is not None:
        head.update(type='TextFCNHead', text=text)
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(root),
        img_suffix='.png',
        seg_map_suffix='.png',
        # Serializing begins with a garbage collection.
        serialize_data=False,
        metainfo=dict(classes=CLASSES, palette=[[i, i, i] for i in range(8)]),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=PIPELINE)

    def loader(batch_size, sampler):
        return dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=sampler,
            dataset=dataset)

    cfg = dict(
        default_scope='mmseg',
        custom_imports=dict(imports=['mmseg_textkd']),
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor',
                mean=[128.] * 3,
                std=[64.] * 3,
                size=SIZE,
                seg_pad_val=255),
            backbone=BACKBONE,
            decode_head=head,
            train_cfg=dict(),
            test_cfg=dict(mode='whole')),
        work_dir=str(tmp_path / 'work'),
        train_dataloader=loader(2, dict(type='InfiniteSampler')),
        val_dataloader=loader(1, dict(type='DefaultSampler', shuffle=False)),
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        train_cfg=dict(
            type='IterBasedTrainLoop',
            max_iters=max_iters,
            val_interval=max_iters),
        val_cfg=dict(type='ValLoop'),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=dict(
                type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4),
            paramwise_cfg=dict(custom_keys={
                '.text.': dict(decay_mult=0.),
                'log_scale': dict(decay_mult=0.)
            })),
        param_scheduler=[
            dict(
                type='PolyLR',
                eta_min=1e-4,
                power=0.9,
                begin=0,
                end=max_iters,
                by_epoch=False)
        ],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook',
                by_epoch=False,
                interval=save_every or max_iters)),
        log_processor=dict(by_epoch=False),
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        find_unused_parameters=True,
        randomness=dict(seed=0),
        log_level='ERROR')
    cfg['test_dataloader'] = cfg['val_dataloader']
    cfg['test_evaluator'] = cfg['val_evaluator']
    cfg['test_cfg'] = dict(type='TestLoop')
    if hook is not None:
        cfg['custom_hooks'] = [dict(type='PromptLearnerHook', **hook)]
    cfg = Config(cfg)
    cfg.merge_from_dict(options)
    return cfg


def run(cfg, **changes):
    """Train and return the runner."""
    cfg = cfg.copy()
    cfg.merge_from_dict(changes)
    # Of its own: MMEngine keeps the log of a name for the whole process, and
    # an `id` is used again.
    cfg.experiment_name = f'{osp.basename(cfg.work_dir)}_{next(_RUNS)}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def assert_equal(a, b, where=''):
    """Compare everything, to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f'{where}.{i}')
    else:
        assert a == b, where
