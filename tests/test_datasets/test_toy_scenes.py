# Copyright (c) mmseg_textkd contributors. All rights reserved.
import json
import os

import cv2
import numpy as np
import pytest
from each_case import each_case
from mmengine.config import Config
from mmseg.registry import DATASETS
from network_tester import CONFIGS
from tool_modules import exit_of

from mmseg_textkd.datasets import toy_scenes_generator as generator
from mmseg_textkd.datasets.toy_scenes import ToyScenesDataset
from mmseg_textkd.datasets.toy_scenes_generator import (CLASSES, MANIFEST,
                                                        generate_toy_scenes,
                                                        read_manifest,
                                                        render_scene)

SMALL = dict(num_train=3, num_val=2)


def contents(root):
    """The bytes of all files of a folder."""
    files = [p for p in root.rglob('*') if p.is_file()]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('toy') / 'toy_scenes'
    assert generate_toy_scenes(root, **SMALL)
    return root


def test_layout_labels_and_manifest(made):
    names = {str(p.relative_to(made)) for p in made.rglob('*.png')}
    assert names == {
        f'{part}/{split}/{i:04d}.png'
        for part in ('img_dir', 'ann_dir')
        for split, n in (('train', 3), ('val', 2))
        for i in range(n)
    }
    assert sorted(p.name for p in made.parent.iterdir()) == ['toy_scenes']
    manifest = read_manifest(made)
    assert manifest['seed'] == 0 and manifest['classes'] == list(CLASSES)
    scene = render_scene(0, 'val', 1)
    image, label = (
        cv2.imread(str(made / part / 'val/0001.png'), cv2.IMREAD_UNCHANGED)
        for part in ('img_dir', 'ann_dir'))
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(image, scene.image)
    np.testing.assert_array_equal(label, scene.label)


def test_same_seed_same_bytes_whatever_the_workers(made, tmp_path):
    assert generate_toy_scenes(tmp_path / 'again', workers=2, **SMALL)
    assert contents(tmp_path / 'again') == contents(made)
    # An image does not depend on how many others there are ...
    assert generate_toy_scenes(tmp_path / 'less', num_train=1, num_val=1)
    less, both = contents(tmp_path / 'less'), contents(made)
    del less[MANIFEST]
    assert len(less) == 4 and less.items() <= both.items()
    # ... but on the seed, the split and its number.
    first = render_scene(0, 'train', 0).image
    for other in ((1, 'train', 0), (0, 'val', 0), (0, 'train', 1)):
        assert (render_scene(*other).image != first).mean() > .5


def test_statistics_of_the_classes():
    scenes = [render_scene(0, 'train', i) for i in range(40)]
    bins = np.stack(
        [np.bincount(scene.label.ravel(), minlength=256) for scene in scenes])
    count, present = bins.sum(0), (bins > 0).sum(0)
    share = dict(zip(CLASSES, count[:8] / count.sum()))
    often = dict(zip(CLASSES, present[:8] / len(scenes)))
    assert count[8:255].sum() == 0
    assert .005 < count[255] / count.sum() < .06
    assert min(share.values()) > .003
    # Thin, small and rare against the large ones.
    for name in ('pole', 'truck', 'person'):
        assert share[name] < .03 < .08 < share['sky']
    assert .1 < often['truck'] < .5 and often['car'] > .9
    # Look-alikes: the two grays differ less than either does from the sky.
    road, sidewalk, sky = (
        np.mean([s.image[s.label == CLASSES.index(name)].mean(0)
                 for s in scenes], 0)
        for name in ('road', 'sidewalk', 'sky'))  # yapf: disable
    near = np.linalg.norm(road - sidewalk)
    assert near < .6 * np.linalg.norm(road - sky)


def test_objects_lie_where_the_labels_say():
    checked = 0
    for index in range(10):
        scene = render_scene(3, 'train', index)
        for thing in scene.objects:
            if CLASSES[thing.label] not in ('car', 'truck', 'person'):
                continue
            x1, y1, x2, y2 = thing.box
            assert 0 <= y1 and y2 <= 128 and 0 <= x1 and x2 <= 256
            if x2 - x1 > 2 and y2 - y1 > 4:
                part = scene.label[y1:y2, x1:x2]
                checked += (part == thing.label).any()
    # Some are hidden behind others, most are not.
    assert checked > 30


