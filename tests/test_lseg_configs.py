# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The configs of LSeg: named, loaded, built, and a fair protocol."""
import copy
import hashlib
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.datasets import COCOStuffDataset, PascalVOCDataset
from mmseg.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from network_tester import CONFIGS, each_head, load_config, offline
from test_configs import NAME

from mmseg_textkd import stock_config
from mmseg_textkd.text import Vocabulary

pytestmark = pytest.mark.stacks

ALL = sorted((CONFIGS / 'lseg').glob('*.py'))
# With the text encoder of LSeg's authors, and their networks.
PUBLISHED = [p for p in ALL if '_vit-b32_' in p.name]
LSEG = [p for p in ALL if p not in PUBLISHED]
ZERO_SHOT = [p for p in LSEG if '-zs_' in p.name or '-fold' in p.name]
DATA = {
    'camvid': ('CamVidDataset', 'camvid'),
    'toy-scenes': ('ToyScenesDataset', 'toy_scenes'),
    'ade20k': ('ADE20KDataset', 'ade20k'),
    'voc12aug': ('PascalVOCDataset', 'voc12'),
    'pascal-5i': ('PascalVOCDataset', 'voc12'),
    'coco-stuff164k': ('COCOStuffDataset', 'coco_stuff'),
    'coco-20i': ('COCOStuffDataset', 'coco_stuff'),
}
BLOCKS = dict(kind='bottleneck', depth=2, activation='lrelu')


def names(paths):
    return [path.name for path in paths]


def datasets(cfg, split):
    dataset = cfg[f'{split}_dataloader'].dataset
    return dataset.get('datasets', [dataset])


def closed(path):
    """The config of the same network with all classes seen."""
    name = path.name.replace('-zs_', '_')
    for data, base in (('pascal-5i', 'voc12aug'), ('coco-20i',
                                                   'coco-stuff164k')):
        for fold in range(4):
            name = name.replace(f'{data}-fold{fold}', base)
    return path.with_name(name)


def test_all_combinations_are_there():
    assert len(ALL) == len(list((CONFIGS / 'lseg').rglob('*.py'))) == 27
    assert len(PUBLISHED) == 8
    assert len(ZERO_SHOT) == 12
    assert {closed(p)
            for p in ZERO_SHOT} | {
                CONFIGS /
                'lseg/lseg_dpt_vit-b16_vit-b16_8xb2-160k_ade20k-512x512.py'
            } == set(LSEG) - set(ZERO_SHOT)


@pytest.mark.parametrize('path', LSEG, ids=names(LSEG))
def test_name_says_what_it_is(path):
    assert path.name.startswith('lseg_')
    # The regular expression asks for what the text configs have, too.
    name = re.fullmatch(NAME, path.name).groupdict()
    data, _, _ = name['dataset'].partition('-fold')
    kind, vocabulary = DATA[data]
    cfg = load_config(path)
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    iters = int(name['number']) * (1000 if name['unit'] == 'k' else 1)
    assert cfg.train_cfg.max_iters == iters
    assert max(s.end for s in cfg.param_scheduler) == iters
    size = int(name['height']), int(name['width'])
    assert tuple(cfg.model.data_preprocessor.size) == size
    classes = Vocabulary.from_spec(vocabulary).names
    for split in ('train', 'val', 'test'):
        for dataset in datasets(cfg, split):
            assert dataset.type == kind
            assert tuple(DATASETS.get(kind).METAINFO['classes']) == classes
    for head in each_head(cfg.model):
        assert head.num_classes == len(classes)
    text = cfg.model.decode_head.text
    assert text.type == 'ClassEmbeddings' and text.classes == vocabulary
    assert text.build.vocabulary == vocabulary
    tower = 'toyclip' if '_toyclip' in path.name else 'ViT-B-16'
    assert text.build.model == tower


