# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The configs of distillation: named, built, trained, and a fair twin."""
import copy
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from mmseg.registry import MODELS, TRANSFORMS
from network_tester import CONFIGS, load_config, load_model, samples
from test_configs import NAME

from mmseg_textkd.deploy import to_stock_cfg

DISTILLATION = sorted((CONFIGS / 'distillation').glob('*.py'))
# Of the toy those with a text network as teacher.
TRAINED = [
    p for p in DISTILLATION if 'camvid' in p.name or '-segkd_' in p.name
]
KINDS = ('tgkd', 'segkd', 'kd', 'cwd')


def ids(paths):
    return [path.name for path in paths]


def kind_of(path):
    """What the network is trained with, and the config without it."""
    kind, = re.findall(rf'-({"|".join(KINDS)})_', path.name)
    folder = 'textkd' if path.name.startswith('textkd_') else 'stock'
    twin = CONFIGS / folder / path.name.replace(f'-{kind}_', '_')
    assert twin.exists(), f'{path.name} has no twin'
    return kind, load_config(twin)


@pytest.mark.stacks
def test_all_combinations_are_there():
    assert len(list((CONFIGS / 'distillation').rglob('*.py'))) == 16
    kinds = [kind_of(p)[0] for p in DISTILLATION]
    assert [kinds.count(k) for k in KINDS] == [4] * 4
    for network in ('bisenetv2_fcn', 'ddrnet_23-slim'):
        for data in ('camvid', 'toy-scenes'):
            number = sum(network in n and data in n for n in ids(DISTILLATION))
            assert number == 4
    texts = [p for p in DISTILLATION if p.name.startswith('textkd_')]
    assert {kind_of(p)[0] for p in texts} == {'tgkd', 'segkd'}


@pytest.mark.stacks
@pytest.mark.parametrize('path', DISTILLATION, ids=ids(DISTILLATION))
def test_only_the_teacher_is_added(path):
    assert re.fullmatch(NAME, path.name)
    kind, twin = kind_of(path)
    cfg = load_config(path)
    ours, plain = cfg.to_dict(), twin.to_dict()
    changed = {
        k
        for k in {*ours, *plain}
        if not k.startswith('text_') and ours.get(k) != plain.get(k)
    }
    model = ours['model']
    if kind == 'tgkd':
        assert changed == {'model', 'train_dataloader'}
        kinds = [
            t['type'] for t in ours['train_dataloader']['dataset']['pipeline']
        ]
        assert kinds[2] == 'LoadRegionEmbeddings'
        assert kinds[-1] == 'PackRegionInputs'
    else:
        assert changed == {'model', 'custom_hooks'}
        assert ours['custom_hooks'][-1] == dict(type='TeacherHook')
        assert model.pop('type') == 'DistilledEncoderDecoder'
        assert plain['model'].pop('type') == 'EncoderDecoder'
        teacher = model.pop('teacher')
        assert Path(teacher['config']).stem in teacher['checkpoint']
        teacher = load_config(Path(teacher['config']))
        # Of the same data.
        assert (teacher.train_dataloader.dataset.data_root ==
                cfg.train_dataloader.dataset.data_root)
        model.pop('distill_losses', None)
    model['decode_head'].pop('text_losses', None)
    assert model == plain['model']
    stock = to_stock_cfg(cfg)
    assert stock.to_dict() == to_stock_cfg(twin).to_dict()
    assert 'textkd' not in str(stock.to_dict())


def test_the_image_tower_is_that_of_the_text():
    for path in DISTILLATION:
        if '-tgkd_' not in path.name:
            continue
        cfg = load_config(path)
        build = cfg.model.decode_head.text.embeddings.build
        store = TRANSFORMS.build(
            cfg.train_dataloader.dataset.pipeline[2]).store
        assert (store.model, store.pretrained) == (build.model,
                                                   build.get('pretrained'))
        assert store.options['fill'] == 128


@pytest.mark.parametrize('path', TRAINED, ids=ids(TRAINED))
def test_an_iteration(path, tmp_path):
    """Losses of the teacher arrive in the network, at the rates of the text.

    The teacher is that of the config, untrained.
    """
    kind, _ = kind_of(path)
    size = (72, 120)
    cfg = load_config(path)
    model_cfg = load_model(path)
    model_cfg.data_preprocessor.size = size
    model_cfg.backbone.norm_cfg = model_cfg.decode_head.norm_cfg = dict(
        type='BN')
    classes = model_cfg.decode_head.num_classes
    batch = samples(size, classes)
    if kind != 'tgkd':
        teacher = load_model(Path(model_cfg.teacher.config))
        state = MODELS.build(copy.deepcopy(teacher)).state_dict()
        torch.save(dict(state_dict=state), tmp_path / 'teacher.pth')
        model_cfg.teacher.checkpoint = str(tmp_path / 'teacher.pth')
        Config(dict(model=teacher)).dump(tmp_path / 'teacher.py')
        model_cfg.teacher.config = str(tmp_path / 'teacher.py')
    else:
        dim = cfg.model.decode_head.text.embeddings.dim
        for sample in batch:
            sample.region_embeddings = InstanceData(
                labels=torch.arange(classes),
                vectors=torch.randn(classes, dim))
    model = revert_sync_batchnorm(MODELS.build(model_cfg))
    losses = model.loss(torch.randn(2, 3, *size), batch)
    added = {
        'tgkd': {'decode.loss_text_guided'},
        'segkd': {'decode.loss_text_guided', 'decode.loss_text_similarity'},
        'kd': {'distill.loss_kd'},
        'cwd': {'distill.loss_cwd'}
    }[kind]
    assert {k for k in losses if '_text_' in k or 'distill' in k} == added
    sum(losses[k] for k in added).backward()
    grads = [p.grad for p in model.backbone.parameters()]
    assert sum(g is not None and bool((g != 0).any()) for g in grads) > 10
    # No decay on the factors.
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    factors = {
        id(p)
        for n, p in model.named_parameters() if n.endswith('log_scale')
    }
    decays = [
        g['weight_decay'] for g in wrapper.param_groups
        if id(g['params'][0]) in factors
    ]
    assert decays == [0] * len(factors)