def test_complete_set_is_left_alone_and_force_renews(made, tmp_path):
    root = tmp_path / 'set'
    assert generate_toy_scenes(root, **SMALL)
    stamp = os.stat(root / 'img_dir/train/0000.png').st_mtime_ns
    assert not generate_toy_scenes(root, **SMALL)
    assert os.stat(root / 'img_dir/train/0000.png').st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match='other settings.*--force'):
        generate_toy_scenes(root, seed=5, **SMALL)
    assert contents(root) == contents(made)
    assert generate_toy_scenes(root, seed=5, force=True, **SMALL)
    assert contents(root) != contents(made)
    (root / 'ann_dir/val/0001.png').unlink()
    assert read_manifest(root) is None
    with pytest.raises(FileExistsError, match='incomplete.*--force'):
        generate_toy_scenes(root, seed=5, **SMALL)
    assert generate_toy_scenes(root, force=True, **SMALL)
    assert contents(root) == contents(made)
    assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_foreign_folder_is_never_replaced(tmp_path):
    root = tmp_path / 'set'
    root.mkdir()
    (root / 'thesis.txt').write_text('mine')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='not ToyScenes'):
            generate_toy_scenes(root, force=force, **SMALL)
    assert (root / 'thesis.txt').read_text() == 'mine'
    # Any data set of MMSegmentation may have these folders.
    (root / 'thesis.txt').unlink()
    (root / 'img_dir').mkdir()
    with pytest.raises(FileExistsError, match='not ToyScenes'):
        generate_toy_scenes(root, force=True, **SMALL)
    assert os.listdir(root) == ['img_dir']


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    calls = []

    def fail_late(item, **kwargs):
        calls.append(item)
        if len(calls) == 3:
            raise OSError('disk full')

    monkeypatch.setattr(generator, '_write_scene', fail_late)
    with pytest.raises(OSError, match='disk full'):
        generate_toy_scenes(tmp_path / 'set', **SMALL)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


@each_case('wrong', [
    dict(num_train=0),
    dict(seed=-1),
    dict(height=8),
    dict(workers=0),
])
def test_numbers_out_of_range(wrong, tmp_path):
    with pytest.raises(ValueError, match=f'{list(wrong)[0]} must be'):
        generate_toy_scenes(tmp_path / 'set', **wrong)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path, monkeypatch, capsys):
    root = str(tmp_path / 'set')

    def call(*more):
        return exit_of('dataset_converters/toy_scenes.py', monkeypatch, capsys,
                       root, '--num-train=1', '--num-val=1', *more)

    code, out, _ = call()
    assert code == 0 and '1 training and 1 validation' in out
    manifest = json.loads((tmp_path / 'set' / MANIFEST).read_text())
    assert manifest['splits'] == dict(train=1, val=1)
    code, out, _ = call()
    assert code == 0 and 'nothing to do' in out
    code, out, err = call('--seed=1')
    assert code == 1 and '--force' in err and not out


def test_dataset_through_the_base_config(made):
    cfg = Config.fromfile(CONFIGS / '_base_/datasets/toy_scenes-128x256.py')
    for loader, count in (('train', 3), ('val', 2), ('test', 2)):
        part = cfg[f'{loader}_dataloader'].dataset
        part.data_root = str(made)
        part.pipeline[0].imdecode_backend = 'cv2'
        dataset = DATASETS.build(part)
        assert isinstance(dataset, ToyScenesDataset) and len(dataset) == count
        assert dataset.metainfo['classes'] == CLASSES
        assert len(dataset.metainfo['palette']) == 8
        item = dataset[1]
        image, sample = item['inputs'].numpy(), item['data_samples']
        assert image.shape == (3, 128, 256)
        scene = render_scene(0, 'train' if loader == 'train' else 'val', 1)
        label = scene.label
        if sample.metainfo.get('flip'):
            label = label[:, ::-1]
        np.testing.assert_array_equal(sample.gt_sem_seg.data[0], label)
        if loader != 'train':
            np.testing.assert_array_equal(
                image.transpose(1, 2, 0), scene.image)


def test_missing_data_names_the_command(tmp_path):
    prefix = dict(img_path='img_dir/train', seg_map_path='ann_dir/train')

    def build(root, **options):
        return ToyScenesDataset(
            data_root=str(tmp_path / root), data_prefix=prefix, **options)

    match = r'(?s)no folder .*nowhere.*dataset_converters/toy_scenes.py'
    with pytest.raises(FileNotFoundError, match=match):
        build('nowhere')
    for folder in prefix.values():
        (tmp_path / 'empty' / folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r'no \*\.png .*toy_scenes.py'):
        build('empty')
    # Metainfo alone needs no files.
    assert build('empty', lazy_init=True).metainfo['classes'][4] == 'pole'
