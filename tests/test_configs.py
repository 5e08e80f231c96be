# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Every config that is shipped: named, loaded, built, and a fair twin."""
import os.path as osp
import re
import socket
import sys

import pytest
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, HOOKS, MODELS
from network_tester import CONFIGS, each_head, load_config, stock_twin

from mmseg_textkd.models.text_providers import TextProvider
from mmseg_textkd.text import Vocabulary

pytestmark = pytest.mark.stacks

# Folder of a method on top of text, and what its configs' names say.
METHODS = {'structure': 'ssc', 'diversification': 'syn'}
FOLDERS = ('textkd', *METHODS)
TEXTKD = sorted(
    p for folder in FOLDERS for p in (CONFIGS / folder).glob('*.py'))
STOCK = sorted((CONFIGS / 'stock').glob('*.py'))
NAME = (r'(?P<network>[a-z0-9-]+(_[a-z0-9-]+)*)'
        r'_(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<number>\d+)(?P<unit>k|i)'
        r'_(?P<dataset>[a-z0-9-]+)-(?P<height>\d+)x(?P<width>\d+)\.py')
DATASET_TYPES = {
    'ade20k': 'ADE20KDataset',
    'bdd100k': 'BDD100KDataset',
    'camvid': 'CamVidDataset',
    'cityscapes': 'CityscapesDataset',
    'coco-stuff164k': 'COCOStuffDataset',
    'mapillary-v1': 'MapillaryDataset_v1',
    'toy-scenes': 'ToyScenesDataset',
    'voc12aug': 'PascalVOCDataset',
}
FOUR = {
    'bisenetv2_fcn', 'stdc1_in1k-pre', 'ddrnet_23-slim_in1k-pre', 'pidnet-s'
}
# These have tests of their own.
OTHERS = {'balance', 'distillation', 'ebseg', 'fusion', 'lseg', 'studies'}
# What the text twin may add to a head.
OPTIONS = {'text', 'role', 'text_branch', 'text_losses'}


def names(paths):
    return [path.name for path in paths]


def parts(path):
    """The parts of a config's name."""
    return re.fullmatch(NAME, path.name).groupdict()


def datasets(cfg, split):
    """The configs of all datasets behind a data loader."""
    dataset = cfg[f'{split}_dataloader'].dataset
    return dataset.get('datasets', [dataset])


def test_every_file_is_tested():
    below = {p.relative_to(CONFIGS) for p in CONFIGS.rglob('*.py')}
    for folders, found in ((FOLDERS, TEXTKD), (('stock', ), STOCK)):
        here = [p for p in below if p.parts[0] in folders]
        assert len(found) == len(here) > 0
    folders = {p.parts[0] for p in below}
    assert folders - OTHERS == {'_base_', 'stock',
                                *FOLDERS}, 'a folder is untested'


def test_all_combinations_are_there():
    """CamVid and Cityscapes for all networks, the others for four."""
    stock = {(parts(p)['network'], parts(p)['dataset']) for p in STOCK}
    toys = {(n, 'toy-scenes') for n in ('bisenetv2_fcn', 'ddrnet_23-slim')}
    networks = {network for network, _ in stock - toys}
    assert len(networks) == 15 and len(stock) == len(STOCK) == 52
    wanted = {(n, d) for n in networks for d in ('camvid', 'cityscapes')}
    wanted |= {(n, d)
               for n in FOUR
               for d in set(DATASET_TYPES) - {'toy-scenes'}}
    assert stock == wanted | toys
    plain = [p for p in TEXTKD if p.parent.name == 'textkd']
    text = [parts(p)['network'] for p in plain]
    assert len(text) == 68
    for name, number in (('_vit-b16', 50), ('_vit-b16-aux', 15),
                         ('_toyclip', 2), ('_random', 1)):
        assert sum(n.endswith(name) for n in text) == number
    # Each stock config has its twin, on CamVid in both roles.
    twins = sorted(stock_twin(p) for p in plain if '_random_' not in p.name)
    camvid = [p for p in STOCK if parts(p)['dataset'] == 'camvid']
    assert twins == sorted(STOCK + camvid)


