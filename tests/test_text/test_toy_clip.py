# Copyright (c) mmseg_textkd contributors. All rights reserved.
import gzip
import importlib
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from each_case import each_case
from tiny import CLASSES, assert_equal
from tiny_clip import open_clip_model

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'mmseg_textkd' / 'clip' / 'toy_clip'
TOOL = ROOT / 'tools' / 'toy_clip'


@pytest.fixture(scope='module')
def tool():
    """The training script as a module, with its neighbors."""
    before = dict(sys.modules)
    sys.path.insert(0, str(TOOL))
    try:
        names = ('corpus', 'bpe', 'measure', 'regions', 'train')
        for name in names:
            sys.modules.pop(name, None)
        yield importlib.import_module('train')
    finally:
        sys.path.remove(str(TOOL))
        for name in names:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


@pytest.fixture(scope='module')
def toy_clip():
    return open_clip_model(FOLDER)


@pytest.fixture(scope='module')
def held_out(tool):
    return tool.make_crops(11, 'toy_clip_test', 60)


def _vectors(toy_clip, words, template='a photo of a {}.'):
    model, tokenizer = toy_clip
    with torch.no_grad():
        return model.encode_text(
            tokenizer([template.format(w) for w in words]), normalize=True)


def test_folder_is_small_and_portable():
    names = {p.name for p in FOLDER.iterdir() if p.is_file()}
    assert {
        'open_clip_config.json', 'open_clip_model.safetensors',
        'bpe_vocab.txt.gz', 'README.md'
    } <= names
    assert not [n for n in names if n.endswith(('.tmp', '.bin', '.pt'))]
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 4e6
    # No path among the texts of the config.
    config = (FOLDER / 'open_clip_config.json').read_text()
    assert re.findall(r': "(.*?)"', config) == ['bicubic', 'squash']
    card = (FOLDER / 'README.md').read_text()
    assert 'toy' in card.split('\n\n')[1] and 'ToyScenes' in card
    assert '{' not in card.replace("{folder}", '')


def test_vocabulary_file(toy_clip, tool):
    raw = (FOLDER / 'bpe_vocab.txt.gz').read_bytes()
    assert raw[4:8] == bytes(4)  # no time of writing
    merges = gzip.decompress(raw).decode().split('\n')[1:]
    assert len(set(merges)) == len(merges)
    assert all(len(pair.split()) == 2 for pair in merges)
    model, tokenizer = toy_clip
    assert tokenizer.vocab_size == len(merges) + 514 < 1100
    assert model.token_embedding.num_embeddings == tokenizer.vocab_size
    assert tokenizer(['x']).shape == (1, 32) == (1, model.context_length)
    # Words of the scenes and of users' templates are whole; others are spelt.
    text = 'this is a blurry photo of the large pedestrian in the scene'
    assert len(tokenizer.encode(text)) == len(text.split())
    assert len(tokenizer.encode('xylophone')) > 4
    other = tokenizer.encode('Zürich tram 7')
    assert tokenizer.decode(other) == ('zürich tram 7 ')
    sentences = [t.format('street light') for t in tool.TEMPLATES]
    assert max(len(tokenizer.encode(s)) for s in sentences) + 2 <= 20


def test_merges_of_a_known_text(tool, tmp_path):
    from open_clip.tokenizer import SimpleTokenizer
    bpe = sys.modules['bpe']
    merges = bpe.train_merges(['aab aab aab ab', 'aab cd'], 3)
    # Counts: a+a 4, a+b</w> 5 -> first; then a+ab</w> 4; then c+d</w> 1.
    assert merges == [('a', 'b</w>'), ('a', 'ab</w>'), ('c', 'd</w>')]
    assert bpe.train_merges(['ab'], 99) == [('a', 'b</w>')]
    packed = bpe.pack_merges(merges)
    assert packed == bpe.pack_merges(merges)
    assert gzip.decompress(packed).decode() == (
        '#version: 0.2\na b</w>\na ab</w>\nc d</w>')
    (tmp_path / 'bpe.gz').write_bytes(packed)
    tokenizer = SimpleTokenizer(bpe_path=str(tmp_path / 'bpe.gz'))
    assert tokenizer.vocab_size == 514 + 3
    assert [tokenizer.bpe(w)
            for w in ('aab', 'cab')] == ['aab</w>', 'c ab</w>']


