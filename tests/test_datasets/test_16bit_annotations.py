# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Label maps of more than 256 classes, from the file to the score."""
import copy
import runpy
import sys

import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.dataset import Compose
from mmseg.registry import DATASETS, METRICS, TRANSFORMS
from network_tester import CONFIGS, load_config
from PIL import Image

from mmseg_textkd.datasets import Load16BitAnnotations
from mmseg_textkd.deploy import to_stock_cfg

pytestmark = pytest.mark.stacks

IGNORED = 65535
SIZE = (20, 30)
ROOT = CONFIGS.parent
BASE = 'ebseg/ebseg_vit-b16_4xb4-120k_coco-stuff164k-640x640'
TESTS = {'ade20k-847': 847, 'pascal-context459': 459}
# Pairs that 8 bits cannot tell apart, 255 and its neighbors.
LABELS = [0, 1, 43, 44, 200, 254, 255, 256, 257, 299, 300, 456, 458]


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


@pytest.fixture(scope='module', params=TESTS)
def tree(request, tmp_path_factory):
    """The config of a test on three images, and their label maps."""
    cfg = copy.deepcopy(load_config(CONFIGS / f'{BASE}_{request.param}.py'))
    number = TESTS[request.param]
    dataset = cfg.test_dataloader.dataset
    root = tmp_path_factory.mktemp(request.param)
    dataset.data_root = str(root)
    rng = np.random.default_rng(0)
    maps = []
    for i in range(3):
        labels = rng.choice([*LABELS, number - 1, IGNORED], SIZE)
        maps.append(labels.astype(np.uint16))
        image = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
        write(root / dataset.data_prefix.img_path / f'{i}.jpg', image)
        write(root / dataset.data_prefix.seg_map_path / f'{i}.tif', maps[-1])
    return cfg, maps, number


def naive_iou(truth, guess, number):
    """IoU of each class in float64, a pixel at a time; NaN for none."""
    inter, union = np.zeros(number), np.zeros(number)
    for t, g in zip(truth.ravel(), guess.ravel()):
        if t == IGNORED:
            continue
        if t == g:
            inter[t] += 1
        for k in {int(t), int(g)}:
            union[k] += 1
    with np.errstate(invalid='ignore'):
        return inter / union


def test_labels_and_scores_are_right(tree):
    cfg, maps, number = tree
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    assert len(dataset) == 3 and dataset.ignore_index == IGNORED
    assert len(dataset.metainfo['classes']) == number
    assert len(dataset.metainfo['palette']) == number
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    rng = np.random.default_rng(1)
    guesses = []
    for i, truth in enumerate(maps):
        sample = dataset[i]['data_samples']
        labels = sample.gt_sem_seg.data
        assert labels.dtype == torch.int64
        assert np.array_equal(labels[0].numpy(), truth)
        guess = np.where(
            rng.random(SIZE) < .6, np.minimum(truth, number - 1),
            rng.integers(0, number, SIZE)).astype(np.int64)
        guesses.append(guess)
        metric.process({}, [
            dict(
                pred_sem_seg=dict(data=torch.from_numpy(guess)[None]),
                gt_sem_seg=dict(data=labels),
                img_path='')
        ])
    areas = [sum(column) for column in zip(*metric.results)]
    iou = (areas[0].double() / areas[1].double()).numpy()
    truth, guess = np.stack(maps), np.stack(guesses)
    expected = naive_iou(truth, guess, number)
    assert np.array_equal(np.isnan(iou), np.isnan(expected))
    assert np.nanmax(abs(iou - expected)) < 1e-12
    # The classes that 8 bits lose are in the labels, and found.
    for k in (255, 256, 300, number - 1):
        assert 0.2 < expected[k] < 1
    scores = metric.evaluate(3)
    assert scores['mIoU'] == pytest.approx(
        100 * np.nanmean(expected), abs=.006)
    valid = truth != IGNORED
    assert scores['aAcc'] == pytest.approx(
        100 * (truth == guess)[valid].mean(), abs=.006)


def test_augmented_tests_load_the_same_labels(tree):
    cfg, maps, _ = tree
    dataset = copy.deepcopy(cfg.test_dataloader.dataset)
    dataset.pipeline = cfg.tta_pipeline
    views = DATASETS.build(dataset)[0]['data_samples']
    assert len(views) == 12 and sum(v.flip for v in views) == 6
    for view in views:
        assert np.array_equal(view.gt_sem_seg.data[0].numpy(), maps[0])


