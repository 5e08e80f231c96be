# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Region embeddings in pipelines, data loaders and processes."""
import copy
import multiprocessing
import os
import signal
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from tiny import SIZE, tiny_config
from tool_modules import fails, load_tool
from torch.utils.data import DataLoader

from mmseg_textkd import add_region_embeddings
from mmseg_textkd.clip.image_tower import ImageTower
from mmseg_textkd.clip.region_embeddings import RegionEmbeddings
from mmseg_textkd.datasets.encode_regions import ensure_regions

LOAD = dict(type='LoadRegionEmbeddings', model='toyclip')
# Processes are forked: a new interpreter would take seconds to start.
fork = multiprocessing.get_context('fork')


@pytest.fixture
def cfg(tmp_path):
    """Six images, and a flip and a resize behind the transform."""
    cfg = tiny_config(tmp_path)
    cfg.train_dataloader.dataset.pipeline[2:2] = [
        dict(type='RandomFlip', prob=1.),
        dict(type='Resize', scale=(40, 20), keep_ratio=False)
    ]
    loader = add_region_embeddings(
        cfg.train_dataloader.to_dict(),
        dict(LOAD, folder=str(tmp_path / 'regions'), min_pixels=1))
    return Config(dict(train_dataloader=loader))


@pytest.fixture
def calls(monkeypatch):
    """Number of images in each call of any image tower but the first."""
    seen, encode = [], ImageTower.encode_image

    def wrapper(self, pictures, *args):
        if hasattr(self, 'dim'):
            seen.append(len(pictures))
        return encode(self, pictures, *args)

    monkeypatch.setattr(ImageTower, 'encode_image', wrapper)
    return seen


def build(cfg):
    return DATASETS.build(cfg.train_dataloader.dataset)


def regions(dataset):
    return [sample['data_samples'].region_embeddings for sample in dataset]


def entries(tmp_path):
    return sorted((tmp_path / 'regions').glob('??/*.safetensors'))


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.vectors, other.vectors)


def test_the_config_helper(tmp_path):
    loader = tiny_config(tmp_path).train_dataloader.to_dict()
    before = copy.deepcopy(loader)
    transform = dict(LOAD, folder='f')
    changed = add_region_embeddings(
        dict(dataset=dict(datasets=[loader, loader])), transform)
    assert loader == before
    for part in changed['dataset']['datasets']:
        names = [t['type'] for t in part['dataset']['pipeline']]
        assert ' '.join(names) == (
            'LoadImageFromFile LoadAnnotations LoadRegionEmbeddings '
            'PackRegionInputs')
    with pytest.raises(ValueError, match="'LoadAnnotations' and"):
        add_region_embeddings(changed, transform)


@pytest.mark.stacks
def test_what_a_sample_brings(cfg, tmp_path):
    sample = build(cfg)[0]
    path = tmp_path / 'data'
    image = cv2.imread(str(path / 'img' / '0.png'))
    labels = cv2.imread(str(path / 'ann' / '0.png'), cv2.IMREAD_UNCHANGED)
    store = TRANSFORMS.build(cfg.train_dataloader.dataset.pipeline[2]).store
    # Of the image as it is on the disk, not as it was flipped and resized.
    assert sample['inputs'].shape == (3, 20, 40)
    expected = store.get(image, labels)
    assert store._tower is None
    assert_same([sample['data_samples'].region_embeddings], [expected])
    assert expected.labels.tolist() == np.unique(labels).tolist()
    # They go where the labels go, through the preprocessor.
    kind = dict(type='SegDataPreProcessor', size=SIZE)
    preprocessor = MODELS.build(dict(kind, mean=[0.] * 3, std=[1.] * 3))
    batch = preprocessor({k: [v] for k, v in sample.items()}, training=True)
    moved = batch['data_samples'][0]
    assert_same([moved.region_embeddings], [expected])
    assert moved.to('meta').region_embeddings.vectors.is_meta