@pytest.mark.parametrize('path', LSEG, ids=names(LSEG))
def test_head_is_lseg_and_the_rest_is_stock(path):
    cfg = load_config(path)
    head = copy.deepcopy(cfg.model.decode_head.to_dict())
    branch = head['text_branch']
    unseen = branch.pop('unseen', None)
    assert (unseen is not None) == (path in ZERO_SHOT)
    assert branch == dict(
        norm='l2',
        bias=False,
        scale=dict(init=1 / 0.07, learnable=False),
        regularization=BLOCKS)
    assert cfg.custom_hooks == [dict(type='PromptLearnerHook')]
    assert cfg.custom_imports.imports == ['mmseg_textkd']
    # Network and optimizer are those of MMSegmentation's own config.
    source = next(
        v for k, v in {
            'bisenetv2':
            'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024',
            'ddrnet':
            'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024',
            'dpt': 'dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512',
        }.items() if f'lseg_{k}' in path.name)
    stock = Config.fromfile(stock_config(f'{source}.py'))
    assert cfg.optim_wrapper == stock.optim_wrapper
    expected = stock.model.decode_head.to_dict()
    assert head.pop('type') == f'Text{expected.pop("type")}'
    skipped = ('num_classes', 'text', 'text_branch', 'loss_decode')
    assert {
        k: v
        for k, v in head.items() if k not in skipped
    } == {
        k: v
        for k, v in expected.items() if k not in skipped
    }
    backbones = [c.model.backbone.to_dict() for c in (cfg, stock)]
    for backbone in backbones if '_toyclip' in path.name else ():
        backbone.pop('init_cfg')
    assert backbones[0] == backbones[1]
    if 'ade20k' in path.name:
        for key in ('param_scheduler', 'train_dataloader', 'val_dataloader',
                    'train_cfg'):
            assert cfg[key] == stock[key]


@pytest.mark.parametrize('path', ZERO_SHOT, ids=names(ZERO_SHOT))
def test_the_same_classes_are_hidden_everywhere(path):
    cfg, base = load_config(path), load_config(closed(path))
    unseen = cfg.model.decode_head.text_branch.unseen
    vocabulary = cfg.model.decode_head.text.classes
    classes = Vocabulary.from_spec(vocabulary).names
    assert 0 < len(unseen) < len(classes) / 2
    for dataset, before in zip(
            datasets(cfg, 'train'), datasets(base, 'train')):
        hide, = (t for t in dataset.pipeline if t.type == 'HideClasses')
        kinds = [t.type for t in dataset.pipeline]
        # Behind what reads the labels, before what looks at them.
        place = kinds.index('HideClasses')
        assert kinds[place - 1] in ('LoadAnnotations', 'CheckLabels')
        labels = torch.arange(len(classes)).byte().numpy()[None]
        hidden = TRANSFORMS.build(hide)(dict(gt_seg_map=labels))['gt_seg_map']
        assert (hidden[0] == 255).nonzero()[0].tolist() == unseen
        assert [t for t in dataset.pipeline
                if t is not hide] == before.pipeline
    for split in ('val', 'test'):
        evaluator = cfg[f'{split}_evaluator']
        assert evaluator.type == 'ZeroShotIoUMetric'
        assert sorted(map(classes.index, evaluator.unseen)) == unseen
        assert METRICS.build(evaluator).unseen == tuple(evaluator.unseen)
        # Evaluated on everything, as in the closed set.
        assert cfg[f'{split}_dataloader'] == base[f'{split}_dataloader']
    ours, theirs = (c.model.to_dict() for c in (cfg, base))
    ours['decode_head']['text_branch'].pop('unseen')
    assert ours == theirs


def test_folds_are_those_of_the_literature():
    """The definitions, from the classes of MMSegmentation's datasets."""
    voc = PascalVOCDataset.METAINFO['classes'][1:]
    things = COCOStuffDataset.METAINFO['classes'][:80]
    assert voc[0] == 'aeroplane' and len(voc) == 20
    assert things[0] == 'person' and things[-1] == 'toothbrush'
    for data, folds in (('pascal-5i', [voc[5 * i:5 * i + 5]
                                       for i in range(4)]),
                        ('coco-20i', [things[i::4] for i in range(4)])):
        for i, fold in enumerate(folds):
            path, = (p for p in LSEG if f'{data}-fold{i}-' in p.name)
            assert tuple(load_config(path).val_evaluator.unseen) == fold


