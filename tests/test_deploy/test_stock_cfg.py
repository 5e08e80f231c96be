# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Stock configs made of text configs."""
import copy
import re
import sys
import types

import mmengine
import pytest
import tiny
import torch
from each_case import each_case
from mmengine.config import Config
from mmseg.datasets import BaseSegDataset, CityscapesDataset
from mmseg.models.decode_heads import ASPPHead, FCNHead
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS
from network_tester import CONFIGS, load_config, stock_twin
from tiny import CONTROL, tiny_config

from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.deploy.load_stock import dataset_meta
from mmseg_textkd.models import TextHeadMixin

# One of each network; test_configs.py compares all.
TEXTKD = sorted(
    (CONFIGS / 'text_classifier').glob('*_vit-b16_*_cityscapes-*.py'))
CAMVID = (
    CONFIGS / 'text_classifier' /
    'textkd_pidnet-s_vit-b16_1xb8-10k_camvid-360x480.py')


def untrained(value):
    """The config of a model without weights of pre-training."""
    if isinstance(value, dict):
        return {
            k: None if k == 'pretrained' else untrained(v)
            for k, v in value.items()
            if k != 'init_cfg' or (v or {}).get('type') != 'Pretrained'
        }
    return [untrained(v) for v in value] if isinstance(value, list) else value


@pytest.mark.stacks
@each_case('path', TEXTKD)
def test_text_config_becomes_its_twin(path):
    cfg, twin = load_config(path), load_config(stock_twin(path))
    before = copy.deepcopy(cfg.to_dict())
    stock = to_stock_cfg(cfg)
    assert cfg.to_dict() == before
    assert stock.to_dict() == to_stock_cfg(twin).to_dict()
    # Of the model only the pre-training is not the twin's.
    assert stock.model.to_dict() == untrained(twin.model.to_dict())
    assert stock.optim_wrapper.to_dict() == twin.optim_wrapper.to_dict()
    ours = {
        name
        for registry in (MODELS, DATASETS, HOOKS)
        for name, thing in registry.module_dict.items()
        if thing.__module__.startswith('mmseg_textkd')
    }
    # Types and variables.
    left = set(re.findall(r"'([^']*)'", str(stock.to_dict())))
    assert not left & ours and not any('textkd' in word for word in left)
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
    if suffix == '.jpg':  # as the FAQ has it
        cfg.test_evaluator.type = f'mmseg.{cfg.test_evaluator.type}'
    stock = to_stock_cfg(cfg)
    scores = []
    for config in (cfg, stock):
        dataset = DATASETS.build(config.test_dataloader.dataset)
        metric = METRICS.build(config.test_evaluator)
        metric.dataset_meta = dataset.metainfo
        torch.manual_seed(0)
        for i in range(len(dataset)):
            labels = dict(data=dataset[i]['data_samples'].gt_sem_seg.data)
            guess = dict(data=torch.randint_like(labels['data'], 11))
            metric.process(
                {}, [dict(pred_sem_seg=guess, gt_sem_seg=labels, img_path='')])
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
    message = f'^test_dataloader.dataset: .*{re.escape(message)}'
    with pytest.raises(ValueError, match=message):
        to_stock_cfg(cfg)


@each_case('kind', ['VSPWDataset', 'PASCAL5iEpisodes', 'VideoFramesDataset'])
def test_datasets_of_another_layout_are_refused(kind):
    cfg = copy.deepcopy(load_config(CAMVID))
    cfg.test_dataloader.dataset = dict(
        type=kind, data_root='x', img_suffix='.jpg', seg_map_suffix='.png')
    message = f"^test_dataloader.dataset: '{kind}' is defined in mmseg_textkd"
    with pytest.raises(ValueError, match=message):
        to_stock_cfg(cfg)


def test_unlabeled_pixels_of_one_data_set_of_several():
    cfg = copy.deepcopy(load_config(CAMVID))
    cfg.test_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[cfg.test_dataloader.dataset])
    assert to_stock_cfg(cfg).test_evaluator.ignore_index == 11


def test_names_that_a_dataset_gives_itself(monkeypatch):
    """Not those of the class that it is derived from."""

    class Own(CityscapesDataset):

        def __init__(self, **options):
            super().__init__(metainfo=dict(classes=['road', 'car']), **options)

    monkeypatch.setitem(DATASETS.module_dict, 'OwnDataset', Own)
    # Nor is what reads its images needed for them.
    pipeline = [dict(type='LoadSingleRSImageFromFile')]
    dataset = dict(type='OwnDataset', pipeline=pipeline)
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    meta = dataset_meta(cfg, dict(classes=('road', 'car')))
    assert meta == dict(classes=('road', 'car'))
    with pytest.raises(ValueError, match="1: 'bus' in the checkpoint, 'car'"):
        dataset_meta(cfg, dict(classes=('road', 'bus')))


