# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Every config that is shipped: its name, its classes, its fair twin.

What is built, optimized and trained does not depend on the data set; that is
tested once per network (``test_networks.py``) and method
(``test_methods.py``).
"""
import copy
import functools
import hashlib
import itertools
import os.path as osp
import re
from pathlib import Path
from typing import Callable, NamedTuple, Set

import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmseg.datasets import COCOStuffDataset, PascalVOCDataset
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS, TRANSFORMS
from network_tester import (CONFIGS, each_head, load_config, offline, rates,
                            stock_twin)

from mmseg_textkd import stock_config
from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.text import Vocabulary

pytestmark = pytest.mark.stacks

NAME = re.compile(
    r'(?P<network>[a-z0-9-]+(_[a-z0-9-]+)*)'
    r'_(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<number>\d+)(?P<unit>k|i)'
    r'_(?P<dataset>[a-z0-9-]+?)(-fold\d)?-(?P<height>\d+)x(?P<width>\d+)')
# Data set in a name: its class, and the vocabulary.
DATA = {
    'ade20k': ('ADE20KDataset', 'ade20k'),
    'bdd100k': ('BDD100KDataset', 'bdd100k'),
    'camvid': ('CamVidDataset', 'camvid'),
    'camvid-trainval': ('CamVidDataset', 'camvid'),
    'cityscapes': ('CityscapesDataset', 'cityscapes'),
    'coco-20i': ('COCOStuffDataset', 'coco_stuff'),
    'coco-stuff164k': ('COCOStuffDataset', 'coco_stuff'),
    'mapillary-v1': ('MapillaryDataset_v1', 'mapillary_v1'),
    'pascal-5i': ('PascalVOCDataset', 'voc12'),
    'toy-scenes': ('ToyScenesDataset', 'toy_scenes'),
    'voc12aug': ('PascalVOCDataset', 'voc12'),
}
CLIP = {'rn50': 'RN50', 'toyclip': 'toyclip', 'vit-b16': 'ViT-B-16'}
SPLITS = ('train', 'val', 'test')
# Networks that there are configs of on every data set.
FOUR = {
    'bisenetv2_fcn', 'stdc1_in1k-pre', 'ddrnet_23-slim_in1k-pre', 'pidnet-s'
}


class Method(NamedTuple):
    """What a config is called, and all that it may change of its twin.

    Attributes:
        tag: How its name ends, or what it is.
        folder: Folder of the configs.
        twin: Folder of their twins.
        number: How many there are.
        check: What else is tested of each config and its twin.
        changes: Keys that differ, the only ones, each in every config. Those
            of fragments, which begin with ``text_``, do not count.
    """
    tag: str
    folder: str
    twin: str
    number: int
    check: Callable
    changes: Set[str]


# EBSeg's and those of several data sets have tests of their own.
PATHS = sorted(
    path for path in CONFIGS.rglob('*.py')
    if path.relative_to(CONFIGS).parts[0] not in (
        '_base_', 'ebseg', 'multi_dataset') and '_vit-b32_' not in path.name)
STOCK = [path for path in PATHS if path.parent.name == 'stock']


def parts(path):
    """The parts of a config's name."""
    match = NAME.fullmatch(path.stem)
    assert match, f'{path.name} is no name of a config'
    return match.groupdict()


def method_of(path):
    """What a config that is not stock trains with."""
    folder, network = path.parent.name, parts(path)['network']
    tags = [m.tag for m in METHODS.values() if m.folder == folder]
    tags = [tag for tag in tags if re.search(f'[-_]{tag}$', network)]
    if tags:
        return max(tags, key=len)
    if folder == 'lseg':
        dpt = network.startswith('lseg_dpt')
        return 'fold' if '-fold' in path.name else 'lseg' + '-dpt' * dpt
    return 'text'


def twin_of(path):
    """The config that a method is compared with."""
    tag, name = method_of(path), path.name
    if METHODS[tag].twin == 'stock' and METHODS[tag].folder in TEXT_FOLDERS:
        return stock_twin(path)
    if tag == 'lseg':
        return stock_twin(path, 'lseg_')
    if tag == 'lseg-dpt':
        return stock_config('dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py')
    if tag == 'fold':
        name = re.sub(r'-fold\d', '', name).replace('pascal-5i', 'voc12aug')
        name = name.replace('coco-20i', 'coco-stuff164k')
    else:
        name = name.replace(f'-{tag.split("-score-map-")[-1]}_', '_')
    return CONFIGS / METHODS[tag].twin / name


