# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Region embeddings in pipelines, data loaders and processes."""
import copy
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from tiny import SIZE, tiny_config
from tool_modules import load_tool
from torch.utils.data import DataLoader

from mmseg_textkd import add_region_embeddings
from mmseg_textkd.clip.image_tower import ImageTower
from mmseg_textkd.clip.region_embeddings import RegionEmbeddings
from mmseg_textkd.datasets.encode_regions import ensure_regions

ROOT = Path(__file__).resolve().parents[2]
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
        dict(
            type='LoadRegionEmbeddings',
            folder=str(tmp_path / 'regions'),
            model='toyclip',
            min_pixels=1))
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


def entries(tmp_path):
    return sorted((tmp_path / 'regions').glob('??/*.safetensors'))


def assert_same(got, expected):
    assert torch.equal(got.labels, expected.labels)
    assert torch.equal(got.vectors, expected.vectors)


def test_the_config_helper(tmp_path):
    loader = tiny_config(tmp_path).train_dataloader.to_dict()
    before = copy.deepcopy(loader)
    transform = dict(type='LoadRegionEmbeddings', folder='f', model='toyclip')
    changed = add_region_embeddings(
        dict(dataset=dict(datasets=[loader, loader])), transform)
    assert loader == before
    for part in changed['dataset']['datasets']:
        assert [t['type'] for t in part['dataset']['pipeline']] == [
            'LoadImageFromFile', 'LoadAnnotations', 'LoadRegionEmbeddings',
            'PackRegionInputs'
        ]
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
    assert_same(sample['data_samples'].region_embeddings, expected)
    assert expected.labels.tolist() == np.unique(labels).tolist()
    # They go where the labels go, through the preprocessor.
    preprocessor = MODELS.build(
        dict(
            type='SegDataPreProcessor', mean=[0.] * 3, std=[1.] * 3,
            size=SIZE))
    batch = preprocessor(
        dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]),
        training=True)
    moved = batch['data_samples'][0]
    assert_same(moved.region_embeddings, expected)
    assert moved.to('meta').region_embeddings.vectors.is_meta


def test_bad_pipelines(cfg):
    dataset = cfg.train_dataloader.dataset
    pipeline = dataset.pipeline
    dataset.pipeline = [*pipeline[:2], *pipeline[3:]]
    with pytest.raises(KeyError, match='put LoadRegionEmbeddings behind'):
        build(cfg)[0]
    dataset.pipeline = [pipeline[0], *pipeline[2:]]
    with pytest.raises(ValueError, match='none for.*directly behind Load'):
        build(cfg)[0]
    dataset.pipeline = [dict(pipeline[0], to_float32=True), *pipeline[1:]]
    with pytest.raises(ValueError, match=r'float32 \(32, 64, 3\) and uint8'):
        build(cfg)[0]


@pytest.mark.stacks
def test_a_data_set_is_gone_through_once(cfg, tmp_path, calls, monkeypatch):
    assert ensure_regions(cfg) == 6 == len(calls) == len(entries(tmp_path))
    samples = [s['data_samples'].region_embeddings for s in build(cfg)]
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
    for sample, expected in zip(build(cfg), samples):
        assert_same(sample['data_samples'].region_embeddings, expected)
    assert len(calls) == 8 and len(entries(tmp_path)) == 6

    # A changed label map; another data set in the same folder.
    path = str(tmp_path / 'data' / 'ann' / '3.png')
    labels = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    cv2.imwrite(path, (labels + 1) % 8)
    assert ensure_regions(cfg) == 1 and len(calls) == 9
    changed = build(cfg)[3]['data_samples'].region_embeddings
    assert changed.labels.tolist() == np.unique((labels + 1) % 8).tolist()
    cfg.train_dataloader.dataset.reduce_zero_label = True
    assert ensure_regions(cfg) == 6
    assert ensure_regions(Config(dict())) == 0


def go(cfg, queue=None, kill_at=None):
    """Fill the folder in a process of its own, or die on the way."""
    torch.set_num_threads(1)
    if kill_at is not None:
        replace, done = os.replace, []

        def dying(source, target):
            if str(target).endswith('.safetensors'):
                done.append(target)
                if len(done) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
    made = ensure_regions(cfg)
    if queue is not None:
        queue.put(made)


@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
def test_killed_and_gone_on_with_two_at_once(cfg, tmp_path, calls):
    process = fork.Process(target=go, args=(cfg, ), kwargs=dict(kill_at=3))
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
    loader = DataLoader(
        build(cfg),
        batch_size=None,
        num_workers=2,
        multiprocessing_context='fork')
    samples = [s['data_samples'].region_embeddings for s in loader]
    assert not calls and len(entries(tmp_path)) == 6
    for sample, again in zip(samples, build(cfg)):
        assert_same(again['data_samples'].region_embeddings, sample)
    assert not calls
    for path in entries(tmp_path):
        assert RegionEmbeddings.load(path, path.stem) is not None


def test_the_tool(cfg, tmp_path, capsys):
    tool = load_tool('encode_regions.py')
    path = tmp_path / 'config.py'
    cfg.dump(path)
    tool.main([str(path)])
    out, err = capsys.readouterr()
    assert out.endswith('6 images encoded; all others were there\n')
    # The bar is for terminals.
    assert 'Encoding regions' not in err
    tool.main([str(path)])
    assert capsys.readouterr().out.endswith('0 images encoded; all others '
                                            'were there\n')
    for words, message in (
        ([str(tmp_path / 'none.py')], 'Error: '),
        ([str(path), '--cfg-options',
          'train_dataloader=0'], 'has a LoadRegionEmbeddings'),
    ):
        with pytest.raises(SystemExit) as info:
            tool.main(words)
        assert message in str(info.value.code)