@pytest.mark.parametrize('folder', METHODS)
def test_a_method_is_one_line_more(folder):
    """On two networks and data sets; the rest is as with text alone."""
    found = sorted((CONFIGS / folder).glob('*.py'))
    twins = {parts(stock_twin(p))['network'] for p in found}
    assert len(found) == 4 and len(twins) == 3
    for path in found:
        name = path.name.replace(f'-{METHODS[folder]}_', '_')
        ours, text = (
            load_config(p).to_dict()
            for p in (path, CONFIGS / 'textkd' / name))
        head, plain = (c['model'].pop('decode_head') for c in (ours, text))
        ours = {k: v for k, v in ours.items() if not k.startswith('text_')}
        assert ours == {k: v for k, v in text.items() if k in ours}
        if folder == 'structure':
            loss, = head.pop('text_losses')
            assert loss['type'] == 'SemanticStructureLoss'
        else:
            assert head['text'].pop('embeddings')['type'] == 'SynonymSampler'
            assert plain['text'].pop('embeddings')['type'] == 'ClassEmbeddings'
        assert head == plain


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No embeddings files, no network, no open_clip."""

    class Blocker:

        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0] in ('open_clip', 'huggingface_hub'):
                raise AssertionError(f'{name} was imported')

    def refuse(*args, **kwargs):
        raise AssertionError('the network was used')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, 'socket', refuse)
    for name in list(sys.modules):
        if name.split('.')[0] in ('open_clip', 'huggingface_hub'):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [Blocker(), *sys.meta_path])


@pytest.mark.parametrize('path', TEXTKD + STOCK, ids=names(TEXTKD + STOCK))
def test_name_says_what_it_is(path):
    name = parts(path)
    assert (path in TEXTKD) == path.name.startswith('textkd_')
    cfg = load_config(path)
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    assert int(name['gpus']) > 0
    iters = int(name['number']) * (1000 if name['unit'] == 'k' else 1)
    assert cfg.train_cfg.max_iters == iters
    ends = [s.end for s in cfg.param_scheduler]
    assert max(ends) == iters
    size = int(name['height']), int(name['width'])
    assert tuple(cfg.model.data_preprocessor.size) == size
    for dataset in datasets(cfg, 'train'):
        assert dataset.type == DATASET_TYPES[name['dataset']]
        crops = [
            t.crop_size for t in dataset.pipeline if t.type == 'RandomCrop'
        ]
        assert [tuple(c) for c in crops] == [size] * len(crops)
        assert crops or name['dataset'] == 'toy-scenes'
    assert ('role' in cfg.model.decode_head) == ('-aux_' in path.name)


@pytest.mark.parametrize('path', TEXTKD + STOCK, ids=names(TEXTKD + STOCK))
def test_model_is_built_from_the_config_alone(bare, path):
    cfg = load_config(path)
    assert cfg.custom_imports.imports == ['mmseg_textkd']
    model = MODELS.build(cfg.model)
    providers = [m for m in model.modules() if isinstance(m, TextProvider)]
    assert len(providers) == (path in TEXTKD)
    for provider in providers:
        # What comes from a file says how to make it; controls are there.
        kind = cfg.model.decode_head.text.embeddings.type
        assert provider.filled == (kind == 'ControlEmbeddings')
        if not provider.filled:
            with pytest.raises(RuntimeError, match='tools/encode_text.py'):
                provider()


@pytest.mark.parametrize('path', TEXTKD, ids=names(TEXTKD))
def test_twins_differ_in_the_text_only(path):
    ours, stock = (load_config(p).to_dict() for p in (path, stock_twin(path)))
    head, plain = (c['model'].pop('decode_head') for c in (ours, stock))
    assert head.pop('type') == 'Text' + plain.pop('type')
    assert 'text' in head
    assert {k: v for k, v in head.items() if k not in OPTIONS} == plain
    added = {k for k in ours if k not in stock}
    changed = {k for k in stock if ours.get(k) != stock[k]}
    # Backbone, auxiliary heads, data, schedule, runtime: all of it.
    assert changed == {'optim_wrapper'}
    text = ours['optim_wrapper']['paramwise_cfg']['custom_keys']
    assert text.pop('.text.') and text.pop('log_scale')
    stock['optim_wrapper'].setdefault('paramwise_cfg', dict(custom_keys={}))
    assert ours['optim_wrapper'] == stock['optim_wrapper']
    assert {k
            for k in added if not k.startswith('text_')
            } == {'auxiliary_hooks', 'custom_hooks', 'find_unused_parameters'}


@pytest.mark.parametrize('path', TEXTKD, ids=names(TEXTKD))
def test_the_stages_are_in_the_config(bare, path):
    cfg = load_config(path)
    hooks = [h for h in cfg.custom_hooks if h.type == 'PromptLearnerHook']
    assert len(hooks) == 1 and 0 < hooks[0].switch_at < 1
    assert HOOKS.build(hooks[0]).switch_at == hooks[0].switch_at
    assert cfg.find_unused_parameters is True


@pytest.mark.parametrize('path', TEXTKD, ids=names(TEXTKD))
def test_the_optimizer_treats_the_network_as_in_the_twin(bare, path):
    """Rate and decay; prompts and scales are not decayed."""
    ours, stock = (settings(load_config(p)) for p in (path, stock_twin(path)))
    text = {n for n in ours if '.text.' in n or n.endswith('log_scale')}
    assert text and {ours[n][1] for n in text} == {0}
    rates = {n: rate for n, (rate, _) in ours.items()}
    branch = {n for n in ours if n not in stock}
    assert text <= branch
    # The branch learns at the rate of the stock classifier.
    assert {rates[n]
            for n in branch} == {stock['decode_head.conv_seg.bias'][0]}
    assert {
        n: ours[n]
        for n in ours if n in stock
    } == {
        n: stock[n]
        for n in stock if n in ours
    }
    assert set(stock) - set(ours) <= {
        'decode_head.conv_seg.weight', 'decode_head.conv_seg.bias'
    }


def settings(cfg):
    """Learning rate and weight decay of each parameter."""
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    members = {id(p): g for g in groups for p in g['params']}
    return {
        n: (members[id(p)]['lr'], members[id(p)]['weight_decay'])
        for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize('path', TEXTKD + STOCK, ids=names(TEXTKD + STOCK))
def test_classes_are_the_same_everywhere(path):
    cfg = load_config(path)
    found = {
        tuple((d.get('metainfo') or DATASETS.get(d.type).METAINFO)['classes'])
        for split in ('train', 'val', 'test')
        for d in datasets(cfg, split)
    }
    assert len(found) == 1
    classes = found.pop()
    # Heads with fewer tell boundaries.
    assert {
        head.num_classes
        for head in each_head(cfg.model) if head.num_classes > 2
    } == {len(classes)}
    for head in each_head(cfg.model):
        losses = head.loss_decode
        for loss in losses if isinstance(losses, list) else [losses]:
            assert len(loss.get('class_weight') or classes) == len(classes)
    text = cfg.model.decode_head.get('text', {}).get('embeddings', {})
    assert bool(text) == (path in TEXTKD)
    if text and text.type != 'ControlEmbeddings':
        for spec in (text.classes, text.build.vocabulary):
            assert Vocabulary.from_spec(spec).names == classes
        assert text.file.endswith('.safetensors')
        assert not osp.isabs(text.file)


@pytest.mark.parametrize('path', TEXTKD + STOCK, ids=names(TEXTKD + STOCK))
def test_pidnet_gets_the_edges_that_it_needs(path):
    cfg = load_config(path)
    for dataset in datasets(cfg, 'train'):
        kinds = [t.type for t in dataset.pipeline]
        assert kinds[-1] == 'PackSegInputs'
        expected = int(cfg.model.decode_head.type.endswith('PIDHead'))
        assert kinds.count('GenerateEdge') == expected
        if expected:
            assert kinds[-2] == 'GenerateEdge'