def differences(ours, twin, key=''):
    """Keys at which two configs differ; a section that is missing is empty."""
    if isinstance(ours, dict) or isinstance(twin, dict):
        ours, twin = ({} if c is None else c for c in (ours, twin))
    if not (isinstance(ours, dict) and isinstance(twin, dict)):
        return set() if ours == twin else {key}
    return {
        found
        for k in {*ours, *twin}
        for found in differences(
            ours.get(k), twin.get(k), f'{key}/{k}' if key else str(k))
    }


def datasets(cfg, split):
    """The configs of all datasets behind a data loader."""
    dataset = cfg[f'{split}_dataloader'].dataset
    return dataset.get('datasets', [dataset])


def kinds(pipeline):
    return [transform['type'] for transform in pipeline]


def text_of(cfg):
    """The config of the class embeddings, if there is one."""
    text = cfg.model.get('score_map', cfg.model.decode_head).get('text')
    return text and text.get('embeddings', text)


@functools.cache
def rates_on_cityscapes(network):
    paths = (CONFIGS / 'text_classifier').glob('*_cityscapes-*.py')
    path, = (p for p in paths if parts(stock_twin(p))['network'] == network)
    keys = load_config(path).optim_wrapper.paramwise_cfg.custom_keys
    return keys['.text.'], keys['log_scale']


def check_text(cfg, twin, path):
    head, plain = (c.model.decode_head for c in (cfg, twin))
    assert head.type == f'Text{plain.type}', path
    check_learned(cfg, twin, path)


def check_learned(cfg, twin, path):
    """The text learns, at the rates of the network, in a second stage."""
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    # The optimizer of each network is tested on Cityscapes.
    if 'toy' not in path.name:
        network = parts(twin_of(path))['network'].split('_camvid-pre')[0]
        found = keys['.text.'], keys['log_scale']
        assert found == rates_on_cityscapes(network), path
    hook, = (h for h in cfg.custom_hooks if h.type == 'PromptLearnerHook')
    assert 0 < hook.switch_at < 1
    assert HOOKS.build(hook).switch_at == hook.switch_at
    assert cfg.find_unused_parameters is True
    kind = 'Control' if '_random_' in path.name else 'Class'
    assert text_of(cfg).type == f'{kind}Embeddings', path


def check_text_fixed(cfg, twin, path):
    hook, = cfg.custom_hooks
    assert hook == dict(type='PromptLearnerHook', switch_at=None), path
    assert text_of(cfg).type == 'ClassEmbeddings', path
    assert cfg.model.decode_head.type == f'Text{twin.model.decode_head.type}'


def check_score_map(cfg, twin, path):
    assert cfg.model.type == 'TextKD' and twin.model.type == 'EncoderDecoder'
    check_learned(cfg, twin, path)


def check_fixed(cfg, twin, path):
    assert cfg.custom_hooks == [dict(type='PromptLearnerHook')], path
    assert text_of(cfg).type == 'ClassEmbeddings', path
    assert cfg.model.type in ('TextKD', twin.model.type), path


def check_published_stage2(cfg, twin, path):
    """Contexts of 11 vectors a class, spared decay; the trunk alone rests."""
    hook, = cfg.custom_hooks
    assert (hook.switch_at, hook.freeze_norm) == (0, False), path
    assert hook.learn == {r'^backbone\.backbone\.': 0., '.': 1.}, path
    text = cfg.model.score_map.text
    assert text.type == 'ContextPromptLearner' and text.class_specific, path
    assert text.embeddings == twin.model.score_map.text, path
    assert text.model == text.embeddings.build.model, path
    assert (text.context_length, text.suffix) == (16, ''), path
    number = cfg.model.decode_head.num_classes
    learner = MODELS.build(dict(text, num_classes=number))
    assert learner.context.shape == (number, 11, 512), path
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert keys['.text.'].decay_mult == 0 and cfg.find_unused_parameters, path
    assert '-decoder' not in path.name or cfg.model.score_map.convs == [
        'decode_head.convs.0.conv'
    ]


