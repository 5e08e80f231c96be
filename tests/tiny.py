# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A real training run, small enough for a test."""
import copy
import itertools
import os.path as osp
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS, MODELS

from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.text import TextEmbeddings

CLASSES = ('sky', 'building', 'road', 'sidewalk', 'pole', 'car', 'truck',
           'person')
SIZE = (32, 64)
NORM = dict(type='BN')
# Without it convolutions would get no gradient at first.
PLAIN = dict(zero_init_residual=False, norm_cfg=NORM)
STAGE = dict(num_stages=1, strides=(1, ), dilations=(1, ), out_indices=(0, ))
BACKBONE = dict(
    PLAIN, type='ResNet', depth=18, stem_channels=8, base_channels=8, **STAGE)
# Dropout is random, and MMEngine does not save random states.
HEAD = dict(
    type='FCNHead',
    in_channels=8,
    in_index=0,
    channels=16,
    num_convs=1,
    concat_input=False,
    dropout_ratio=0.,
    num_classes=len(CLASSES),
    norm_cfg=NORM,
    align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss'))
# A stock auxiliary head of the tiny network.
AUXILIARY = dict(
    HEAD,
    channels=8,
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
DATASET = dict(
    type='BaseSegDataset',
    img_suffix='.png',
    seg_map_suffix='.png',
    data_prefix=dict(img_path='img', seg_map_path='ann'),
    pipeline=PIPELINE)
_RUNS = itertools.count()


@HOOKS.register_module()
class StopHook(Hook):
    """Stop a run before it begins iteration ``at``, as a keyboard does."""
    priority = 'HIGHEST'

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx=None, data_batch=None):
        if runner.iter == self.at:
            raise KeyboardInterrupt


@HOOKS.register_module()
class StopInValidation(StopHook):
    """Stop it in the validation before that iteration."""
    before_val_epoch = StopHook.before_train_iter
    before_train_iter = Hook.before_train_iter


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


def write_dataset(root, num_images=6, colors=None):
    """Write images whose colors say their classes, more or less."""
    rng = np.random.default_rng(0)
    if colors is None:
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
    head = copy.deepcopy(HEAD)
    if text is not None:
        head.update(type='TextFCNHead', text=text)
    metainfo = dict(classes=CLASSES, palette=[[i, i, i] for i in range(8)])
    # Serializing begins with a garbage collection.
    dataset = dict(DATASET, data_root=str(root), serialize_data=False)
    dataset['metainfo'] = metainfo
    preprocessor = dict(
        type='SegDataPreProcessor', mean=[128.] * 3, std=[64.] * 3)
    sgd = dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=5e-4)
    undecayed = dict.fromkeys(['.text.', 'log_scale'], dict(decay_mult=0.))
    decay = dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0)
    saving = dict(type='CheckpointHook', by_epoch=False)

    def loader(size, **sampler):
        loader = dict(batch_size=size, num_workers=0, dataset=dataset)
        return dict(loader, sampler=sampler)

    cfg = dict(
        default_scope='mmseg',
        custom_imports=dict(imports=['mmseg_textkd']),
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(preprocessor, size=SIZE, seg_pad_val=255),
            backbone=BACKBONE,
            decode_head=head,
            train_cfg=dict(),
            test_cfg=dict(mode='whole')),
        work_dir=str(tmp_path / 'work'),
        train_dataloader=loader(2, type='InfiniteSampler'),
        val_dataloader=loader(1, type='DefaultSampler', shuffle=False),
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        train_cfg=dict(
            type='IterBasedTrainLoop',
            max_iters=max_iters,
            val_interval=max_iters),
        val_cfg=dict(type='ValLoop'),
        optim_wrapper=dict(
            type='OptimWrapper',
            optimizer=sgd,
            paramwise_cfg=dict(custom_keys=undecayed)),
        param_scheduler=[dict(decay, end=max_iters, by_epoch=False)],
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(saving, interval=save_every or max_iters)),
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


def without_loops(cfg):
    """Leave out validation and test; in place."""
    for key in [k for k in cfg if k.startswith(('val', 'test'))]:
        cfg.pop(key)
    cfg.train_cfg.pop('val_interval')


def watch(cfg, *hooks):
    """Let hooks of ``fate_hook`` watch a run, by default it; in place."""
    cfg.custom_imports.imports.append('fate_hook')
    cfg.custom_hooks[:0] = [dict(type=h) for h in ('FateHook', *hooks)]


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


def stop(cfg, at, kind='StopHook', **changes):
    """Train as :func:`run`, up to a stop before iteration ``at``."""
    cfg = cfg.copy()
    cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type=kind, at=at)]
    with pytest.raises(KeyboardInterrupt):
        run(cfg, **changes)


def stop_and_resume(cfg, at, work_dir, kind='StopHook'):
    """Train as :func:`run`, with a stop before iteration ``at``."""
    cfg = cfg.copy()
    cfg.work_dir = str(work_dir)
    stop(cfg, at, kind)
    return run(cfg, resume=True, load_from=None)


def assert_apart(runner, parameters):
    """Nothing of a teacher is trained, saved or a part of the network."""
    model, groups = runner.model, runner.optim_wrapper.param_groups
    params = {id(p) for p in parameters}
    assert not params & {id(p) for g in groups for p in g['params']}
    assert not params & {id(p) for p in model.parameters()}
    assert not any('teacher' in k for k in model.state_dict())
    assert not any('teacher' in n for n, _ in model.named_modules())


def folded(cfg, model):
    """The stock network of a config, with a trained model folded into it."""
    stock = MODELS.build(to_stock_cfg(cfg).model).eval()
    stock.load_state_dict(fold_state_dict(model.eval()), strict=True)
    return stock


def changed(before, after):
    """Keys of two states where they differ."""
    return {k for k in after if not torch.equal(before[k], after[k])}


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
