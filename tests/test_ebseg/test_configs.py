# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The configs of EBSeg: as published, and built with nothing but themselves.
"""
import re

import pytest
from each_case import each_case
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, MODELS
from network_tester import CONFIGS, load_config

from mmseg_textkd import open_vocabulary_test
from mmseg_textkd.text import Vocabulary

PATHS = sorted((CONFIGS / 'ebseg').glob('*.py'))
IDS = [path.stem for path in PATHS]
NAME = (
    r'ebseg_(?P<clip>vit-b16|vit-l14-336|toyclip)_'
    r'(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<number>\d+)(?P<unit>k|i)_'
    r'(?P<data>coco-stuff164k|toy-scenes)-(?P<height>\d+)x(?P<width>\d+)'
    r'(_(?P<test>ade20k|ade20k-847|pascal-context59|pascal-context459|voc20'
    r'))?')
NOT_DECAYED = ('positional_embedding', 'decoder.query.weight')
TEST_CLASSES = {
    'ade20k': 150,
    'ade20k-847': 847,
    'pascal-context59': 59,
    'pascal-context459': 459,
    'voc20': 20
}
BALANCE = {'vit-b16': (.09, .3, .7), 'vit-l14-336': (.12, .4, .6)}


def parts(path):
    """The parts of a config's name."""
    return re.fullmatch(NAME, path.stem).groupdict()


def test_all_combinations_are_there():
    found = [(p['clip'], p['test']) for p in map(parts, PATHS)]
    wanted = {(clip, test)
              for clip in BALANCE
              for test in (None, *TEST_CLASSES)}
    assert len(found) == 13 and set(found) == wanted | {('toyclip', None)}


@each_case('path', [p for p in PATHS if parts(p)['test'] in (None, 'voc20')])
def test_model_is_built_from_the_config_alone(bare, path):
    model = MODELS.build(load_config(path).model)
    # Only what is trained is in the model, as many as the authors' code has.
    if 'toyclip' not in path.stem:
        large = 'vit-l14-336' in path.stem
        assert sum(p.numel()
                   for p in model.parameters()) == (27_982_531
                                                    if large else 26_622_403)
    for tower in (model.image_encoder, model.backbone):
        assert [n for n, _ in tower.named_parameters()
                ] == ['positional_embedding']
    text = model.decode_head.text.__dict__['other']
    if text is not None:
        with pytest.raises(RuntimeError, match='tools/encode_text.py'):
            text()


@each_case('path', PATHS)
def test_name_says_what_it_is(path):
    name, cfg = parts(path), load_config(path)
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    iters = int(name['number']) * (1000 if name['unit'] == 'k' else 1)
    assert cfg.train_cfg.max_iters == iters
    assert max(s.end for s in cfg.param_scheduler) == iters
    size = int(name['height']), int(name['width'])
    assert tuple(cfg.model.data_preprocessor.size) == size
    crops = [
        t.crop_size for t in cfg.train_dataloader.dataset.pipeline
        if t.type == 'RandomCrop'
    ]
    assert [tuple(c)
            for c in crops] == ([] if name['clip'] == 'toyclip' else [size])
    encoder = cfg.model.image_encoder
    names = {'vit-b16': 'ViT-B-16', 'vit-l14-336': 'ViT-L-14-336'}
    assert encoder.model == names.get(name['clip'], name['clip'])


@each_case('path', PATHS)
def test_settings_are_those_published(path):
    name, cfg = parts(path), load_config(path)
    if name['clip'] == 'toyclip':
        return
    large = name['clip'] == 'vit-l14-336'
    head = cfg.model.decode_head
    assert tuple(head.balance.values()) == BALANCE[name['clip']]
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=8e-5 if large else 1e-4, weight_decay=0.05)
    assert cfg.optim_wrapper.clip_grad.max_norm == 0.01
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert head.attention_from == (18 if large else 9)
    assert head.attention_heads == (16 if large else 12)
    # All blocks but the first sixth.
    assert head.surgery_blocks == (20 if large else 10)
    assert tuple(cfg.model.neck.clip_depths) == ((6, 12, 18) if large else
                                                 (3, 6, 9))
    # 320 of 640 pixels, and 448.
    assert 640 * cfg.model.image_encoder.scale == (448 if large else 320)
    assert int(name['gpus']) * int(name['batch']) == 16
    if name['test']:  # it inherits the rest
        return
    resize, crop = cfg.train_dataloader.dataset.pipeline[2:4]
    assert resize.scales == list(range(320, 961, 64)) and crop == dict(
        type='RandomCrop', crop_size=(640, 640))
    # Norms and what is looked up do not decay. There is no GPU here.
    cfg.optim_wrapper.type = 'OptimWrapper'
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    for key, value in model.named_parameters():
        if 'norm' in key or key.endswith(NOT_DECAYED):
            assert decay[id(value)] == 0, key
    assert decay[id(model.neck.level_embed)] == 0.05
    assert decay[id(model.decode_head.no_object)] == 0.05


@each_case('path', PATHS)
def test_text_is_for_the_classes_of_the_data(path):
    name, cfg = parts(path), load_config(path)

    def classes(loader):
        dataset = loader.dataset
        return list((dataset.get('metainfo')
                     or DATASETS.get(dataset.type).METAINFO)['classes'])

    head = cfg.model.decode_head
    train = classes(cfg.train_dataloader)
    for spec in (head.text.classes, head.text.build.vocabulary,
                 head.train_classes):
        assert list(Vocabulary.from_spec(spec).names) == train
    assert head.num_classes == len(train)
    test = classes(cfg.test_dataloader)
    text = head.get('test_text') or dict(
        head.text, num_classes=head.num_classes)
    vocabulary = Vocabulary.from_spec(text['build']['vocabulary'])
    assert list(vocabulary.names) == test
    number = TEST_CLASSES.get(name['test'], len(test))
    assert text['num_classes'] == len(test) == number
    assert text['dim'] == cfg.model.image_encoder.out_dims == head.text.dim
    # Text and images by one model.
    for build in (head.text.build, text['build']):
        for key in ('model', 'pretrained'):
            assert build.get(key) == cfg.model.image_encoder.get(key)
    if name['test']:
        assert not cfg.custom_hooks
        resize = [
            t for t in cfg.test_dataloader.dataset.pipeline
            if t.type == 'Resize'
        ]
        assert [tuple(t.scale) for t in resize] == [(2560, 640)]
        # Class 255 is scored where there is one.
        ignored = 65535 if len(test) > 255 else 255
        assert cfg.test_evaluator.get('ignore_index', 255) == ignored


def test_test_data_are_those_of_the_stock_config():
    loader, words = open_vocabulary_test('_base_/datasets/pascal_voc12.py',
                                         (99, 33), 'voc12', ('background', ))
    assert loader['_delete_'] and loader['dataset']['type'].endswith('VOC'
                                                                     'Dataset')
    assert len(words) == 20 and words['tvmonitor'][0] == 'television'
    label_map = DATASETS.get('PascalVOCDataset').get_label_map(
        loader['dataset']['metainfo']['classes'])
    assert label_map == {0: 255, **{i: i - 1 for i in range(1, 21)}}
    _, words = open_vocabulary_test('_base_/datasets/pascal_context_59.py',
                                    (99, 33), 'voc12')
    assert words['bedclothes'] == ['bedclothes']
    assert words['pottedplant'][0] == 'potted plant'