def test_held_out_retrieval(toy_clip, tool, held_out):
    assert len(held_out) > 500
    figures = tool.evaluate(*toy_clip, held_out, seed=1)
    assert figures['accuracy'] > 3 / 8
    assert min(figures['per_class'].values()) > 1 / 8
    assert figures['recall_1'] > 5 / 100
    assert figures['recall_5'] > 20 / 100
    assert figures['relations'] == 1
    # A model that was not trained is at chance.
    torch.manual_seed(0)
    model = open_clip.create_model(f'local-dir:{FOLDER}', load_weights=False)
    figures = tool.evaluate(model, toy_clip[1], held_out, seed=1)
    assert figures['accuracy'] < .25 and figures['recall_1'] < .05


def test_class_names_have_distinct_vectors(toy_clip):
    vectors = _vectors(toy_clip, CLASSES)
    assert vectors.shape == (8, 64) and torch.isfinite(vectors).all()
    others = vectors @ vectors.T - 2 * torch.eye(8)
    assert others.max() < .97
    # The look-alikes are the closest: car-truck and road-sidewalk.
    closest = dict(zip(CLASSES, (CLASSES[k] for k in others.argmax(1))))
    assert (closest['truck'], closest['road']) == ('car', 'sidewalk')


@each_case('template', ['a photo of a {}.', '{}'])
@each_case('word,near,far', [
    ('car', 'automobile', 'sky'),
    ('car', 'truck', 'sky'),
    ('road', 'sidewalk', 'person'),
    ('road', 'street', 'building'),
    ('person', 'pedestrian', 'building'),
    ('truck', 'truck', 'person'),
    ('sidewalk', 'pavement', 'sky'),
    ('building', 'tower', 'car'),
])
def test_related_words_are_closer(toy_clip, template, word, near, far):
    a, b, c = _vectors(toy_clip, (word, near, far), template)
    assert a @ b > a @ c + .05


def test_templates_move_a_class_less_than_another_class(toy_clip):
    templates = ('a photo of a {}.', 'a blurry photo of the {}.',
                 'there is a {} in the scene.')
    sets = [_vectors(toy_clip, CLASSES, t) for t in templates]
    hits = [((a @ b.T).argmax(1) == torch.arange(8)).float().mean()
            for a, b in itertools.permutations(sets, 2)]
    assert np.mean(hits) > .9


def test_training_is_reproducible(toy_clip, tool):
    crops = tool.make_crops(0, 'toy_clip_test', 12)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = open_clip.create_model(
            f'local-dir:{FOLDER}', load_weights=False)
        tool.train(model, toy_clip[1], crops, steps=6, batch=36, seed=0)
        results.append(model.state_dict())
    assert_equal(*results)


def test_patches_and_regions(toy_clip, tool):
    regions = sys.modules['regions']
    windows = regions.make_windows(11, 'toy_clip_test', 60)
    figures = regions.evaluate_regions(*toy_clip, windows)
    assert figures['patches'] > 4 / 8 and figures['regions'] > 5 / 8
    # At its own size the tower's image is what comes out.
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = regions.encode(toy_clip[0].visual, images)
        found = features._project(features.states[-1][:, 0])
        expected = toy_clip[0].encode_image(images)
    assert torch.allclose(found, expected, atol=1e-5)


def test_shares_of_classes_in_patches(tool):
    regions = sys.modules['regions']
    labels = torch.full((1, 16, 8), 255)
    labels[0, :8, :4] = 2
    labels[0, 8:] = 7
    labels[0, 8, :] = 0
    found = regions.shares(labels)
    assert found.shape == (1, 8, 2, 1)
    assert found[0, :, 0, 0].tolist() == [0, 0, .5, 0, 0, 0, 0, 0]
    assert found[0, :, 1, 0].tolist() == [1 / 8, 0, 0, 0, 0, 0, 0, 7 / 8]


def test_regions_leave_the_words_alone(toy_clip, tool):
    regions = sys.modules['regions']
    crops = tool.make_crops(0, 'toy_clip_test', 12)
    windows = regions.make_windows(0, 'toy_clip_test', 12)
    results = []
    for _ in range(2):
        model = open_clip.create_model(f'local-dir:{FOLDER}')
        crop_loss = tool.make_crop_loss(model, toy_clip[1], crops, 36)
        regions.train_regions(model, toy_clip[1], windows, crop_loss, 3, 4, 0)
        results.append(model.state_dict())
    assert_equal(*results)  # reproducible
    before = toy_clip[0].state_dict()
    for name, value in results[0].items():
        if name == 'visual.proj' or not name.startswith('visual'):
            moved = not torch.equal(value, before[name])
            assert moved == name.startswith('visual'), name