def check_two_stages(cfg, twin, path):
    """The two configs of one stage each, one after the other."""
    name = path.name.replace('2stages_', 'stage2_').replace('20k', '10k')
    second = load_config(path.with_name(name))
    hook, = cfg.custom_hooks
    other, = second.custom_hooks
    assert (hook.switch_at, hook.load_best) == (0.5, True), path
    assert cfg.default_hooks.checkpoint.save_best == 'mIoU', path
    assert hook.learn == other.learn, path
    assert hook.freeze_norm == other.freeze_norm, path
    assert cfg.model == second.model, path
    assert cfg.optim_wrapper == second.optim_wrapper, path
    # The hook's schedulers count iterations from the switch.
    assert cfg.param_scheduler == second.param_scheduler, path
    assert len(hook.param_scheduler) == len(second.param_scheduler) == 2
    for ours, theirs in zip(hook.param_scheduler, second.param_scheduler):
        span = dict(begin=0, by_epoch=False, end=ours.get('end', 10000))
        assert dict(ours, **span) == theirs, path


def check_auxiliary(cfg, twin, path):
    assert cfg.model.decode_head.role == 'auxiliary'
    assert cfg.custom_hooks == twin.auxiliary_hooks


def check_structure(cfg, twin, path):
    loss, = cfg.model.decode_head.text_losses
    assert loss.type == 'SemanticStructureLoss', path


def check_synonyms(cfg, twin, path):
    assert text_of(cfg).type == 'SynonymSampler', path
    assert text_of(twin).type == 'ClassEmbeddings', path


def check_fusion(kind, use=None):

    def check(cfg, twin, path):
        # It is no network of its own: every default is that of the class.
        expected = dict(type=kind, use=use) if use else dict(type=kind)
        assert cfg.model.decode_head.fusion == expected, path
        if use == 'inference':
            with pytest.raises(ValueError, match='model.decode_head: a TwoWa'):
                to_stock_cfg(cfg)

    return check


def check_regions(cfg, twin, path):
    pipeline = cfg.train_dataloader.dataset.pipeline
    before = kinds(twin.train_dataloader.dataset.pipeline)
    before[-1:], before[2:2] = ['PackRegionInputs'], ['LoadRegionEmbeddings']
    assert kinds(pipeline) == before, path
    # The image encoder is that of the text.
    build, store = text_of(cfg).build, TRANSFORMS.build(pipeline[2]).store
    assert store.model == build.model
    assert store.pretrained == build.get('pretrained')
    assert store.options['fill'] == 128


def check_segmentor(cfg, twin, path):
    assert cfg.custom_hooks[-1] == dict(type='TeacherHook'), path
    assert cfg.model.type == 'DistilledEncoderDecoder'
    teacher = cfg.model.teacher
    assert Path(teacher.config).stem in teacher.checkpoint, path
    # Of the same data.
    taught = load_config(Path(teacher.config)).train_dataloader.dataset
    assert taught.data_root == cfg.train_dataloader.dataset.data_root, path


def check_unseen(cfg, twin, path):
    """The same classes are hidden everywhere."""
    unseen = cfg.model.decode_head.text_branch.unseen
    classes = Vocabulary.from_spec(text_of(cfg).classes).names
    assert 0 < len(unseen) < len(classes) / 2
    pipelines = ([d.pipeline for d in datasets(c, 'train')]
                 for c in (cfg, twin))
    for pipeline, before in zip(*pipelines):
        hide, = (t for t in pipeline if t.type == 'HideClasses')
        # Behind what reads the labels, before what looks at them.
        kind = pipeline[pipeline.index(hide) - 1].type
        assert kind in ('LoadAnnotations', 'CheckLabels'), path
        labels = torch.arange(len(classes)).byte().numpy()[None]
        hidden = TRANSFORMS.build(hide)(dict(gt_seg_map=labels))['gt_seg_map']
        assert (hidden[0] == 255).nonzero()[0].tolist() == unseen, path
        assert [t for t in pipeline if t is not hide] == before, path
    for split in ('val', 'test'):
        evaluator = cfg[f'{split}_evaluator']
        assert evaluator.type == 'ZeroShotIoUMetric', path
        assert sorted(map(classes.index, evaluator.unseen)) == unseen, path
        assert METRICS.build(evaluator).unseen == tuple(evaluator.unseen)


