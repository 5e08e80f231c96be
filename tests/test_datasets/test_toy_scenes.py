# Copyright (c) mmseg_textkd contributors. All rights reserved.
import hashlib
import json
import os
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from each_case import each_case

from mmseg_textkd.datasets import toy_scenes_generator as generator
from mmseg_textkd.datasets.toy_scenes_generator import (CLASSES, MANIFEST,
                                                        generate_toy_scenes,
                                                        read_manifest,
                                                        render_scene)

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(num_train=3, num_val=2)


def _digest(root: Path) -> dict:
    files = sorted(p for p in root.rglob('*') if p.is_file())
    assert files
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in files
    }


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
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
    image = cv2.imread(str(made / 'img_dir/val/0001.png'))
    label = cv2.imread(
        str(made / 'ann_dir/val/0001.png'), cv2.IMREAD_UNCHANGED)
    assert label.dtype == np.uint8 and label.ndim == 2
    np.testing.assert_array_equal(image, scene.image)
    np.testing.assert_array_equal(label, scene.label)


def test_same_seed_same_bytes_whatever_the_workers(made, tmp_path):
    assert generate_toy_scenes(tmp_path / 'again', workers=2, **SMALL)
    assert _digest(tmp_path / 'again') == _digest(made)
    # An image does not depend on how many others there are ...
    assert generate_toy_scenes(tmp_path / 'less', num_train=1, num_val=1)
    both = _digest(made)
    same = [
        both[k] == v for k, v in _digest(tmp_path / 'less').items()
        if k != MANIFEST
    ]
    assert same == [True] * 4
    # ... but on the seed, the split and its number.
    first = render_scene(0, 'train', 0).image
    for other in ((1, 'train', 0), (0, 'val', 0), (0, 'train', 1)):
        assert (render_scene(*other).image != first).mean() > .5


def test_statistics_of_the_classes():
    scenes = [render_scene(0, 'train', i) for i in range(40)]
    count = np.zeros(256)
    present = np.zeros(256)
    for scene in scenes:
        bins = np.bincount(scene.label.ravel(), minlength=256)
        count += bins
        present += bins > 0
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
    mean = {
        k:
        np.mean([s.image[s.label == CLASSES.index(k)].mean(0)
                 for s in scenes], 0)
        for k in ('road', 'sidewalk', 'sky')
    }
    near = np.linalg.norm(mean['road'] - mean['sidewalk'])
    assert near < .6 * np.linalg.norm(mean['road'] - mean['sky'])


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
    assert _digest(root) == _digest(made)
    assert generate_toy_scenes(root, seed=5, force=True, **SMALL)
    assert _digest(root) != _digest(made)
    (root / 'ann_dir/val/0001.png').unlink()
    assert read_manifest(root) is None
    with pytest.raises(FileExistsError, match='incomplete.*--force'):
        generate_toy_scenes(root, seed=5, **SMALL)
    assert generate_toy_scenes(root, force=True, **SMALL)
    assert _digest(root) == _digest(made)
    assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_foreign_folder_is_never_replaced(tmp_path):
    root = tmp_path / 'set'
    root.mkdir()
    (root / 'thesis.txt').write_text('mine')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='not ToyScenes'):
            generate_toy_scenes(root, force=force, **SMALL)
    assert [p.name for p in root.iterdir()] == ['thesis.txt']
    # Any data set of MMSegmentation may have these folders.
    (root / 'thesis.txt').unlink()
    (root / 'img_dir').mkdir()
    with pytest.raises(FileExistsError, match='not ToyScenes'):
        generate_toy_scenes(root, force=True, **SMALL)
    assert (root / 'img_dir').is_dir()


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
    script = ROOT / 'tools/dataset_converters/toy_scenes.py'
    argv = [str(script), str(tmp_path / 'set'), '--num-train=1', '--num-val=1']

    def call(*more):
        monkeypatch.setattr(sys, 'argv', argv + list(more))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name='__main__')
        out = capsys.readouterr()
        return end.value.code, out.out, out.err

    code, out, _ = call()
    assert code == 0 and '1 training and 1 validation' in out
    manifest = json.loads((tmp_path / 'set' / MANIFEST).read_text())
    assert manifest['splits'] == dict(train=1, val=1)
    code, out, _ = call()
    assert code == 0 and 'nothing to do' in out
    code, out, err = call('--seed=1')
    assert code == 1 and '--force' in err and not out


def test_dataset_through_the_base_config(made):
    from mmengine.config import Config
    from mmseg.registry import DATASETS

    from mmseg_textkd.datasets.toy_scenes import ToyScenesDataset
    cfg = Config.fromfile(ROOT /
                          'configs/_base_/datasets/toy_scenes-128x256.py')
    for loader, count in (('train_dataloader', 3), ('val_dataloader', 2),
                          ('test_dataloader', 2)):
        part = cfg[loader].dataset
        part.data_root = str(made)
        part.pipeline[0].imdecode_backend = 'cv2'
        dataset = DATASETS.build(dict(part, _scope_='mmseg'))
        assert isinstance(dataset, ToyScenesDataset) and len(dataset) == count
        assert dataset.metainfo['classes'] == CLASSES
        assert len(dataset.metainfo['palette']) == 8
        item = dataset[1]
        assert item['inputs'].shape == (3, 128, 256)
        truth = item['data_samples'].gt_sem_seg.data[0].numpy()
        split = 'train' if count == 3 else 'val'
        label = render_scene(0, split, 1).label
        flipped = item['data_samples'].metainfo.get('flip', False)
        np.testing.assert_array_equal(truth,
                                      label[:, ::-1] if flipped else label)
        if loader != 'train_dataloader':
            np.testing.assert_array_equal(
                item['inputs'].numpy().transpose(1, 2, 0),
                render_scene(0, split, 1).image)


def test_missing_data_names_the_command(made, tmp_path):
    from mmseg_textkd.datasets.toy_scenes import ToyScenesDataset
    prefix = dict(img_path='img_dir/train', seg_map_path='ann_dir/train')
    with pytest.raises(
            FileNotFoundError,
            match=r'(?s)no folder .*nowhere.*dataset_converters/toy_scenes.py'
    ):
        ToyScenesDataset(
            data_root=str(tmp_path / 'nowhere'), data_prefix=prefix)
    empty = tmp_path / 'empty'
    for folder in prefix.values():
        (empty / folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r'no \*\.png .*toy_scenes.py'):
        ToyScenesDataset(data_root=str(empty), data_prefix=prefix)
    # Metainfo alone needs no files.
    lazy = ToyScenesDataset(
        data_root=str(empty), data_prefix=prefix, lazy_init=True)
    assert lazy.metainfo['classes'][4] == 'pole'
