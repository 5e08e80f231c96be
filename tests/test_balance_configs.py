# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The configs of the balance: named, built, trained, and stock beneath."""
import copy
import re

import pytest
from mmengine.config import Config
from mmseg.registry import MODELS
from network_tester import CONFIGS, load_config, offline
from test_configs import NAME

from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.models import (BalancedTextClassifier, FrozenCLIPTeacher,
                                 ImageEmbeddingDistillationLoss)
from mmseg_textkd.text import Vocabulary

pytestmark = pytest.mark.stacks

PATHS = sorted((CONFIGS / 'balance').glob('*.py'))


def twin(path):
    """The config of the same network with text alone."""
    found = CONFIGS / 'textkd' / path.name.replace('-balance-zs_', '_')
    assert found.exists()
    return load_config(found)


def test_all_combinations_are_there():
    assert len(list((CONFIGS / 'balance').rglob('*.py'))) == len(PATHS) == 4
    for network in ('bisenetv2_fcn', 'ddrnet_23-slim'):
        for data in ('camvid', 'toy-scenes'):
            assert sum(network in p.name and data in p.name
                       for p in PATHS) == 1


@pytest.mark.parametrize('path', PATHS, ids=[p.name for p in PATHS])
def test_config_is_its_twin_and_the_balance(path):
    assert re.fullmatch(NAME, path.name)
    cfg, plain = load_config(path), twin(path)
    ours, theirs = ({
        k: v
        for k, v in c.to_dict().items() if not k.startswith('text_')
    } for c in (cfg, plain))
    assert {k
            for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)} == {
                'model', 'custom_hooks', 'train_dataloader', 'val_evaluator',
                'test_evaluator'
            }
    model, base = ours['model'], theirs['model']
    head, other = model.pop('decode_head'), base.pop('decode_head')
    assert model.pop('type') == 'DistilledEncoderDecoder'
    teacher = model.pop('teacher')
    assert base.pop('type') == 'EncoderDecoder' and model == base
    branch, losses = head.pop('text_branch'), head.pop('text_losses')
    # Fixed text, as in zero-shot training with LSeg.
    assert head.pop('text') == other.pop('text')['embeddings']
    assert head == other
    assert ours['custom_hooks'] == [
        dict(type='PromptLearnerHook'),
        dict(type='TeacherHook')
    ]
    # What is hidden is hidden everywhere.
    text = cfg.model.decode_head.text
    names = Vocabulary.from_spec(text.classes).names
    unseen = [names[k] for k in branch['unseen']]
    hide, = (
        t for t in cfg.train_dataloader.dataset.pipeline
        if t.type == 'HideClasses')
    assert hide.classes == branch['unseen'] and branch['bias'] is False
    assert cfg.val_evaluator == cfg.test_evaluator
    assert sorted(cfg.val_evaluator.unseen) == sorted(unseen)
    split = 'lseg/lseg_bisenetv2_fcn_vit-b16-zs_1xb8-10k_camvid-360x480.py'
    if 'toy' in path.name:
        split = 'ebseg/ebseg_toyclip_1xb4-200i_toy-scenes-128x256.py'
    assert sorted(load_config(CONFIGS /
                              split).val_evaluator.unseen) == sorted(unseen)
    # Image tower and text are of one CLIP model.
    assert teacher['type'] == 'FrozenCLIPTeacher'
    assert teacher['model'] == text.build.model
    assert teacher.get('pretrained') == text.build.get('pretrained')
    assert len(losses) == 1 and branch['balance'] == dict(alpha=.3, beta=1.)
    stock, expected = (to_stock_cfg(c).to_dict() for c in (cfg, plain))
    assert stock == expected and 'textkd' not in str(stock)


@pytest.mark.parametrize('path', PATHS, ids=[p.name for p in PATHS])
def test_model_is_built_without_files(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    cfg = copy.deepcopy(load_config(path).model)
    model = MODELS.build(offline(cfg))
    assert type(model.decode_head.conv_seg) is BalancedTextClassifier
    loss, = model.decode_head.text_losses
    assert type(loss) is ImageEmbeddingDistillationLoss
    teacher = model.teacher
    assert type(teacher) is FrozenCLIPTeacher
    assert teacher.tower.out_dims == model.decode_head.text_branch.text.dim
    if 'toyclip' in path.name:
        # The sizes and the scale are ToyCLIP's.
        scale = teacher.tower.network.clip_scale
        assert model.decode_head.conv_seg.clip_scale == pytest.approx(
            scale, rel=1e-3)


def test_optimizer_settings_of_the_projection_do_not_get_into_stock_configs():
    cfg = Config(copy.deepcopy(load_config(PATHS[0]).to_dict()))
    expected = to_stock_cfg(cfg).to_dict()
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    keys['image_projection'] = dict(lr_mult=5.)
    assert to_stock_cfg(cfg).to_dict() == expected
