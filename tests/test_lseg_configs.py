# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The configs of LSeg as published: networks, words and rates."""
import copy
import hashlib

import pytest
from each_case import each_case
from mmengine.optim import build_optim_wrapper
from mmseg.registry import DATASETS, MODELS
from network_tester import CONFIGS, load_config, offline
from test_configs import NAME

pytestmark = pytest.mark.stacks

PUBLISHED = sorted((CONFIGS / 'lseg').glob('*_vit-b32_*.py'))


def test_all_are_there():
    assert len(PUBLISHED) == 8


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
        name = NAME.fullmatch(path.stem).groupdict()
        assert cfg.train_cfg.max_iters == int(name['number']) * 1000
        assert max(s.end for s in cfg.param_scheduler) == 808000
        # 240 epochs of six of 20210 images.
        assert abs(240 * 20210 / 6 - 808000) < 1000


def test_new_layers_of_the_published_network_learn_ten_times_as_fast():
    path, = (p for p in PUBLISHED if 'vit-b32_vit-b32' in p.name)
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
