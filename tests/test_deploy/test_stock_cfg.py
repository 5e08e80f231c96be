# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Stock configs made of text configs."""
import copy
import sys
import types

import pytest
import torch
from each_case import each_case
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.models.decode_heads import ASPPHead, FCNHead
from mmseg.registry import DATASETS, HOOKS, MODELS
from network_tester import CONFIGS, load_config, stock_twin
from tiny import tiny_config

from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.models import TextHeadMixin

TEXT = dict(type='ControlEmbeddings', kind='random', dim=16)
# One of each network; test_configs.py compares all.
TEXTKD = sorted(
    (CONFIGS / 'text_classifier').glob('*_vit-b16_*_cityscapes-*.py'))
CAMVID = (
    CONFIGS / 'text_classifier' /
    'textkd_pidnet-s_vit-b16_1xb8-10k_camvid-360x480.py')


def types_in(value):
    """All types and variables in a config, wherever they are."""
    if isinstance(value, dict):
        return {t for v in value.values() for t in types_in(v)}
    if isinstance(value, (list, tuple)):
        return {t for v in value for t in types_in(v)}
    return {value} if isinstance(value, str) else set()


def untrained(value):
    """The config of a model without weights of pre-training."""
    if isinstance(value, dict):
        return {
            k: None if k == 'pretrained' else untrained(v)
            for k, v in value.items()
            if k != 'init_cfg' or (v or {}).get('type') != 'Pretrained'
        }
    return [untrained(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope='module')
def ours():
    """Names that only the plugin registers."""
    return {
        name
        for registry in (MODELS, DATASETS, HOOKS)
        for name, thing in registry.module_dict.items()
        if thing.__module__.startswith('mmseg_textkd')
    }


@pytest.mark.stacks
@each_case('path', TEXTKD)
def test_text_config_becomes_its_twin(path, ours):
    cfg, twin = load_config(path), load_config(stock_twin(path))
    before = copy.deepcopy(cfg.to_dict())
    stock = to_stock_cfg(cfg)
    assert cfg.to_dict() == before
    assert stock.to_dict() == to_stock_cfg(twin).to_dict()
    # Of the model only the pre-training is not the twin's.
    assert stock.model.to_dict() == untrained(twin.model.to_dict())
    assert stock.optim_wrapper.to_dict() == twin.optim_wrapper.to_dict()
    left = types_in(stock.to_dict())
    assert not left & ours
    assert not any('mmseg_textkd' in t or 'textkd' in t for t in left)
    for key in ('text_provider', 'find_unused_parameters', 'custom_hooks'):
        assert key in cfg and key not in stock
    # Written and read again it is the same, and stays.
    assert to_stock_cfg(stock).to_dict() == stock.to_dict()


@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
@pytest.mark.filterwarnings('ignore:CamVid test has 2 images')
def test_camvid_without_its_dataset(tmp_path, write_camvid, suffix):
    write_camvid(tmp_path, suffix)
    cfg = copy.deepcopy(load_config(CAMVID))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(tmp_path)
    stock = to_stock_cfg(cfg)
    scores = []
    for config in (cfg, stock):
        dataset = DATASETS.build(config.test_dataloader.dataset)
        metric = IoUMetric(**{
            k: v
            for k, v in config.test_evaluator.items() if k != 'type'
        })
        metric.dataset_meta = dataset.metainfo
        generator = torch.Generator().manual_seed(0)
        for i in range(len(dataset)):
            sample = dataset[i]['data_samples']
            labels = sample.gt_sem_seg.data
            guess = torch.randint(0, 11, labels.shape, generator=generator)
            metric.process({}, [
                dict(
                    pred_sem_seg=dict(data=guess),
                    gt_sem_seg=dict(data=labels),
                    img_path='')
            ])
        scores.append(metric.evaluate(len(dataset)))
    assert type(dataset) is BaseSegDataset and len(dataset) == 2
    assert dataset.metainfo['classes'][:2] == ('sky', 'building')
    assert scores[0] == scores[1] and scores[0]['mIoU'] > 0


@each_case('change, message', [
    (dict(ann_file='list.txt'), "CamVidDataset with ['ann_file']"),
    (dict(metainfo=dict(classes=('sky', ))), "with ['metainfo.classes']"),
])
def test_datasets_that_stay_ours_are_refused(change, message):
    cfg = copy.deepcopy(load_config(CAMVID))
    cfg.test_dataloader.dataset.update(change)
    with pytest.raises(ValueError) as error:
        to_stock_cfg(cfg)
    assert message in str(error.value)
    assert str(error.value).startswith('test_dataloader.dataset: ')


def test_what_cannot_be_replaced_is_named(tmp_path):
    cfg = tiny_config(tmp_path, TEXT, {})
    cfg.spare_text = TEXT  # a variable
    assert 'spare_text' not in to_stock_cfg(cfg)
    cfg.model.auxiliary_head = [dict(type='TextAlignmentLoss')]
    with pytest.raises(ValueError) as error:
        to_stock_cfg(cfg)
    assert str(error.value).startswith(
        "model.auxiliary_head[0]: 'TextAlignmentLoss' is defined in "
        'mmseg_textkd.models.losses.text_alignment_loss, which needs')


def test_settings_of_the_user_stay(tmp_path):
    cfg = tiny_config(tmp_path, TEXT, {}, load_from='stock.pth')
    cfg.custom_hooks.append(dict(type='EMAHook'))
    cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    cfg.optim_wrapper.paramwise_cfg.custom_keys['head'] = dict(lr_mult=10.)
    cfg.model_wrapper_cfg = dict(type='CPUDistributedDataParallel')
    cfg.model.backbone.init_cfg = [
        dict(type='Kaiming', layer='Conv2d'),
        dict(type='Pretrained', checkpoint='https://example.com/x.pth')
    ]
    stock = to_stock_cfg(cfg)
    assert stock.custom_hooks == [dict(type='EMAHook')]
    assert stock.optim_wrapper.type == 'OptimWrapper'
    assert stock.optim_wrapper.paramwise_cfg == dict(
        custom_keys=dict(head=dict(lr_mult=10.)))
    assert stock.load_from is None
    assert stock.model.backbone.init_cfg == [
        dict(type='Kaiming', layer='Conv2d')
    ]
    assert 'model_wrapper_cfg' not in stock
    assert 'custom_imports' not in stock
    assert stock.work_dir == cfg.work_dir


def test_text_on_auxiliary_heads_and_in_a_cascade(tmp_path):
    cfg = tiny_config(tmp_path, TEXT)
    head = cfg.model.decode_head
    cfg.model.auxiliary_head = [
        head,
        dict(head, type='FCNHead', text=0),
        dict(
            head,
            role='auxiliary',
            text_branch=dict(norm='l2'),
            text_losses=[dict(type='TextAlignmentLoss')])
    ]
    cfg.model.decode_head = [head, head]
    expected = tiny_config(tmp_path).model.decode_head
    stock = to_stock_cfg(cfg).model
    assert stock.decode_head == [expected, expected]
    assert stock.auxiliary_head == [expected, dict(expected, text=0), expected]
    assert 'auxiliary_head' not in to_stock_cfg(cfg, True).model


@pytest.fixture
def project(monkeypatch):
    """A user's module with a text head, and one without the plugin."""
    heads, plain = types.ModuleType('own_heads'), types.ModuleType('own_data')
    heads.TextHeadMixin = TextHeadMixin
    plain.torch = torch

    def new(module, name, *bases, registry=MODELS):
        cls = type(name, bases, dict(__module__=module.__name__))
        setattr(module, name, cls)
        registry.register_module(module=cls)

    new(heads, 'TextASPPHead', TextHeadMixin, ASPPHead)
    new(heads, 'OwnFCNHead', FCNHead)
    new(heads, 'TextOwnFCNHead', TextHeadMixin, heads.OwnFCNHead)
    mixed = type('Mixed', (), {})
    new(heads, 'TextMixedHead', TextHeadMixin, mixed, FCNHead)
    new(plain, 'OwnDataset', BaseSegDataset, registry=DATASETS)
    new(plain, 'PlainFCNHead', FCNHead)
    new(heads, 'TextPlainFCNHead', TextHeadMixin, plain.PlainFCNHead)
    monkeypatch.setitem(sys.modules, 'own_heads', heads)
    monkeypatch.setitem(sys.modules, 'own_data', plain)
    yield
    for registry in (MODELS, DATASETS):
        for name, thing in list(registry.module_dict.items()):
            if thing.__module__ in ('own_heads', 'own_data'):
                registry.module_dict.pop(name)


def test_heads_of_a_project(project, tmp_path):
    imports = ['mmseg_textkd', 'own_heads', 'own_data']
    cfg = tiny_config(tmp_path, TEXT)
    cfg.custom_imports = dict(imports=imports)
    cfg.train_dataloader.dataset.type = 'OwnDataset'
    for text, base in (('TextASPPHead', 'ASPPHead'), ('TextPlainFCNHead',
                                                      'PlainFCNHead')):
        cfg.model.decode_head.type = text
        stock = to_stock_cfg(cfg)
        assert stock.model.decode_head.type == base
        # What imports the plugin cannot stay, what does not does.
        assert stock.custom_imports.imports == ['own_data']
        assert stock.train_dataloader.dataset.type == 'OwnDataset'
    for text in ('TextOwnFCNHead', 'TextMixedHead'):
        cfg.model.decode_head.type = text
        with pytest.raises(ValueError, match=f'the place of {text}: behind'):
            to_stock_cfg(cfg)
    cfg.model.decode_head.type = 'OwnFCNHead'
    with pytest.raises(ValueError, match="'OwnFCNHead' is defined in own_hea"):
        to_stock_cfg(cfg)


def test_l2_classifiers_keep_their_norm_on_request(tmp_path):
    cfg = tiny_config(tmp_path, TEXT)
    cfg.model.decode_head.text_branch = dict(norm='l2')
    stock = to_stock_cfg(cfg, keep_l2=True)
    expected = tiny_config(tmp_path).model.decode_head
    assert stock.model.decode_head == dict(
        type='L2ConvSegHead', head=expected, dim=16)
    assert stock.custom_imports.imports == ['mmseg_textkd.deploy']
    again = to_stock_cfg(stock, keep_l2=True)
    assert again.to_dict() == stock.to_dict()
    assert to_stock_cfg(cfg).model.decode_head == expected
    with pytest.raises(ValueError, match="'L2ConvSegHead' is defined in mmse"):
        to_stock_cfg(stock)


def test_blocks_and_zero_shot_settings(tmp_path):
    cfg = tiny_config(tmp_path, TEXT)
    blocks = dict(kind='depthwise', depth=1)
    cfg.model.decode_head.text_branch = dict(
        norm='l2', bias=False, unseen=[2], regularization=blocks)
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline.insert(2, dict(type='HideClasses', classes=[2]))
    cfg.val_evaluator = dict(
        type='ZeroShotIoUMetric', iou_metrics=['mIoU'], unseen=['road'])
    stock, expected = to_stock_cfg(cfg, keep_l2=True), tiny_config(tmp_path)
    assert stock.model.decode_head == dict(
        type='L2ConvSegHead',
        head=expected.model.decode_head,
        dim=16,
        regularization=blocks)
    assert stock.train_dataloader == expected.train_dataloader
    assert stock.val_evaluator == expected.val_evaluator
    assert to_stock_cfg(stock, keep_l2=True).to_dict() == stock.to_dict()
    assert to_stock_cfg(cfg).model.decode_head == expected.model.decode_head
