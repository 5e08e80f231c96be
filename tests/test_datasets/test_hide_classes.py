# Copyright (c) mmseg_textkd contributors. All rights reserved.
import numpy as np
import pytest
from each_case import each_case
from mmengine.config import Config
from mmseg.registry import TRANSFORMS

from mmseg_textkd import zero_shot
from mmseg_textkd.datasets import HideClasses

pytestmark = pytest.mark.stacks


def test_hidden_pixels_are_ignored_and_no_others():
    labels = np.array([[0, 1, 2], [3, 2, 255]], np.uint8)
    before = labels.copy()
    hide = TRANSFORMS.build(dict(type='HideClasses', classes=[2, 0]))
    results = hide(dict(gt_seg_map=labels, img='x'))
    assert results['gt_seg_map'].tolist() == [[255, 1, 255], [3, 255, 255]]
    assert results['gt_seg_map'].dtype == np.uint8 and results['img'] == 'x'
    # What others hold is not written to.
    assert np.array_equal(labels, before)
    other = HideClasses([3], ignore_index=11)(dict(gt_seg_map=labels))
    assert other['gt_seg_map'].tolist() == [[0, 1, 2], [11, 2, 255]]
    assert 'classes=(3,), ignore_index=11' in repr(HideClasses([3], 11))


@each_case('classes', [[], [-1], ['car'], [255], [1.]])
def test_bad_classes(classes):
    with pytest.raises(ValueError, match='must be indices of classes'):
        HideClasses(classes)


def test_config_helper():
    pipeline = [dict(type='LoadAnnotations'), dict(type='RandomFlip', prob=.5)]
    loader = dict(dataset=dict(pipeline=pipeline))
    branch, train, evaluator = zero_shot(loader, 'toy_scenes',
                                         ['truck', 'sidewalk'], 'RandomFlip')
    assert branch == dict(unseen=[3, 6], bias=False)
    kinds = [t['type'] for t in train['dataset']['pipeline']]
    assert kinds == ['LoadAnnotations', 'HideClasses', 'RandomFlip']
    assert train['dataset']['pipeline'][1]['classes'] == [3, 6]
    assert evaluator['unseen'] == ['truck', 'sidewalk']
    assert len(loader['dataset']['pipeline']) == 2
    Config(dict(a=train, b=branch)).pretty_text  # can be dumped
    with pytest.raises(ValueError, match=r"no classes \['lorry'\].*'sky'"):
        zero_shot(loader, 'toy_scenes', ['lorry', 'car'], 'RandomFlip')
