# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A small EBSeg, as the toy config has it, and text for it."""
import copy
from typing import Callable, Dict

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from network_tester import CONFIGS
from tiny import CLASSES

from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.encode_classes import encode_classes

TOY = CONFIGS / 'ebseg/ebseg_toyclip_1xb4-200i_toy-scenes-128x256.py'


@pytest.fixture(scope='session')
def toy_text() -> TextEmbeddings:
    """ToyCLIP's text of all eight classes."""
    return encode_classes(list(CLASSES), 'toyclip', 'photo')


@pytest.fixture(scope='session')
def model_cfg(toy_text, tmp_path_factory) -> Callable[..., Dict]:
    """Get a function that makes the config of a model."""
    file = str(tmp_path_factory.mktemp('text') / 'toy.safetensors')
    toy_text.save(file)
    with DefaultScope.overwrite_default_scope('mmseg'):
        toy = Config.fromfile(TOY).model

    def make(**head) -> ConfigDict:
        cfg = copy.deepcopy(toy)
        cfg.data_preprocessor.size = (32, 64)
        cfg.image_encoder.scale = 1.
        # The published balance, in which all three embeddings take part.
        for key in ('train_classes', 'test_text', 'balance'):
            cfg.decode_head.pop(key)
        cfg.decode_head.num_classes = len(CLASSES)
        cfg.decode_head.text = dict(type='ClassEmbeddings', file=file)
        cfg.decode_head.decoder.num_layers = 2
        if 'text' in head:
            del cfg.decode_head['text']
        cfg.decode_head.update(head)
        return cfg

    return make