def check_balance(cfg, twin, path):
    check_unseen(cfg, twin, path)
    head, teacher = cfg.model.decode_head, cfg.model.teacher
    assert cfg.model.type == 'DistilledEncoderDecoder'
    # Fixed text, as in zero-shot training with LSeg.
    assert head.text == text_of(twin), path
    assert head.text_branch.bias is False and len(head.text_losses) == 1
    assert head.text_branch.balance == dict(alpha=.3, beta=1.)
    hooks = [dict(type='PromptLearnerHook'), dict(type='TeacherHook')]
    assert cfg.custom_hooks == hooks, path
    split = 'lseg/lseg_bisenetv2_fcn_vit-b16-zs_1xb8-10k_camvid-360x480.py'
    if 'toy' in path.name:
        split = 'ebseg/ebseg_toyclip_1xb4-200i_toy-scenes-128x256.py'
    unseen = load_config(CONFIGS / split).val_evaluator.unseen
    assert sorted(unseen) == sorted(cfg.val_evaluator.unseen), path
    # Image encoder and text are of one CLIP model.
    assert teacher.type == 'FrozenCLIPTeacher'
    for key in ('model', 'pretrained'):
        assert teacher.get(key) == head.text.build.get(key), path


def check_lseg(cfg, twin, path):
    """The head is the article's; network and optimizer are stock."""
    head, plain = (
        copy.deepcopy(c.model.decode_head.to_dict()) for c in (cfg, twin))
    assert head.pop('text')['type'] == 'ClassEmbeddings', path
    blocks = dict(kind='bottleneck', depth=2, activation='lrelu')
    scale = dict(init=1 / 0.07, learnable=False)
    branch = dict(norm='l2', bias=False, scale=scale, regularization=blocks)
    assert head.pop('text_branch') == branch
    assert head.pop('type') == f'Text{plain.pop("type")}', path
    assert cfg.custom_hooks == [dict(type='PromptLearnerHook')]
    assert cfg.optim_wrapper == twin.optim_wrapper, path
    same = 'ade20k' in path.name
    for key in ('num_classes', 'loss_decode') if not same else ():
        assert head.pop(key) and plain.pop(key)
    assert head == plain, path
    assert cfg.model.backbone == twin.model.backbone, path
    for key in ('param_scheduler', 'train_dataloader', 'val_dataloader',
                'train_cfg') if same else ():
        assert cfg[key] == twin[key], key


