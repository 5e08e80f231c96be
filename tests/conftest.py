# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Fixtures that the whole suite shares."""
import pytest
import torch
from mmengine.registry import DefaultScope

import mmseg_textkd  # noqa: F401  (registers everything)
from mmseg_textkd.text import TextEmbeddings

# Asserts of this helper too are to say what was compared.
pytest.register_assert_rewrite('network_tester')


@pytest.fixture(autouse=True, scope='session')
def _format_each_config_once():
    """Remember what yapf made of a config.

    MMEngine formats the whole config anew for every checkpoint, which takes
    longer than the training iterations of a test.
    """
    from mmengine.config import config
    from yapf.yapflib import yapf_api
    original, known = yapf_api.FormatCode, {}

    def format_code(code, **kwargs):
        if code not in known:
            known[code] = original(code, **kwargs)
        return known[code]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf_api, 'FormatCode', format_code)
        # Upstream holds the function by name, OneDL imports it late.
        patch.setattr(config, 'FormatCode', format_code, raising=False)
        yield


@pytest.fixture(autouse=True)
def _mmseg_scope():
    """Run every test in MMSegmentation's scope, with a fixed seed."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture
def make_embeddings(tmp_path):
    """Get a function that writes an embeddings file and returns its path."""

    def make(num_classes=5, dim=16, names=None, bank=0, seed=0, file='t'):
        generator = torch.Generator().manual_seed(seed)
        names = names or [f'class{i}' for i in range(num_classes)]
        shape = (num_classes, max(bank, 1), dim)
        vectors = torch.nn.functional.normalize(
            torch.randn(shape, generator=generator) + 1, dim=-1)
        mean = torch.nn.functional.normalize(vectors.mean(1), dim=-1)
        path = str(tmp_path / f'{file}.safetensors')
        TextEmbeddings(
            vectors=mean,
            names=tuple(names),
            phrases=tuple((name, ) for name in names),
            templates=('{}', ),
            model='random',
            pretrained='',
            library='test',
            bank=vectors if bank else None,
            bank_mask=torch.ones(shape[:2], dtype=torch.bool)
            if bank else None).save(path)
        return path

    return make