@pytest.mark.parametrize('name', [
    'lseg_bisenetv2_fcn_toyclip-zs_1xb8-200i_toy-scenes-128x256.py',
    'lseg_ddrnet_23-slim_in1k-pre_vit-b16-zs_1xb8-10k_camvid-360x480.py',
    'lseg_dpt_vit-b16_vit-b16_8xb2-160k_ade20k-512x512.py',
])
def test_models_are_built_without_files(monkeypatch, tmp_path, name):
    """One of each network: the others differ in nothing that is built."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config(CONFIGS / 'lseg' / name)
    model = MODELS.build(offline(copy.deepcopy(cfg.model)))
    head = model.decode_head
    with pytest.raises(RuntimeError, match='tools/encode_text.py'):
        head.text.text()
    assert head.text.unseen == tuple(
        cfg.model.decode_head.text_branch.get('unseen', ()))
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    learned = {id(p) for g in optimizer.param_groups for p in g['params']}
    assert len(list(head.text.regularization.parameters())) == 2
    assert {id(p) for p in head.parameters()} <= learned


def published(text):
    return [p for p in PUBLISHED if text in p.name]


@pytest.mark.parametrize('path', PUBLISHED, ids=names(PUBLISHED))
def test_published_network_and_words(path):
    """The words by a digest of the label files of LSeg's authors."""
    digests = {
        'ade20k': '6eb499914339dc1b',
        'pascal-5i': '04d4ed587a6b9973',
        'coco-20i': 'aeed4f18c4db70f4',
        'fss-1000': '6d7eb80b237e02a7',
    }
    cfg = load_config(path)
    backbone, head = cfg.model.backbone, cfg.model.decode_head
    build = head.text.build
    digest = next(v for k, v in digests.items() if k in path.name)
    words = '\n'.join(build.vocabulary.values())
    assert hashlib.sha256(words.encode()).hexdigest().startswith(digest)
    assert (build.model, build.pretrained,
            build.templates) == ('ViT-B-32', 'openai', 'none')
    # What is trained and tested on has these names.
    data = cfg.test_dataloader.dataset
    classes = DATASETS.get(data.type).METAINFO['classes']
    assert tuple(build.vocabulary) == classes
    assert head.text_branch == dict(type='LSegTextClassifier')
    assert head.channels == 256 and head.align_corners
    mean, std = (cfg.model.data_preprocessor[k] for k in ('mean', 'std'))
    if '_r101_' in path.name:
        assert (backbone.depth, backbone.style) == (101, 'pytorch')
        assert mean == [123.675, 116.28, 103.53] and std[0] == 58.395
    else:
        large = '_vit-l16_vit' in path.name
        assert tuple(backbone.out_indices) == ((5, 11, 17, 23) if large else
                                               (2, 5, 8, 11))
        assert backbone.patch_size == head.patch_size == (16 if large else 32)
        assert mean == std == [127.5] * 3
    # 'others' and one class at a time.
    episodes = '-episodes-' in path.name
    assert (head.type == 'LSegEpisodeHead') == episodes
    if episodes:
        assert head.text.num_classes == len(classes)
        assert cfg.test_evaluator.type == 'EpisodeIoUMetric'
    else:
        name = re.fullmatch(NAME, path.name).groupdict()
        assert cfg.train_cfg.max_iters == int(name['number']) * 1000
        assert max(s.end for s in cfg.param_scheduler) == 808000
        # 240 epochs of six of 20210 pictures.
        assert abs(240 * 20210 / 6 - 808000) < 1000


def test_new_layers_of_the_published_network_learn_ten_times_as_fast():
    path, = published('vit-b32_vit-b32')
    cfg = load_config(path)
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys == {
        'decode_head': dict(lr_mult=10.)
    }
    model = MODELS.build(offline(copy.deepcopy(cfg.model)))
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    rates = {id(p): g['lr'] for g in groups for p in g['params']}
    for name, param in model.named_parameters():
        rate = .0025 if name.startswith('decode_head') else .00025
        assert rates[id(param)] == pytest.approx(rate), name