HEAD, TRAIN = 'model/decode_head', 'train_dataloader/dataset'
HEAD_TEXT, BRANCH = f'{HEAD}/text', f'{HEAD}/text_branch'
LOSSES, PEERS = f'{HEAD}/text_losses', 'model/distill_losses'
KEYS = 'optim_wrapper/paramwise_cfg/custom_keys/'
UNUSED = 'find_unused_parameters'
TEACHER = {'model/type', 'model/teacher', 'custom_hooks'}
UNSEEN = {TRAIN, 'val_evaluator', 'test_evaluator'}
LEARN = {f'{KEYS}.text.', 'custom_hooks', UNUSED}
RULES = {*LEARN, f'{KEYS}log_scale', 'auxiliary_hooks'}
MAP = {'model/type', 'model/score_map'}
MAP_TEXT = {'model/score_map/text', *LEARN}
MAP_CONVS = 'model/score_map/convs'
TEXT = {f'{HEAD}/type', HEAD_TEXT, *RULES}
COSINE = {f'{HEAD}/type', HEAD_TEXT, BRANCH, 'custom_hooks'}
BALANCE = {HEAD_TEXT, BRANCH, LOSSES, *TEACHER, *UNSEEN}
ZERO_SHOT = {f'{BRANCH}/unseen', *UNSEEN}
SYNONYMS, FUSION = {f'{HEAD_TEXT}/embeddings'}, {f'{HEAD}/fusion'}
ALL, TEXTKD, DISTILL = 'text_classifier', 'textkd', 'distillation'
bridge = check_fusion('TwoWayBridge')
bridge_kept = check_fusion('TwoWayBridge', 'inference')
context = check_fusion('ContextAwareText')
METHODS = [
    Method('text', ALL, 'stock', 53, check_text, TEXT),
    # Of released models: trained on a CPU, or fine-tuned.
    Method('fixed', ALL, 'stock', 2, check_text_fixed, TEXT),
    Method('camvid-pre_vit-b16', ALL, 'stock', 1, check_text,
           {*TEXT, 'load_from'}),
    Method('aux', ALL, ALL, 1, check_auxiliary,
           {f'{HEAD}/role', 'custom_hooks'}),
    Method('score-map', TEXTKD, 'stock', 10, check_score_map, MAP | RULES),
    # Stage 1 of the authors': the text is fixed.
    Method('rn50-score-map', TEXTKD, 'stock', 7, check_fixed,
           {*MAP, 'custom_hooks'}),
    Method('rn50-score-map-decoder', TEXTKD, TEXTKD, 1, check_fixed,
           {MAP_CONVS}),
    Method('rn50-score-map-stage2', TEXTKD, TEXTKD, 7, check_published_stage2,
           MAP_TEXT),
    Method('rn50-score-map-decoder-stage2', TEXTKD, TEXTKD, 1,
           check_published_stage2, {*MAP_TEXT, MAP_CONVS}),
    Method('rn50-score-map-2stages', TEXTKD, 'stock', 1, check_two_stages,
           {*MAP, *LEARN, 'param_scheduler'}),
    Method('rn50-cosine', TEXTKD, 'stock', 1, check_fixed, COSINE),
    Method('ssc', 'structure', ALL, 3, check_structure, {LOSSES}),
    Method('syn', 'diversification', ALL, 3, check_synonyms, SYNONYMS),
    Method('bridge', 'fusion', ALL, 3, bridge, FUSION),
    Method('bridge-kept', 'fusion', ALL, 3, bridge_kept, FUSION),
    Method('context', 'fusion', ALL, 3, context, FUSION),
    Method('tgkd', DISTILL, ALL, 3, check_regions, {LOSSES, TRAIN}),
    Method('segkd', DISTILL, ALL, 4, check_segmentor, {LOSSES, *TEACHER}),
    Method('kd', DISTILL, 'stock', 3, check_segmentor, {PEERS, *TEACHER}),
    Method('cwd', DISTILL, 'stock', 3, check_segmentor, {PEERS, *TEACHER}),
    Method('balance-zs', 'balance', ALL, 4, check_balance, BALANCE),
    Method('lseg', 'lseg', 'stock', 3, check_lseg,
           {*COSINE, 'auxiliary_hooks', UNUSED}),
    # Their twin is MMSegmentation's, on ADE20K.
    Method('lseg-dpt', 'lseg', '', 3, check_lseg, set()),
    Method('zs', 'lseg', 'lseg', 3, check_unseen, ZERO_SHOT),
    Method('fold', 'lseg', 'lseg', 8, check_unseen, ZERO_SHOT),
]
METHODS = {method.tag: method for method in METHODS}
# What stays a part of the network.
KEPT = ('bridge-kept', *(t for t in METHODS if 'score-map' in t))
TEXT_FOLDERS = (ALL, TEXTKD)
BY_METHOD = {tag: [] for tag in METHODS}
for path in PATHS:
    if path not in STOCK:
        BY_METHOD[method_of(path)].append(path)


def test_every_config_is_of_a_method():
    for tag, paths in BY_METHOD.items():
        assert len(paths) == METHODS[tag].number, tag
    assert len(PATHS) == len(STOCK) + sum(map(len, BY_METHOD.values()))
    folders = {p.name for p in CONFIGS.iterdir() if p.is_dir()}
    others = {'_base_', 'ebseg', 'multi_dataset', 'stock', 'studies'}
    assert folders == others | {m.folder for m in METHODS.values()}


