# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The networks of each method's configs: built, optimized, trained."""
import copy
from pathlib import Path

import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from mmseg.registry import MODELS
from network_tester import (CONFIGS, load_config, load_model, offline, rates,
                            samples)

from mmseg_textkd.models import (BalancedTextClassifier, ContextAwareText,
                                 FrozenCLIPTeacher,
                                 ImageEmbeddingDistillationLoss, TwoWayBridge)

pytestmark = pytest.mark.stacks

TOY = '1xb8-200i_toy-scenes-128x256.py'
CAMVID = '1xb8-10k_camvid-360x480.py'


def build(name):
    """A config and its model."""
    cfg = load_config(CONFIGS / name)
    return cfg, MODELS.build(offline(copy.deepcopy(cfg.model)))


@each_case('name, kind, kept', [
    ('bridge-kept', TwoWayBridge, True),
    ('context', ContextAwareText, False),
])
def test_fusion_is_built_without_files(bare, name, kind, kept):
    _, model = build(f'fusion/textkd_bisenetv2_fcn_toyclip-{name}_{TOY}')
    built = model.decode_head.text_branch.fusion
    assert type(built) is kind and built.used_at_inference == kept


def test_score_map_is_built_without_files(bare):
    name = 'textkd_bisenetv2_fcn_vit-b16-score-map_1xb8-10k_camvid-360x480.py'
    _, model = build(f'textkd/{name}')
    assert model.score_map.text.num_classes == 11
    with pytest.raises(RuntimeError, match='tools/encode_text.py'):
        model.score_map.text()


@pytest.mark.parametrize('name', [
    f'bisenetv2_fcn_toyclip-balance-zs_{TOY}',
    f'ddrnet_23-slim_in1k-pre_vit-b16-balance-zs_{CAMVID}'
])
def test_balance_is_built_without_files(bare, monkeypatch, name):
    _, model = build(f'balance/textkd_{name}')
    assert type(model.decode_head.conv_seg) is BalancedTextClassifier
    loss, = model.decode_head.text_losses
    assert type(loss) is ImageEmbeddingDistillationLoss
    teacher = model.teacher
    assert type(teacher) is FrozenCLIPTeacher
    assert teacher.tower.out_dims == model.decode_head.text_branch.text.dim
    if 'toyclip' in name:
        # The sizes and the scale are ToyCLIP's, which open_clip reads.
        monkeypatch.undo()
        scale = teacher.tower.network.clip_scale
        assert model.decode_head.conv_seg.clip_scale == pytest.approx(
            scale, rel=1e-3)


@pytest.mark.parametrize('name', [
    f'bisenetv2_fcn_toyclip-zs_{TOY}',
    f'ddrnet_23-slim_in1k-pre_vit-b16-zs_{CAMVID}',
    'dpt_vit-b16_vit-b16_8xb2-160k_ade20k-512x512.py'
])
def test_lseg_is_built_without_files(bare, name):
    cfg, model = build(f'lseg/lseg_{name}')
    head = model.decode_head
    with pytest.raises(RuntimeError, match='tools/encode_text.py'):
        head.text_branch.text()
    assert head.text_branch.unseen == tuple(
        cfg.model.decode_head.text_branch.get('unseen', ()))
    learned = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    learned = {id(p) for g in learned for p in g['params']}
    assert len(list(head.text_branch.regularization.parameters())) == 2
    assert {id(p) for p in head.parameters()} <= learned


@each_case('name, added', [
    ('textkd_bisenetv2_fcn_vit-b16-tgkd', {'decode.loss_text_guided'}),
    ('textkd_ddrnet_23-slim_in1k-pre_vit-b16-segkd',
     {'decode.loss_text_guided', 'decode.loss_text_similarity'}),
    ('ddrnet_23-slim_in1k-pre-kd', {'distill.loss_kd'}),
    ('bisenetv2_fcn-cwd', {'distill.loss_cwd'}),
])
def test_an_iteration_of_distillation(name, added, tmp_path):
    """Losses of the teacher arrive in the network, at the rates of the text.

    The teacher is that of the config, untrained.
    """
    size = (72, 120)
    path = CONFIGS / f'distillation/{name}_{CAMVID}'
    cfg, model_cfg = load_config(path), load_model(path)
    model_cfg.data_preprocessor.size = size
    norm = dict(type='BN')
    model_cfg.backbone.norm_cfg = model_cfg.decode_head.norm_cfg = norm
    classes = model_cfg.decode_head.num_classes
    batch = samples(size, classes)
    if 'tgkd' in name:
        dim = cfg.model.decode_head.text.embeddings.dim
        for sample in batch:
            vectors = torch.randn(classes, dim)
            sample.region_embeddings = InstanceData(
                labels=torch.arange(classes), vectors=vectors)
    else:
        teacher = load_model(Path(model_cfg.teacher.config))
        state = MODELS.build(copy.deepcopy(teacher)).state_dict()
        torch.save(dict(state_dict=state), tmp_path / 'teacher.pth')
        model_cfg.teacher.checkpoint = str(tmp_path / 'teacher.pth')
        Config(dict(model=teacher)).dump(tmp_path / 'teacher.py')
        model_cfg.teacher.config = str(tmp_path / 'teacher.py')
    model = revert_sync_batchnorm(MODELS.build(model_cfg))
    losses = model.loss(torch.randn(2, 3, *size), batch)
    assert {k for k in losses if '_text_' in k or 'distill' in k} == added
    sum(losses[k] for k in added).backward()
    grads = [p.grad for p in model.backbone.parameters()]
    assert sum(g is not None and bool((g != 0).any()) for g in grads) > 10
    # No decay on the factors.
    cfg.model = model_cfg
    factors = [v for n, v in rates(cfg)[1].items() if n.endswith('log_scale')]
    assert all(decay == 0 for _, decay in factors)