@pytest.mark.parametrize('parts, first, error, match', [
    ([0, 1, 3, 4, 5], {}, KeyError, 'put LoadRegionEmbeddings behind'),
    ([0, 2, 3, 4, 5], {}, ValueError, 'none for.*directly behind Load'),
    (range(6), dict(to_float32=True), ValueError,
     r'float32 \(32, 64, 3\) and uint8'),
])
def test_bad_pipelines(cfg, parts, first, error, match):
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline = [dataset.pipeline[i] for i in parts]
    dataset.pipeline[0].update(first)
    with pytest.raises(error, match=match):
        build(cfg)[0]


@pytest.mark.stacks
def test_a_data_set_is_gone_through_once(cfg, tmp_path, calls, monkeypatch):
    assert ensure_regions(cfg) == 6 == len(calls) == len(entries(tmp_path))
    expected = regions(build(cfg))
    # Not even images are read.
    with monkeypatch.context() as patch:
        patch.setattr(cv2, 'imdecode', None)
        assert ensure_regions(cfg) == 0
    assert ensure_regions(cfg, everything=True) == 0 and len(calls) == 6

    # A damaged entry, made anew by whoever finds it.
    path, *_ = entries(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert ensure_regions(cfg, everything=True) == 1 and len(calls) == 7
    path.write_bytes(b'')
    assert ensure_regions(cfg) == 0  # by the names of files all is there
    assert_same(regions(build(cfg)), expected)
    assert len(calls) == 8 and len(entries(tmp_path)) == 6

    # A changed label map; another data set in the same folder.
    path = str(tmp_path / 'data' / 'ann' / '3.png')
    labels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    cv2.imwrite(path, (labels + 1) % 8)
    assert ensure_regions(cfg) == 1 and len(calls) == 9
    changed = regions(build(cfg))[3]
    assert changed.labels.tolist() == np.unique((labels + 1) % 8).tolist()
    cfg.train_dataloader.dataset.reduce_zero_label = True
    assert ensure_regions(cfg) == 6
    # A transform before it changes the images.
    resize = dict(type='Resize', scale=(40, 20), keep_ratio=False)
    cfg.train_dataloader.dataset.pipeline.insert(2, resize)
    assert ensure_regions(cfg) == 6 and ensure_regions(cfg) == 0
    assert ensure_regions(Config(dict())) == 0


def go(cfg, queue=None):
    """Fill the folder in a process of its own."""
    torch.set_num_threads(1)
    made = ensure_regions(cfg)
    if queue is not None:
        queue.put(made)


@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
def test_killed_and_gone_on_with_two_at_once(cfg, tmp_path, calls,
                                             monkeypatch):
    replace, done = os.replace, []

    def dying(source, target):
        done.extend([target] * str(target).endswith('.safetensors'))
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', dying)
        process = fork.Process(target=go, args=(cfg, ))
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    # Two are whole, of the third there is only what nobody reads.
    assert len(entries(tmp_path)) == 2
    assert len(list((tmp_path / 'regions').glob('??/.*.tmp'))) == 1
    queue = fork.Queue()
    pair = [fork.Process(target=go, args=(cfg, queue)) for _ in range(2)]
    for process in pair:
        process.start()
    made = [queue.get(timeout=60) for _ in pair]
    for process in pair:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(made) == [0, 4]
    assert ensure_regions(cfg, everything=True) == 0 and not calls


@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
def test_workers_make_what_is_missing(cfg, tmp_path, calls):
    """An empty folder, two workers, and no preparation."""
    options = dict(num_workers=2, multiprocessing_context='fork')
    found = regions(DataLoader(build(cfg), batch_size=None, **options))
    assert not calls and len(entries(tmp_path)) == 6
    assert_same(regions(build(cfg)), found)
    assert not calls
    for path in entries(tmp_path):
        assert RegionEmbeddings.load(path, path.stem) is not None


def test_the_tool(cfg, tmp_path, capsys):
    tool = load_tool('encode_regions.py')
    path = tmp_path / 'config.py'
    cfg.dump(path)
    for number in (6, 0):
        tool.main([str(path)])
        out, err = capsys.readouterr()
        assert out.endswith(f'{number} images encoded; all others were '
                            'there\n')
        # The bar is for terminals.
        assert 'Encoding regions' not in err
    for argv, said in (
        ([tmp_path / 'none.py'], 'Error: '),
        ([path, '--cfg-options', 'train_dataloader=0'], 'has a LoadRegionEm'),
    ):
        assert said in fails(tool, capsys, *argv)