def test_all_combinations_are_there():
    """CamVid and Cityscapes for all networks, the others for four."""

    def combinations(paths):
        return {(parts(p)['network'], parts(p)['dataset']) for p in paths}

    toys = {(n, 'toy-scenes') for n in ('bisenetv2_fcn', 'ddrnet_23-slim')}
    stock = {twin_of(p) for p in BY_METHOD['text'] if '_random_' not in p.name}
    networks = {network for network, _ in combinations(stock) - toys}
    some = {'camvid-trainval', 'toy-scenes', 'pascal-5i', 'coco-20i'}
    assert len(networks) == 15 and len(stock) == 52
    assert combinations(stock) == toys | {
        *itertools.product(networks, ('camvid', 'cityscapes')),
        *itertools.product(FOUR,
                           set(DATA) - some)
    }
    # No other network without text is there but for the published score map
    # and released models.
    scored, released = ({
        twin_of(p)
        for p in (*BY_METHOD[one], *BY_METHOD[other])
    } for one, other in (('score-map', 'rn50-score-map'),
                         ('fixed', 'camvid-pre_vit-b16')))
    longer = {p for p in STOCK if p not in stock | scored | released}
    assert combinations(longer) <= combinations(scored)
    # A method is there on CamVid for two networks or more, and on the toy.
    for tag, method in METHODS.items():
        if method.folder not in (*TEXT_FOLDERS, 'lseg') or tag in ('lseg',
                                                                   'zs'):
            found = [parts(p)['dataset'] for p in BY_METHOD[tag]]
            assert found.count('camvid') > 1 and 'toy-scenes' in found, tag


def test_names_say_what_they_are():
    for path in PATHS:
        name, cfg = parts(path), load_config(path)
        assert cfg.train_dataloader.batch_size == int(name['batch']), path
        assert int(name['gpus']) > 0
        iters = int(name['number']) * (1000 if name['unit'] == 'k' else 1)
        assert cfg.train_cfg.max_iters == iters, path
        # With two stages, the schedule is that of the first.
        stages = 2 if '-2stages' in path.name else 1
        assert max(s.end for s in cfg.param_scheduler) == iters / stages, path
        size = int(name['height']), int(name['width'])
        assert tuple(cfg.model.data_preprocessor.size) == size, path
        for dataset in datasets(cfg, 'train'):
            assert dataset.type == DATA[name['dataset']][0], path
            crops = [t for t in dataset.pipeline if t.type == 'RandomCrop']
            assert all(tuple(t.crop_size) == size for t in crops), path
            assert crops or name['dataset'] == 'toy-scenes', path
        assert cfg.custom_imports.imports == ['mmseg_textkd'], path


def test_best_checkpoint_is_chosen_by_what_is_measured():
    """MMEngine finds out at the first validation only."""
    for path in [*PATHS, *sorted(CONFIGS.glob('multi_dataset/*.py'))]:
        cfg = load_config(path)
        best = cfg.default_hooks.checkpoint.get('save_best')
        evaluators = cfg.val_evaluator
        if not isinstance(evaluators, list):
            evaluators = [evaluators]
        metrics = [METRICS.build(evaluator) for evaluator in evaluators]
        found = {f'{m.prefix}/mIoU' if m.prefix else 'mIoU' for m in metrics}
        assert best in {None, *found}, path


def test_classes_are_the_same_everywhere():
    for path in PATHS:
        cfg = load_config(path)
        found = [d for s in SPLITS for d in datasets(cfg, s)]
        found = [
            d.get('metainfo') or DATASETS.get(d.type).METAINFO for d in found
        ]
        classes, = {tuple(d['classes']) for d in found}
        # Heads with fewer predict boundaries.
        numbers = {head.num_classes for head in each_head(cfg.model)}
        assert {n for n in numbers if n > 2} == {len(classes)}, path
        for head in each_head(cfg.model):
            losses = head.loss_decode
            for loss in losses if isinstance(losses, list) else [losses]:
                weights = loss.get('class_weight') or classes
                assert len(weights) == len(classes), path
        text = text_of(cfg)
        named = path.name.startswith(('textkd_', 'lseg_'))
        assert bool(text) == named, path
        if not text or text.type == 'ControlEmbeddings':
            continue
        assert text.classes == DATA[parts(path)['dataset']][1], path
        for spec in (text.classes, text.build.vocabulary):
            assert Vocabulary.from_spec(spec).names == classes, path
        # The last: `dpt_vit-b16_vit-b16` are a backbone and a text encoder.
        model = re.findall('_(vit-b16|rn50|toyclip)', path.name)
        assert text.build.model == CLIP[model[-1]], path
        assert text.file.endswith('.safetensors')
        assert not osp.isabs(text.file), path


