# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The image tower, and the folder of what it has seen."""
import functools
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from PIL import Image
from tiny_clip import save_model

from mmseg_textkd.clip.image_tower import ImageTower
from mmseg_textkd.clip.region_embeddings import RegionEmbeddings
from mmseg_textkd.clip.region_store import RegionStore
from mmseg_textkd.clip.weights import TOY_CLIP, TextTowerError


@pytest.fixture(scope='module')
def scene():
    """An image, and labels with a class of 20 pixels and an ignored one."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)
    labels = np.kron([[0, 1, 0], [2, 5, 255]], np.ones(
        (20, 25))).astype(np.uint8)[:, :70]
    labels[3:7, 10:15] = 4
    return image, labels


@pytest.fixture
def new_store(tmp_path, clip_name):
    return functools.partial(RegionStore, tmp_path, clip_name)


@pytest.fixture
def calls(monkeypatch):
    """Number of images in each call of any image tower."""
    seen, encode = [], ImageTower.encode_image

    def wrapper(self, pictures, *args):
        seen.append(len(pictures))
        return encode(self, pictures, *args)

    monkeypatch.setattr(ImageTower, 'encode_image', wrapper)
    return seen


@pytest.mark.stacks
@each_case('name', ['toyclip', 'clip', 'eos'])
def test_parity_with_open_clip(name, clip_dirs):
    folder = TOY_CLIP if name == 'toyclip' else clip_dirs[name]
    model = f'local-dir:{folder}'
    tower = ImageTower('toyclip' if name == 'toyclip' else model)
    clip, _, prepare = open_clip.create_model_and_transforms(
        model, image_resize_mode='squash')
    # Smooth, as images are: resizing rounds a little otherwise in PIL.
    coarse = torch.from_numpy(
        np.random.default_rng(1).uniform(0, 255, (1, 3, 5, 6)))
    picture = F.interpolate(coarse, size=(50, 90), mode='bilinear')[0].byte()

    def both(picture):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        with torch.no_grad():
            expected = clip.eval().encode_image(prepare(image)[None])
        return tower.encode_image(tower.resize(picture)[None]), expected

    assert F.cosine_similarity(*both(picture)).item() > 0.9999
    # Where nothing is resized it is the same.
    got, expected = both(picture[:, 8:40, 8:40])
    assert (got - expected).abs().max() <= 1e-5
    assert tower.size == (32, 32) and tower.dim == expected.shape[1]


def test_the_tower_is_frozen(clip_name):
    tower = ImageTower(clip_name)
    before = tower.checksum()
    assert not tower.train().visual.training
    assert not any(p.requires_grad for p in tower.parameters())
    with torch.autocast('cpu', torch.bfloat16):
        vectors = tower.encode_image(torch.rand(3, 3, 32, 32) * 255, 2)
    assert vectors.dtype == torch.float32 and not vectors.requires_grad
    assert tower.checksum() == before
    with torch.no_grad():
        next(tower.parameters()).view(-1)[0] += 1e-3
    assert tower.checksum() != before


@pytest.mark.stacks
def test_regions_of_a_scene(scene, clip_name, new_store):
    """Boxes, grayed pixels and vectors, each on its own."""
    image, labels = scene
    store = new_store(min_pixels=21)
    regions = store.get(image, labels)
    # Class 4 is too small, 255 no class.
    assert regions.labels.tolist() == [0, 1, 2, 5]
    assert regions.vectors.norm(dim=1).allclose(torch.ones(4))
    tower = ImageTower(clip_name)
    for label, vector in zip(regions.labels.tolist(), regions.vectors):
        ys, xs = (labels == label).nonzero()
        box = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
        grayed = np.where((labels == label)[..., None], image[..., ::-1], 128.)
        picture = tower.resize(torch.from_numpy(grayed[box]).permute(2, 0, 1))
        expected = F.normalize(tower.encode_image(picture[None]), dim=1)
        assert (expected[0] - vector).abs().max() <= 1e-5
    larger = new_store(min_pixels=20)
    assert larger.get(image, labels).labels.tolist() == [0, 1, 2, 4, 5]
    empty = store.get(image, np.full_like(labels, 255))
    assert empty.labels.shape == (0, ) and empty.vectors.shape == (0, 24)


@pytest.mark.stacks
def test_the_second_time_nothing_is_computed(scene, new_store, calls):
    first = new_store().get(*scene)
    assert calls == [1, 4]  # a sample on loading, then the scene
    store = new_store()
    store.check_weights()
    for regions in (store.get(*scene), store.get(*scene)):
        assert torch.equal(regions.vectors, first.vectors)
        assert torch.equal(regions.labels, first.labels)
    assert calls == [1, 4] and store._tower is None


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == 'truncated':
        data = data[:-7]
    elif isinstance(how, bytes):
        data = how
    else:
        # In the header, whose order is random, some bytes mean nothing.
        start = 8 + int.from_bytes(data[:8], 'little')
        place = start + int(how * (len(data) - 1 - start))
        data[place if how else 0] ^= 1
    path.write_bytes(data)


# Numbers: where in the tensors a bit flips; 0: in the length of the header.
@each_case('how', [
    'truncated', b'', b'not a file of tensors, but as long as one may be',
    'swapped', 0., .2, .5, 1.
])
def test_damaged_entries_are_made_anew(how, scene, new_store, calls, log):
    image, labels = scene
    store = new_store()
    first, key = store.get(image, labels), store.key(image, labels)
    path = store.path(key)
    if how == 'swapped':  # a sound file in the wrong place
        store.get(image[:, ::-1], labels)
        shutil.copy(store.path(store.key(image[:, ::-1], labels)), path)
    else:
        damage(path, how)
    count = len(calls)
    log.truncate(0)
    again = new_store().get(image, labels)
    assert torch.equal(again.vectors, first.vectors)
    assert len(calls) == count + 2
    healed = RegionEmbeddings.load(path, key)
    assert torch.equal(healed.vectors, first.vectors)
    assert 'is damaged; making it anew' in log.getvalue()
    # A reader that may not make it does not believe it either.
    damage(path, .5)
    assert RegionEmbeddings.load(path, key) is None


def test_stale_entries_are_not_found(scene, new_store, calls):
    image, labels = scene
    store = new_store()
    store.get(image, labels)
    changed_image, changed_labels = image.copy(), labels.copy()
    changed_image[0, 0, 0] ^= 1
    changed_labels[0, 0] = 1
    for args in ((changed_image, labels), (image, changed_labels),
                 (image.reshape(70, 40, 3), labels.reshape(70, 40))):
        number = len(calls)
        store.get(*args)
        assert len(calls) == number + 1
    options = ({}, dict(min_pixels=3), dict(fill=0), dict(ignore_index=0))
    assert len({new_store(**o).key(image, labels) for o in options}) == 4


def test_another_tower_under_the_same_name(scene, tmp_path, calls):
    name, other = (f'local-dir:{tmp_path}/{n}' for n in ('model', 'other'))
    folder, mirrored = tmp_path / 'regions', (scene[0][::-1], scene[1])
    save_model(tmp_path / 'model', 'clip')
    first = RegionStore(folder, name).get(*scene)
    shutil.rmtree(tmp_path / 'model')

    # Without weights the folder serves on, but makes nothing.
    store = RegionStore(folder, name)
    store.check_weights()
    assert torch.equal(store.get(*scene).vectors, first.vectors)
    for store, images in ((store, mirrored),
                          (RegionStore(tmp_path / 'empty', name), scene)):
        with pytest.raises(TextTowerError, match='there is no such folder'):
            store.get(*images)

    save_model(tmp_path / 'model', 'clip', seed=1)
    # In the middle of a run: no mixture of two towers.
    with pytest.raises(RuntimeError, match='tools/encode_regions.py'):
        RegionStore(folder, name).get(*mirrored)
    store = RegionStore(folder, name)
    store.check_weights()
    second = store.get(*scene)
    # Other processes go by the note.
    assert RegionStore(folder, name).settings == store.settings
    assert F.cosine_similarity(first.vectors, second.vectors).max() < .99
    # Two towers side by side in one folder.
    save_model(tmp_path / 'other', 'clip', seed=2)
    RegionStore(folder, other).get(*scene)
    number = len(calls)
    for model in (name, other):
        RegionStore(folder, model).get(*scene)
    notes = list(folder.glob('tower-*.json'))
    assert len({json.loads(p.read_text())['weights'] for p in notes}) == 2
    # A damaged note is written anew.
    for note in notes:
        note.write_text('{')
    again = RegionStore(folder, name).get(*scene)
    assert torch.equal(again.vectors, second.vectors)
    assert len(calls) == number


def test_bad_arguments(new_store):
    with pytest.raises(ValueError, match='`min_pixels` must be at least 1'):
        new_store(min_pixels=0)
    with pytest.raises(ValueError, match='`fill` must be in'):
        new_store(fill=256)
