# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Label maps of more than 256 classes, from the file to the score."""
import copy

import numpy as np
import pytest
import torch
from each_case import each_case
from images import noise, write
from mmengine.dataset import Compose
from mmseg.registry import DATASETS, METRICS, TRANSFORMS
from network_tester import CONFIGS, load_config
from tool_modules import exit_of

from mmseg_textkd.datasets import Load16BitAnnotations
from mmseg_textkd.deploy import to_stock_cfg

pytestmark = pytest.mark.stacks

IGNORED = 65535
SIZE = (20, 30)
BASE = 'ebseg/ebseg_vit-b16_4xb4-120k_coco-stuff164k-640x640'
TESTS = {'ade20k-847': 847, 'pascal-context459': 459}
# Pairs that 8 bits cannot tell apart, 255 and its neighbors.
LABELS = [0, 1, 43, 44, 200, 254, 255, 256, 257, 299, 300, 456, 458]


@pytest.fixture(scope='module', params=TESTS)
def tree(request, tmp_path_factory):
    """The config of a test on three images, and their label maps."""
    cfg = load_config(CONFIGS / f'{BASE}_{request.param}.py')
    number, dataset = TESTS[request.param], cfg.test_dataloader.dataset
    root = tmp_path_factory.mktemp(request.param)
    dataset.data_root = str(root)
    rng = np.random.default_rng(0)
    maps = []
    for i in range(3):
        labels = rng.choice([*LABELS, number - 1, IGNORED], SIZE)
        maps.append(labels.astype(np.uint16))
        write(root / dataset.data_prefix.img_path / f'{i}.jpg', noise(*SIZE))
        write(root / dataset.data_prefix.seg_map_path / f'{i}.tif', maps[-1])
    return cfg, maps, number


def changed(tree, **changes):
    """Build the dataset of the test with other options."""
    dataset = copy.deepcopy(tree[0].test_dataloader.dataset)
    dataset.update(changes)
    return DATASETS.build(dataset)


def test_labels_and_scores_are_right(tree):
    cfg, maps, number = tree
    dataset = changed(tree)
    assert len(dataset) == 3 and dataset.ignore_index == IGNORED
    assert len(dataset.metainfo['classes']) == number
    assert len(dataset.metainfo['palette']) == number
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    rng, truth = np.random.default_rng(1), np.stack(maps)
    guess = np.where(
        rng.random(truth.shape) < .6, np.minimum(truth, number - 1),
        rng.integers(0, number, truth.shape))
    for i in range(3):
        labels = dataset[i]['data_samples'].gt_sem_seg.data
        assert labels.dtype == torch.int64
        assert np.array_equal(labels[0].numpy(), truth[i])
        guessed = torch.from_numpy(guess[i])[None].long()
        sample = dict(pred_sem_seg=dict(data=guessed), img_path='')
        metric.process({}, [dict(sample, gt_sem_seg=dict(data=labels))])
    areas = [sum(column).double() for column in zip(*metric.results)]
    iou = (areas[0] / areas[1]).numpy()
    truth, guess = truth[truth != IGNORED], guess[truth != IGNORED]
    both, labeled, found = (
        np.bincount(x, minlength=number)
        for x in (truth[truth == guess], truth, guess))
    with np.errstate(invalid='ignore'):
        expected = both / (labeled + found - both)
    np.testing.assert_allclose(iou, expected, rtol=0, atol=1e-12)
    # The classes that 8 bits lose are in the labels, and found.
    for k in (255, 256, 300, number - 1):
        assert 0.2 < expected[k] < 1
    scores = metric.evaluate(3)
    for key, value in (('mIoU', np.nanmean(expected)),
                       ('aAcc', (truth == guess).mean())):
        assert scores[key] == pytest.approx(100 * value, abs=.006)


def test_augmented_tests_load_the_same_labels(tree):
    views = changed(tree, pipeline=tree[0].tta_pipeline)[0]['data_samples']
    assert len(views) == 12 and sum(v.flip for v in views) == 6
    for view in views:
        assert np.array_equal(view.gt_sem_seg.data[0].numpy(), tree[1][0])


def test_labels_beyond_the_classes_are_named(tree, tmp_path):
    (labels, *_), number = tree[1:]
    prefix = tree[0].test_dataloader.dataset.data_prefix
    # As the files of the data set count: from 1.
    wrong = np.where(labels == IGNORED, 0, labels + 1).astype(np.uint16)
    write(tmp_path / prefix.img_path / 'a.jpg', noise(*SIZE))
    write(tmp_path / prefix.seg_map_path / 'a.tif', wrong)
    with pytest.raises(ValueError, match=rf'a\.tif .*\[{number}\] in'):
        changed(tree, data_root=str(tmp_path))[0]


def results(path, **more):
    keys = dict(seg_fields=[], label_map=None, reduce_zero_label=False)
    return dict(keys, seg_map_path=str(path), **more)


GOOD = np.arange(600, dtype=np.uint16).reshape(SIZE) * 109


@each_case('backend', ['pillow', 'cv2'])
@each_case('suffix', ['.tif', '.png'])
def test_file_formats(tmp_path, suffix, backend):
    path = tmp_path / f'a{suffix}'
    write(path, GOOD)
    load = TRANSFORMS.build(
        dict(type='Load16BitAnnotations', imdecode_backend=backend))
    found = load(results(path))
    assert found['gt_seg_map'].dtype == np.int32
    assert np.array_equal(found['gt_seg_map'], GOOD)
    assert found['seg_fields'] == ['gt_seg_map']
    assert f"imdecode_backend='{backend}'" in repr(load)


@each_case('labels, change, match', [
    (np.zeros(SIZE, np.uint8), {}, r'a\.tif has shape .*16-bit'),
    (np.zeros((*SIZE, 3), np.uint8), {}, r'a\.tif has shape .*16-bit'),
    (np.zeros(SIZE, np.float32), {}, r'a\.tif has shape .*16-bit'),
    (GOOD, dict(reduce_zero_label=True), 'labels as they are'),
    (GOOD, dict(label_map={0: 255}), 'labels as they are'),
])
def test_what_does_not_fit_is_refused(tmp_path, labels, change, match):
    write(tmp_path / 'a.tif', labels)
    with pytest.raises(ValueError, match=match):
        Load16BitAnnotations()(dict(results(tmp_path / 'a.tif'), **change))


def test_tool_writes_no_label_maps_of_8_bits(tree, tmp_path, monkeypatch,
                                             capsys):
    config = tmp_path / 'config.py'
    tree[0].dump(config)
    code, *_ = exit_of('test.py', monkeypatch, capsys, str(config),
                       'weights.pth', '--out', str(tmp_path / 'labels'))
    assert 'label maps of 8 bits' in code and 'config.py' in code
    assert [p.name for p in tmp_path.iterdir()] == ['config.py']


def test_a_picture_of_ones_own_has_no_labels(tree):
    dataset = tree[0].test_dataloader.dataset
    image = f'{dataset.data_root}/{dataset.data_prefix.img_path}/0.jpg'
    packed = Compose(dataset.pipeline)(dict(img_path=image))
    assert 'gt_sem_seg' not in packed['data_samples']


def test_stock_config_needs_another_loader():
    path = 'stock/bisenetv2_fcn_1xb8-10k_camvid-360x480.py'
    cfg = load_config(CONFIGS / path)
    cfg.test_dataloader.dataset.pipeline[1].type = 'Load16BitAnnotations'
    with pytest.raises(ValueError, match="'Load16BitAnnotations' is defined"):
        to_stock_cfg(cfg)