def test_pidnet_gets_the_edges_that_it_needs():
    for path in PATHS:
        cfg = load_config(path)
        for dataset in datasets(cfg, 'train'):
            found = kinds(dataset.pipeline)
            expected = int(cfg.model.decode_head.type.endswith('PIDHead'))
            assert found.count('GenerateEdge') == expected, path
            assert found[-1] in ('PackSegInputs', 'PackRegionInputs'), path
            assert not expected or found[-2] == 'GenerateEdge', path


@each_case('tag', METHODS)
def test_twins_differ_in_the_method_only(tag):
    """Backbone, other heads, data, schedule, runtime: all else is equal."""
    allowed = METHODS[tag].changes
    for path in BY_METHOD[tag]:
        cfg, twin = (
            Config.fromfile(p) if isinstance(p, str) else load_config(p)
            for p in (path, twin_of(path)))
        METHODS[tag].check(cfg, twin, path)
        if tag == 'lseg-dpt':
            continue
        found = {
            next((a for a in allowed if f'{key}/'.startswith(f'{a}/')), key)
            for key in differences(cfg.to_dict(), twin.to_dict())
            if not key.startswith('text_')
        }
        assert found == allowed, path
        # Nothing of it is left where it is deployed, unless it is kept.
        if METHODS[tag].folder != 'lseg' and tag not in KEPT:
            stock = to_stock_cfg(cfg).to_dict()
            assert stock == to_stock_cfg(twin).to_dict(), path
            assert 'textkd' not in str(stock), path


def test_differences_are_found():
    """Also those of what only one of them has."""
    ours = dict(a=1, b=dict(c=[1], d=2), e=dict(f=1), g=3)
    twin = dict(a=1, b=dict(c=[2], d=2), h=dict(i=1), g=dict(j=1))
    assert differences(ours, twin) == {'b/c', 'e/f', 'h/i', 'g'}
    assert differences(ours, copy.deepcopy(ours)) == set()


def test_folds_are_those_of_the_literature():
    """The definitions, from the classes of MMSegmentation's datasets."""
    voc = PascalVOCDataset.METAINFO['classes'][1:]
    things = COCOStuffDataset.METAINFO['classes'][:80]
    assert voc[0] == 'aeroplane' and len(voc) == 20
    assert things[0] == 'person' and things[-1] == 'toothbrush'
    for path in BY_METHOD['fold']:
        data, i = re.search(r'(pascal-5|coco-20)i-fold(\d)-',
                            path.name).groups()
        i = int(i)
        fold = voc[5 * i:5 * i + 5] if data == 'pascal-5' else things[i::4]
        assert tuple(load_config(path).val_evaluator.unseen) == fold


# LSeg as published: networks, words and rates.
PUBLISHED = sorted((CONFIGS / 'lseg').glob('*_vit-b32_*.py'))


@each_case('path', PUBLISHED)
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
    assert head.channels == 256
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
        number = int(parts(path)['number'])
        assert cfg.train_cfg.max_iters == number * 1000
        assert max(s.end for s in cfg.param_scheduler) == 808000
        # 240 epochs of six of 20210 images.
        assert abs(240 * 20210 / 6 - 808000) < 1000


def test_new_layers_of_the_published_network_learn_ten_times_as_fast():
    assert len(PUBLISHED) == 8
    path, = (p for p in PUBLISHED if 'vit-b32_vit-b32' in p.name)
    cfg = load_config(path)
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys == {
        'decode_head': dict(lr_mult=10.)
    }
    offline(cfg.model)
    for name, (found, _) in rates(cfg)[1].items():
        rate = .0025 if name.startswith('decode_head') else .00025
        assert found == pytest.approx(rate), name


@each_case('folder, key', [('fusion', '.fusion.'),
                           ('balance', 'image_projection')])
def test_rates_of_what_is_dropped_do_not_get_into_stock_configs(folder, key):
    path = next((CONFIGS / folder).glob('*-b*[elsz]_1xb8*.py'))
    cfg = Config(copy.deepcopy(load_config(path).to_dict()))
    expected = to_stock_cfg(cfg).to_dict()
    cfg.optim_wrapper.paramwise_cfg.custom_keys[key] = dict(lr_mult=.5)
    assert to_stock_cfg(cfg).to_dict() == expected