def test_stock_loader_would_give_other_labels(tree):
    # Why there is a loader: if MMSegmentation mends its own, it may go.
    cfg, maps, _ = tree
    dataset = copy.deepcopy(cfg.test_dataloader.dataset)
    for transform in dataset.pipeline:
        if transform.type == 'Load16BitAnnotations':
            transform.type = 'LoadAnnotations'
    labels = DATASETS.build(dataset)[0]['data_samples'].gt_sem_seg.data[0]
    assert np.array_equal(labels.numpy(), maps[0].astype(np.uint8))


def test_labels_beyond_the_classes_are_named(tree, tmp_path):
    cfg, maps, number = tree
    dataset = copy.deepcopy(cfg.test_dataloader.dataset)
    dataset.data_root = str(tmp_path)
    # As the files of the data set count: from 1.
    wrong = np.where(maps[0] == IGNORED, 0, maps[0] + 1).astype(np.uint16)
    write(tmp_path / dataset.data_prefix.img_path / 'a.jpg',
          np.zeros((*SIZE, 3), np.uint8))
    write(tmp_path / dataset.data_prefix.seg_map_path / 'a.tif', wrong)
    with pytest.raises(ValueError, match=rf'a\.tif .*\[{number}\] in'):
        DATASETS.build(dataset)[0]


def results(path, **more):
    return dict(
        seg_map_path=str(path),
        seg_fields=[],
        label_map=None,
        reduce_zero_label=False,
        **more)


@each_case('backend', ['pillow', 'cv2'])
@each_case('suffix', ['.tif', '.png'])
def test_file_formats(tmp_path, suffix, backend):
    labels = np.arange(600, dtype=np.uint16).reshape(SIZE) * 109
    write(tmp_path / f'a{suffix}', labels)
    load = TRANSFORMS.build(
        dict(type='Load16BitAnnotations', imdecode_backend=backend))
    found = load(results(tmp_path / f'a{suffix}'))
    assert found['gt_seg_map'].dtype == np.int32
    assert np.array_equal(found['gt_seg_map'], labels)
    assert found['seg_fields'] == ['gt_seg_map']
    assert f"imdecode_backend='{backend}'" in repr(load)


@each_case('labels', [
    np.zeros(SIZE, np.uint8),
    np.zeros((*SIZE, 3), np.uint8),
    np.zeros(SIZE, np.float32)
])
def test_what_is_no_16_bit_map_is_refused(tmp_path, labels):
    write(tmp_path / 'a.tif', labels)
    with pytest.raises(ValueError, match=r'a\.tif has shape .*16-bit'):
        Load16BitAnnotations()(results(tmp_path / 'a.tif'))


@each_case('change', [dict(reduce_zero_label=True), dict(label_map={0: 255})])
def test_labels_are_not_renumbered(tmp_path, change):
    with pytest.raises(ValueError, match='labels as they are'):
        Load16BitAnnotations()(dict(results(tmp_path / 'a.tif'), **change))


def test_tool_writes_no_label_maps_of_8_bits(tree, tmp_path, monkeypatch):
    tree[0].dump(tmp_path / 'config.py')
    monkeypatch.setattr(sys, 'argv', [
        'test.py',
        str(tmp_path / 'config.py'), 'weights.pth', '--out',
        str(tmp_path / 'labels')
    ])
    with pytest.raises(SystemExit, match='label maps of 8 bits.*config.py'):
        runpy.run_path(str(ROOT / 'tools/test.py'), run_name='__main__')
    assert [p.name for p in tmp_path.iterdir()] == ['config.py']


def test_a_picture_of_ones_own_has_no_labels(tree):
    pipeline = copy.deepcopy(tree[0].test_dataloader.dataset.pipeline)
    root = tree[0].test_dataloader.dataset
    image = f'{root.data_root}/{root.data_prefix.img_path}/0.jpg'
    packed = Compose(pipeline)(dict(img_path=image))
    assert 'gt_sem_seg' not in packed['data_samples']


def test_stock_config_needs_another_loader():
    cfg = copy.deepcopy(
        load_config(CONFIGS /
                    'stock/bisenetv2_fcn_1xb8-10k_camvid-360x480.py'))
    cfg.test_dataloader.dataset.pipeline[1].type = 'Load16BitAnnotations'
    with pytest.raises(ValueError, match="'Load16BitAnnotations' is defined"):
        to_stock_cfg(cfg)
