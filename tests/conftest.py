# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Fixtures that the whole suite shares."""
import functools
import gc
import importlib
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from processes import leave_configs_unformatted

from mmseg_textkd.text import TextEmbeddings  # registers everything

# Asserts of this helper too are to say what was compared.
pytest.register_assert_rewrite('network_tester')
# What takes longest comes first: no worker waits for another at the end.
SLOW_FILES = ('test_packaging', 'test_distributed', 'test_study',
              'test_training_options', 'test_export', 'test_compat',
              'test_networks', 'test_networks_table', 'test_textkd2mmseg',
              'test_configs', 'test_prompt_learner_hook', 'test_mmseg_tools',
              'test_methods', 'test_fusion_runs', 'test_kill_and_resume',
              'test_distillation', 'test_encode_text_tool', 'test_text_kd')


def pytest_collection_modifyitems(items):
    """Put the slow files first."""
    rank = {name: i for i, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True, scope='session')
def _quick_runs():
    """Save what takes longer than the training iterations of a test."""
    with pytest.MonkeyPatch.context() as patch:
        leave_configs_unformatted(patch.setattr)
        # A second for each export, for what is the same each time.
        registry = importlib.import_module(
            'torch.onnx._internal.exporter._registration').ONNXRegistry
        patch.setattr(registry, 'from_torchlib',
                      staticmethod(functools.cache(registry.from_torchlib)))
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope='module')
def _freeze():
    """Collect no garbage among what was there before the tests of a file.

    MMEngine collects it for each dataset.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _mmseg_scope():
    """Run every test in MMSegmentation's scope, with a fixed seed."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No files, no network, and none of the libraries that text needs."""

    class Blocker:

        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0] in ('open_clip', 'timm', 'scipy',
                                      'huggingface_hub'):
                raise AssertionError(f'{name} was imported')

    def refuse(*args, **kwargs):
        raise AssertionError('the network was used')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, 'socket', refuse)
    for name in list(sys.modules):
        if name.split('.')[0] in ('open_clip', 'timm', 'huggingface_hub'):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [Blocker(), *sys.meta_path])


@pytest.fixture
def make_embeddings(tmp_path):
    """Get a function that writes an embeddings file and returns its path."""

    def make(num_classes=5, dim=16, names=None, bank=0, seed=0, file='t'):
        generator = torch.Generator().manual_seed(seed)
        names = names or [f'class{i}' for i in range(num_classes)]
        shape = (num_classes, max(bank, 1), dim)
        vectors = torch.randn(shape, generator=generator) + 1
        vectors = F.normalize(vectors, dim=-1)
        mean = F.normalize(vectors.mean(1), dim=-1)
        path = str(tmp_path / f'{file}.safetensors')
        phrases = tuple((name, ) for name in names)
        made = dict(templates=('{}', ), model='random', library='test')
        if bank:
            made.update(bank=vectors, bank_mask=torch.ones(shape[:2]).bool())
        TextEmbeddings(mean, tuple(names), phrases, **made).save(path)
        return path

    return make