def test_what_runs_beside_the_network_is_no_obstacle(tmp_path):
    """Hooks go, metrics of one data set become the stock one."""
    cfg = tiny_config(tmp_path)
    ours = {
        registry: [
            name for name, thing in registry.module_dict.items()
            if thing.__module__.startswith('mmseg_textkd.')
        ]
        for registry in (HOOKS, METRICS, OPTIM_WRAPPERS)
    }
    assert all(ours.values())
    cfg.custom_hooks = [dict(type=name) for name in ours[HOOKS]]
    assert 'custom_hooks' not in to_stock_cfg(cfg)
    own = dict(VideoConsistencyMetric=dict(windows=[8]))
    for name in {*ours[METRICS]} - {'DatasetIoUMetric', 'EpisodeIoUMetric'}:
        metric = dict(type=name, iou_metrics=['mIoU'], **own.get(name, {}))
        cfg.test_evaluator = metric
        stock = to_stock_cfg(cfg).test_evaluator
        assert stock == dict(type='IoUMetric', iou_metrics=['mIoU'])
    for name in ours[OPTIM_WRAPPERS]:
        cfg.optim_wrapper.type = name
        assert to_stock_cfg(cfg).optim_wrapper.type == 'OptimWrapper'


def test_datasets_of_the_user_are_theirs(monkeypatch):
    """Nobody knows what one does that is made where the plugin is used."""
    module = types.ModuleType('own_data')
    module.TextHeadMixin = TextHeadMixin
    monkeypatch.setitem(sys.modules, 'own_data', module)

    class OwnData(BaseSegDataset):
        METAINFO = dict(classes=('a', 'b'))

        def __init__(self, img_suffix='.jpg', **kwargs):
            super().__init__(img_suffix, reduce_zero_label=True, **kwargs)

    OwnData.__module__ = 'own_data'
    monkeypatch.setitem(DATASETS.module_dict, 'OwnData', OwnData)
    cfg = copy.deepcopy(load_config(CAMVID))
    cfg.custom_imports.imports.append('own_data')
    cfg.test_dataloader.dataset = dict(type='OwnData')
    message = "^test_dataloader.dataset: 'OwnData' is defined in own_data,"
    with pytest.raises(ValueError, match=message):
        to_stock_cfg(cfg)


def test_what_cannot_be_replaced_is_named(tmp_path):
    cfg = tiny_config(tmp_path, CONTROL, {})
    cfg.spare_text = CONTROL  # a variable
    assert 'spare_text' not in to_stock_cfg(cfg)
    cfg.model.auxiliary_head = [dict(type='TextAlignmentLoss')]
    message = (
        r"^model.auxiliary_head\[0\]: 'TextAlignmentLoss' is defined in "
        'mmseg_textkd.models.losses.text_alignment_loss, which needs')
    with pytest.raises(ValueError, match=message):
        to_stock_cfg(cfg)


def test_settings_of_the_user_stay(tmp_path):
    cfg = tiny_config(tmp_path, CONTROL, {}, load_from='stock.pth')
    cfg.custom_hooks.append(dict(type='EMAHook'))
    cfg.optim_wrapper.type = 'CPUAmpOptimWrapper'
    keys = {
        name: dict(lr_mult=10.)
        for name in ('head', 'backbone.context_branch_layers')
    }
    cfg.optim_wrapper.paramwise_cfg.custom_keys.update(keys)
    cfg.model_wrapper_cfg = dict(type='CPUDistributedDataParallel')
    kaiming = dict(type='Kaiming', layer='Conv2d')
    trained = dict(type='Pretrained', checkpoint='https://example.com/x.pth')
    cfg.model.backbone.init_cfg = [kaiming, trained]
    stock = to_stock_cfg(cfg)
    assert stock.custom_hooks == [dict(type='EMAHook')]
    assert stock.optim_wrapper.type == 'OptimWrapper'
    assert stock.optim_wrapper.paramwise_cfg == dict(custom_keys=keys)
    assert stock.load_from is None
    assert stock.model.backbone.init_cfg == [kaiming]
    assert 'model_wrapper_cfg' not in stock
    assert 'custom_imports' not in stock
    assert stock.work_dir == cfg.work_dir


