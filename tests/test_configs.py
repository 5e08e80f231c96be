# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Every config that is shipped: named, loaded, built, and a fair twin."""
import os.path as osp
import re
import socket
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, HOOKS, MODELS

from mmseg_textkd.text import TextProvider, Vocabulary

pytestmark = pytest.mark.stacks

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
TEXTKD = sorted((CONFIGS / 'textkd').glob('*.py'))
STOCK = sorted((CONFIGS / 'stock').glob('*.py'))
NAME = (r'[a-z0-9]+(_[a-z0-9-]+)+_\d+xb\d+-\d+(k|i|e)_'
        r'[a-z0-9-]+-\d+x\d+\.py')
# What the text twin may add to a head.
OPTIONS = {'text', 'role', 'text_branch', 'text_losses'}


def names(paths):
    return [path.name for path in paths]


def test_every_file_is_tested():
    for folder, found in (('textkd', TEXTKD), ('stock', STOCK)):
        below = {p.relative_to(CONFIGS) for p in CONFIGS.rglob('*.py')}
        here = [p for p in below if p.parts[0] == folder]
        assert len(found) == len(here) > 0
    folders = {p.parts[0] for p in below}
    assert folders == {'_base_', 'stock', 'textkd'}, 'a folder is untested'


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
    assert re.fullmatch(NAME, path.name)
    assert (path.parent.name == 'textkd') == path.name.startswith('textkd_')
    cfg = Config.fromfile(path)
    gpus, batch, number, unit, dataset, size = re.search(
        r'_(\d+)xb(\d+)-(\d+)(k|i|e)_(.+)-(\d+x\d+)\.py', path.name).groups()
    assert cfg.train_dataloader.batch_size == int(batch) and int(gpus) > 0
    iters = int(number) * (1000 if unit == 'k' else 1)
    assert cfg.train_cfg.max_iters == iters
    height, width = map(int, size.split('x'))
    # BiSeNetV2 on Cityscapes is trained on 1024x1024, cut from 2048x1024.
    assert tuple(cfg.model.data_preprocessor.size) == (height, width)
    kind = cfg.train_dataloader.dataset.type.lower()
    assert kind == dataset.replace('-', '') + 'dataset'


@pytest.mark.parametrize('path', TEXTKD + STOCK, ids=names(TEXTKD + STOCK))
def test_model_is_built_from_the_config_alone(bare, path):
    cfg = Config.fromfile(path)
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


def stock_twin(path):
    """The config of the same name without the text."""
    start, rest = re.fullmatch(r'textkd_(.+)_[a-z0-9-]+(_\d+xb.+)',
                               path.name).groups()
    found = [
        folder / (start + rest)
        for folder in (CONFIGS / 'stock', CONFIGS / '_base_' / 'stock')
    ]
    found = [file for file in found if file.exists()]
    assert len(found) == 1, f'{path.name} has no stock twin'
    return found[0]


@pytest.mark.parametrize('path', TEXTKD, ids=names(TEXTKD))
def test_twins_differ_in_the_text_only(path):
    ours, stock = (
        Config.fromfile(p).to_dict() for p in (path, stock_twin(path)))
    head, plain = (c['model'].pop('decode_head') for c in (ours, stock))
    assert head.pop('type') == 'Text' + plain.pop('type')
    assert 'text' in head
    assert {k: v for k, v in head.items() if k not in OPTIONS} == plain
    assert ours['optim_wrapper'].pop('paramwise_cfg')
    assert 'paramwise_cfg' not in stock['optim_wrapper']
    added = {k for k in ours if k not in stock}
    changed = {k for k in stock if ours.get(k) != stock[k]}
    # Backbone, auxiliary heads, data, schedule, runtime: all of it.
    assert not changed
    assert {'custom_hooks', 'find_unused_parameters'} <= added
    assert {k
            for k in added if not k.startswith('text_')
            } <= {'custom_hooks', 'custom_imports', 'find_unused_parameters'}


@pytest.mark.parametrize('path', TEXTKD, ids=names(TEXTKD))
def test_the_stages_are_in_the_config(bare, path):
    cfg = Config.fromfile(path)
    hooks = [h for h in cfg.custom_hooks if h.type == 'PromptLearnerHook']
    assert len(hooks) == 1 and 0 < hooks[0].switch_at < 1
    assert HOOKS.build(hooks[0]).switch_at == hooks[0].switch_at
    assert cfg.find_unused_parameters is True
    # Prompts and scales are not decayed, everything else as in the twin.
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).param_groups
    members = {id(p): g for g in groups for p in g['params']}
    decay = {
        n: members[id(p)]['weight_decay']
        for n, p in model.named_parameters()
    }
    free = {n for n, value in decay.items() if value == 0}
    assert free and all('.text.' in n or 'log_scale' in n for n in free)
    for name, module in model.named_modules():
        if isinstance(module, TextProvider):
            assert module.learnable()
            assert {f'{name}.{key}' for key in module.learnable()} <= free
    assert {decay[n]
            for n in set(decay) - free
            } == {cfg.optim_wrapper.optimizer.weight_decay}


@pytest.mark.parametrize('path', TEXTKD + STOCK, ids=names(TEXTKD + STOCK))
def test_classes_are_the_same_everywhere(path):
    cfg = Config.fromfile(path)
    loaders = [cfg[f'{s}_dataloader'] for s in ('train', 'val', 'test')]
    kinds = {loader.dataset.type for loader in loaders}
    assert len(kinds) == 1
    classes = DATASETS.get(kinds.pop()).METAINFO['classes']
    heads = [cfg.model.decode_head, *cfg.model.auxiliary_head]
    assert {head.num_classes for head in heads} == {len(classes)}
    text = cfg.model.decode_head.get('text', {}).get('embeddings', {})
    assert bool(text) == (path in TEXTKD)
    if text and text.type != 'ControlEmbeddings':
        for spec in (text.classes, text.build.vocabulary):
            assert Vocabulary.from_spec(spec).names == tuple(classes)
        assert text.file.endswith('.safetensors')
        assert not osp.isabs(text.file)
