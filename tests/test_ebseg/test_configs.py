# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The configs of EBSeg: as published, and built with nothing but themselves.
"""
import itertools
import re

import pytest
from each_case import each_case
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, MODELS
from network_tester import CONFIGS, load_config

from mmseg_textkd import open_vocabulary_test
from mmseg_textkd.text import Vocabulary

PATHS = sorted((CONFIGS / 'ebseg').glob('*.py'))
NAME = (
    r'ebseg_(?P<clip>vit-b16|vit-l14-336|toyclip)_'
    r'(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<number>\d+)(?P<unit>k|i)_'
    r'(?P<data>coco-stuff164k|toy-scenes)-(?P<height>\d+)x(?P<width>\d+)'
    r'(_(?P<test>ade20k|ade20k-847|pascal-context59|pascal-context459|voc20'
    r'))?')
NOT_DECAYED = ('positional_embedding', 'decoder.query.weight')
TEST_CLASSES = dict(ade20k=150, voc20=20)
TEST_CLASSES.update({'ade20k-847': 847, 'pascal-context59': 59})
TEST_CLASSES.update({'pascal-context459': 459})
MODEL_NAMES = {'vit-b16': 'ViT-B-16', 'vit-l14-336': 'ViT-L-14-336'}
# What the two have otherwise: exponents of the balance, parameters, learning
# rate, blocks of attention, heads, blocks of surgery (all but the first sixth)
# and of the neck, and CLIP's view of 640 pixels.
PUBLISHED = {
    'vit-b16': ((.09, .3, .7), 26_622_403, 1e-4, 9, 12, 10, (3, 6, 9), 320),
    'vit-l14-336':
    ((.12, .4, .6), 27_982_531, 8e-5, 18, 16, 20, (6, 12, 18), 448)
}


def parts(path):
    """The parts of a config's name."""
    return re.fullmatch(NAME, path.stem).groupdict()


def transforms(loader, kind):
    return [t for t in loader.dataset.pipeline if t.type == kind]


def test_all_combinations_are_there():
    found = [(p['clip'], p['test']) for p in map(parts, PATHS)]
    wanted = {*itertools.product(PUBLISHED, (None, *TEST_CLASSES))}
    assert len(found) == 13 and set(found) == wanted | {('toyclip', None)}


@each_case('path', [p for p in PATHS if parts(p)['test'] in (None, 'voc20')])
def test_model_is_built_from_the_config_alone(bare, path):
    model, clip = MODELS.build(load_config(path).model), parts(path)['clip']
    # Only what is trained is in the model, as many as the authors' code has.
    if clip in PUBLISHED:
        count = sum(p.numel() for p in model.parameters())
        assert count == PUBLISHED[clip][1]
    for tower in (model.image_encoder, model.backbone):
        names = [n for n, _ in tower.named_parameters()]
        assert names == ['positional_embedding']
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
    crops = transforms(cfg.train_dataloader, 'RandomCrop')
    wanted = [] if name['clip'] == 'toyclip' else [size]
    assert [tuple(crop.crop_size) for crop in crops] == wanted
    wanted = MODEL_NAMES.get(name['clip'], name['clip'])
    assert cfg.model.image_encoder.model == wanted


@each_case('path', [p for p in PATHS if parts(p)['clip'] in PUBLISHED])
def test_settings_are_those_published(path):
    name, cfg = parts(path), load_config(path)
    head, optim = cfg.model.decode_head, cfg.optim_wrapper
    (balance, _, rate, attention, heads, surgery, depths,
     view) = PUBLISHED[name['clip']]
    assert tuple(head.balance.values()) == balance
    assert optim.optimizer == dict(type='AdamW', lr=rate, weight_decay=0.05)
    assert optim.clip_grad.max_norm == 0.01
    assert optim.type == 'AmpOptimWrapper'
    found = (head.attention_from, head.attention_heads, head.surgery_blocks)
    assert found == (attention, heads, surgery)
    assert tuple(cfg.model.neck.clip_depths) == depths
    assert 640 * cfg.model.image_encoder.scale == view
    assert int(name['gpus']) * int(name['batch']) == 16
    if name['test']:  # it inherits the rest
        return
    resize, crop = cfg.train_dataloader.dataset.pipeline[2:4]
    assert resize.scales == list(range(320, 961, 64))
    assert crop == dict(type='RandomCrop', crop_size=(640, 640))
    # Norms and what is looked up do not decay. There is no GPU here.
    optim.type = 'OptimWrapper'
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, optim).param_groups
    decay = {id(p): g['weight_decay'] for g in groups for p in g['params']}
    for key, value in model.named_parameters():
        if 'norm' in key or key.endswith(NOT_DECAYED):
            assert decay[id(value)] == 0, key
    assert decay[id(model.neck.level_embed)] == 0.05
    assert decay[id(model.decode_head.no_object)] == 0.05


@each_case('path', PATHS)
def test_text_is_for_the_classes_of_the_data(path):
    name, cfg = parts(path), load_config(path)
    head, encoder = cfg.model.decode_head, cfg.model.image_encoder
    train, test = (
        tuple((loader.dataset.get('metainfo')
               or DATASETS.get(loader.dataset.type).METAINFO)['classes'])
        for loader in (cfg.train_dataloader, cfg.test_dataloader))
    text = head.get('test_text') or dict(
        head.text, num_classes=head.num_classes)
    for spec, names in ((head.text.classes,
                         train), (head.text.build.vocabulary,
                                  train), (head.train_classes, train),
                        (text['build']['vocabulary'], test)):
        assert Vocabulary.from_spec(spec).names == names
    assert head.num_classes == len(train)
    number = TEST_CLASSES.get(name['test'], len(test))
    assert text['num_classes'] == len(test) == number
    assert text['dim'] == encoder.out_dims == head.text.dim
    # Text and images by one model.
    for build in (head.text.build, text['build']):
        for key in ('model', 'pretrained'):
            assert build.get(key) == encoder.get(key)
    if name['test']:
        if isinstance(text['build']['vocabulary'], dict):
            # MMEngine sorts a dict in a config that it writes.
            assert tuple(text['classes']) == test
        assert not cfg.custom_hooks
        resize, = transforms(cfg.test_dataloader, 'Resize')
        assert tuple(resize.scale) == (2560, 640)
        # Class 255 is scored where there is one.
        ignored = 65535 if len(test) > 255 else 255
        assert cfg.test_evaluator.get('ignore_index', 255) == ignored


def test_test_data_are_those_of_the_stock_config():
    loader, words = open_vocabulary_test('_base_/datasets/pascal_voc12.py',
                                         (99, 33), 'voc12', ('background', ))
    dataset = loader['dataset']
    assert loader['_delete_'] and dataset['type'] == 'PascalVOCDataset'
    assert len(words) == 20 and words['tvmonitor'][0] == 'television'
    label_map = DATASETS.get('PascalVOCDataset').get_label_map(
        dataset['metainfo']['classes'])
    assert label_map == {0: 255, **{i: i - 1 for i in range(1, 21)}}
    _, words = open_vocabulary_test('_base_/datasets/pascal_context_59.py',
                                    (99, 33), 'voc12')
    assert words['bedclothes'] == ['bedclothes']
    assert words['pottedplant'][0] == 'potted plant'
    with pytest.raises(ValueError, match="'sofa bed'.*no classes"):
        open_vocabulary_test('_base_/datasets/pascal_voc12.py', (99, 33),
                             'voc12', ('sofa bed', ))