def test_text_on_auxiliary_heads_and_in_a_cascade(tmp_path):
    cfg = tiny_config(tmp_path, CONTROL)
    head = cfg.model.decode_head
    beside = dict(head, role='auxiliary', text_branch=dict(norm='l2'))
    beside['text_losses'] = [dict(type='TextAlignmentLoss')]
    plain = dict(head, type='FCNHead', text=0)
    cfg.model.auxiliary_head = [head, plain, beside]
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
    new(heads, 'TextChangedHead', TextHeadMixin, FCNHead)
    heads.TextChangedHead.forward = lambda self, x: x
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
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.custom_imports = dict(imports=imports)
    cfg.train_dataloader.dataset.type = 'OwnDataset'
    for base in ('ASPPHead', 'PlainFCNHead'):
        cfg.model.decode_head.type = f'Text{base}'
        stock = to_stock_cfg(cfg)
        assert stock.model.decode_head.type == base
        # What imports the plugin cannot stay, what does not does.
        assert stock.custom_imports.imports == ['own_data']
        assert stock.train_dataloader.dataset.type == 'OwnDataset'
    for text, message in [
        ('TextOwnFCNHead', 'the place of TextOwnFCNHead: behind'),
        ('TextMixedHead', 'the place of TextMixedHead: behind'),
        ('OwnFCNHead', "'OwnFCNHead' is defined in own_hea"),
        ('TextChangedHead', r"from its stock head in \['forward'\]"),
        ('LSegDPTHead', r"from its stock head in \['__init__'\]"),
    ]:
        cfg.model.decode_head.type = text
        with pytest.raises(ValueError, match=message):
            to_stock_cfg(cfg)


def test_heads_in_packages(project, monkeypatch, tmp_path):
    """However `custom_imports` reaches them."""
    package, heads = (types.ModuleType(n) for n in ('own', 'own.heads'))
    parts, other = (types.ModuleType(n) for n in ('own.parts', 'other'))
    package.heads, package.parts = heads, parts
    text = type('TextHead', (TextHeadMixin, ASPPHead),
                dict(__module__='own.heads'))
    plain = type('PartHead', (FCNHead, ), dict(__module__='own.parts'))
    heads.TextHead, parts.PartHead, other.TextHead = text, plain, text
    for module in (package, heads, parts, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for thing in (text, plain):
        monkeypatch.setitem(MODELS.module_dict, thing.__name__, thing)
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.model.decode_head.type = 'TextHead'
    cfg.model.auxiliary_head = dict(tiny.HEAD, type='PartHead')
    said = []
    monkeypatch.setattr('mmseg_textkd.deploy.stock_cfg.print_log',
                        lambda message, *args: said.append(message))
    # A package that imports the head, or a module that exports it again.
    for imports, kept in ((['own'], ['own']), (['other', 'own'], ['own']),
                          (['own.parts', 'own.heads'], ['own.parts'])):
        cfg.custom_imports = dict(imports=['mmseg_textkd', *imports])
        stock = to_stock_cfg(cfg)
        assert stock.model.decode_head.type == 'ASPPHead'
        assert stock.model.auxiliary_head.type == 'PartHead'
        assert stock.custom_imports.imports == kept
        # What is imported with the head cannot be had without the plugin.
        assert f'imports {kept}, and mmseg_textkd with them' in said.pop()
    del package.heads
    assert to_stock_cfg(cfg).custom_imports.imports == kept and not said


def test_what_the_plugin_puts_into_mmengine_is_no_import(
        project, monkeypatch, tmp_path):
    """Its own functions are in the place of some."""
    module = types.ModuleType('own_utils')
    module.is_installed = mmengine.utils.is_installed
    assert module.is_installed.__module__ == 'mmseg_textkd.compat'
    monkeypatch.setitem(sys.modules, 'own_utils', module)
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.custom_imports = dict(imports=['mmseg_textkd', 'own_utils'])
    assert to_stock_cfg(cfg).custom_imports.imports == ['own_utils']


@each_case('more', [{}, dict(regularization=dict(kind='depthwise', depth=1))])
def test_l2_classifiers_keep_their_norm_and_blocks_on_request(tmp_path, more):
    """And what belongs to zero-shot settings goes."""
    cfg = tiny_config(tmp_path, CONTROL)
    cfg.model.decode_head.text_branch = dict(
        norm='l2', bias=False, unseen=[2], **more)
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline.insert(2, dict(type='HideClasses', classes=[2]))
    cfg.val_evaluator.update(type='ZeroShotIoUMetric', unseen=['road'])
    stock, expected = to_stock_cfg(cfg, keep_l2=True), tiny_config(tmp_path)
    head = expected.model.decode_head
    kept = dict(type='L2ConvSegHead', head=head, dim=16, **more)
    assert stock.model.decode_head == kept
    assert stock.custom_imports.imports == ['mmseg_textkd.deploy']
    assert stock.train_dataloader == expected.train_dataloader
    assert stock.val_evaluator == expected.val_evaluator
    assert to_stock_cfg(stock, keep_l2=True).to_dict() == stock.to_dict()
    assert to_stock_cfg(cfg).model.decode_head == head
    with pytest.raises(ValueError, match="'L2ConvSegHead' is defined in mmse"):
        to_stock_cfg(stock)
