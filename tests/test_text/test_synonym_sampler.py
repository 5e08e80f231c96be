# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Phrases for training, plain names for everything else."""
import copy

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmseg.registry import MODELS
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from mmseg_textkd.models.text_providers import phrase_bank
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.text.phrases import phrase_confidence, phrase_vectors

D, T = 16, 3
PHRASES = dict(
    road=('road', 'street', 'Truck', 'rubbish'),
    car=('car', 'automobile'),
    truck=('truck', ),
    sky=('sky', 'heavens', 'CAR'))
# Not drawn: those of two classes, and what lies far from its class.
USED = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
EVEN = [[.5, .5, 0, 0], [.5, .5, 0, 0], [1, 0, 0, 0], [.5, .5, 0, 0]]


def write(file, num_templates=T, noise=.05):
    """A file whose phrases lie around their class, but for 'rubbish'."""
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(4, D, generator=generator), dim=1)
    groups = []
    for k, phrases in enumerate(PHRASES.values()):
        middle = torch.stack([
            centers[1 if phrase == 'rubbish' else k] for phrase in phrases
            for _ in range(num_templates)
        ])
        other = torch.randn(*middle.shape, generator=generator)
        groups.append(F.normalize(middle + noise * other, dim=1))
    bank = pad_sequence(groups, batch_first=True)
    vectors = F.normalize(torch.stack([g.mean(0) for g in groups]), dim=1)
    templates = tuple('{}' + '!' * i for i in range(num_templates))
    texts = (tuple(PHRASES), tuple(PHRASES.values()), templates)
    bank = dict(bank=bank, bank_mask=bank.any(dim=2))
    TextEmbeddings(vectors, *texts, **bank).save(file)
    return str(file)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / 'text.safetensors')


@pytest.fixture
def vectors(file):
    return averaged(file)


@pytest.fixture
def plain(vectors):
    """Of the names themselves."""
    return torch.stack([rows[0] for rows in vectors])


def build(file, type='SynonymSampler', **options):
    text = dict(type='SynonymSampler', file=str(file))
    if type != 'SynonymSampler':
        text = dict(type=type, embeddings=text)
    return MODELS.build(dict(text, **dict(num_classes=4) | options)).train()


def seeded(provider, images):
    """What it draws for images, from the same seed each time."""
    torch.manual_seed(5)
    return provider(images)


def distances(a, b):
    """Between all pairs; torch.cdist is not exact for many."""
    return (a[:, None] - b[None]).norm(dim=2)


def averaged(file):
    """Unit vector of each phrase, by class and words, template by template."""
    record = TextEmbeddings.load(file)
    return [
        F.normalize(rows[mask].unflatten(0, (-1, T)).mean(1), dim=1)
        for rows, mask in zip(record.bank, record.bank_mask)
    ]


def counts(provider, file):
    """How often each phrase was drawn in 3000 draws, by class."""
    vectors, found = averaged(file), torch.zeros(4, 4)
    torch.manual_seed(0)
    for _ in range(375):
        text = provider(8)
        assert text.shape == (8, 4, D)
        for k in range(4):
            nearest = distances(text[:, k], vectors[k]).min(dim=1)
            assert nearest.values.max() < 1e-5
            found[k] += torch.bincount(nearest.indices, minlength=4)
    return found


def test_plain_names_everywhere_but_in_training(file, plain):
    provider = build(file)
    assert_close(provider.class_embeddings, plain)
    assert not torch.equal(provider(2)[0], provider.class_embeddings)
    state = torch.get_rng_state()
    for text in (provider.eval()(3), provider.expected()):
        assert_close(text, plain)
    # Only drawing moves the random state.
    assert torch.equal(state, torch.get_rng_state())
    # Neither bank nor draws are saved, nor change what is.
    assert list(provider.state_dict()) == ['class_embeddings']
    # The mean over the phrases, of which the file is made, is another thing.
    assert (plain - TextEmbeddings.load(file).vectors).abs().max() > .01
    # By itself it has them in stage 2 too.
    provider.train().start_learning()
    assert_close(provider(3), provider.class_embeddings)
    provider.stop_learning()
    assert provider(3).dim() == 3


def test_templates_are_averaged_within_a_phrase(file, vectors, plain):
    """And the confidence of a phrase is the probability of a classifier."""
    record = TextEmbeddings.load(file)
    rows, mask = phrase_vectors(record)
    assert_close(rows, pad_sequence(vectors, batch_first=True))
    assert mask.tolist() == [[r < len(v) for r in range(4)] for v in vectors]
    expected = (100 * rows @ plain.T).softmax(2).diagonal(0, 0, 2).T * mask
    scores = phrase_confidence(record)
    assert_close(scores, expected)
    assert scores[0, 3] < .01 < .9 < scores[0, 1]


def test_uniform_draws(file):
    """3000 draws a class: chi-square of one degree of freedom."""
    found = counts(build(file), file)
    assert found.sum(dim=1).tolist() == [3000] * 4
    expected = 3000 * torch.tensor(EVEN)
    assert (found[expected == 0] == 0).all()
    squares = (found - expected).square() / expected
    # 10.8 is exceeded once in a thousand times.
    assert squares.nan_to_num(0).sum(dim=1).max() < 10.8


def test_each_image_and_class_draws_by_itself(file, vectors):
    torch.manual_seed(0)
    text = build(file)(4000)
    second, other = (
        distances(text[:, k], vectors[k])[:, 1] < 1e-5 for k in (0, 1))
    table = torch.bincount(2 * second + other)
    # 1000 each, standard deviation 27.
    assert len(table) == 4 and (table - 1000).abs().max() < 110
    # Neighboring images too.
    assert abs((second[1:] == second[:-1]).float().mean() - .5) < .03


def test_draws_follow_the_seed_and_nothing_else(file):
    provider, again = build(file), build(file)
    first = seeded(provider, 6)
    assert torch.equal(seeded(again, 6), first)
    assert not torch.equal(again(6), first)
    # Copies draw too, as the averaged model does.
    provider = build(file, 'ResidualPromptLearner')
    expected = seeded(provider, 2)
    assert torch.equal(seeded(copy.deepcopy(provider), 2), expected)


def test_ranks_draw_the_parts_of_one_batch(file, monkeypatch):
    """MMEngine gives all ranks one seed."""
    provider = build(file)
    whole = seeded(provider, 6)
    monkeypatch.setattr(phrase_bank, 'get_world_size', lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(phrase_bank, 'get_rank', lambda: rank)
        parts.append(seeded(provider, 3))
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(*parts)


def test_weighted_draws(tmp_path):
    """By the probability that CLIP's classifier gives, where it is enough."""
    file = write(tmp_path / 'text.safetensors', noise=.9)
    weights = phrase_confidence(TextEmbeddings.load(file))
    # 'Truck' and 'CAR' name two classes.
    weights[0, 2] = weights[3, 2] = 0
    some = sorted(weights[weights > 1e-3].tolist())
    assert some[0] < .5 < some[-1]
    for threshold in (.001, .5):
        expected = weights.where(weights >= threshold, 0)
        expected = F.normalize(expected, p=1, dim=1)
        provider = build(file, mode='weighted', threshold=threshold)
        assert_close(provider.phrase_bank.probability, expected)
    found = counts(provider, file) / 3000
    assert (found[expected == 0] == 0).all()
    # Standard deviation of a share: at most 0.0092.
    assert (found - expected).abs().max() < .035


@each_case('center', [False, True])
def test_mean_and_max(file, vectors, plain, center):
    if center:
        shift = plain.mean(0)
        vectors = [F.normalize(v - shift, dim=1) for v in vectors]
    used = [v[torch.tensor(u[:len(v)]).bool()] for v, u in zip(vectors, USED)]
    mean = build(file, mode='mean', center=center)(7)
    expected = torch.stack([u.mean(0) for u in used])
    assert_close(mean, F.normalize(expected, dim=1))
    best = build(file, mode='max', center=center)(7)
    assert best.shape == (1, 4, 4, D)
    pixel = torch.randn(50, D)
    scores = torch.einsum('pd,rkd->pkr', pixel, best[0]).amax(2)
    expected = torch.stack([(pixel @ u.T).amax(1) for u in used], 1)
    assert_close(scores, expected)


def test_what_is_left_out_is_logged(file, log):
    provider = build(file)
    assert (provider.phrase_bank.probability > 0).int().tolist() == USED
    said = log.getvalue()
    assert '7 of 10 phrases of 4 classes are used in training' in said
    assert "'rubbish' (road)" in said
    assert "stand for another class too: ['CAR', 'Truck']" in said
    # A class keeps its plain name, whatever is said of it.
    strict = build(file, threshold=.999999)
    assert (strict.phrase_bank.probability.sum(1) - 1).abs().max() < 1e-6
    assert strict.phrase_bank.probability[:, 2:].max() == 0


def test_only_training_needs_the_file(file, tmp_path):
    provider = build(tmp_path / 'gone.safetensors', dim=D)
    state = build(file).state_dict()
    provider.load_state_dict(state)
    assert_close(provider.eval()(2), state['class_embeddings'])
    with pytest.raises(RuntimeError, match='encode_text.py'):
        provider.train()(2)


@each_case('kind', ['ResidualPromptLearner', 'MixturePromptLearner'])
def test_learners_draw_in_stage_1_and_learn_in_stage_2(file, plain, kind):
    provider = build(file, kind)
    assert_close(provider.class_embeddings, plain)
    drawn = seeded(provider, 500)
    assert torch.equal(drawn, seeded(build(file), 500))
    residual = kind == 'ResidualPromptLearner'
    if residual:
        assert provider.distance_from_start() == pytest.approx(0, abs=1e-6)
    provider.start_learning()
    text = provider(5)
    assert text.shape == (4, D) and text.requires_grad
    if residual:
        assert_close(text, plain)
    provider.stop_learning()
    assert provider(5).shape == (5, 4, D)


def test_controls(file, vectors, plain):
    """Other names' phrases, or noise of the same size."""
    shuffled = build(file, 'ControlEmbeddings', kind='shuffled')
    order = distances(shuffled.class_embeddings, plain).argmin(1)
    assert (order != torch.arange(4)).all()
    text = shuffled(300)
    for row, k in enumerate(order.tolist()):
        assert distances(text[:, row], vectors[k]).amin(1).max() < 1e-5
    cfg = dict(type='ControlEmbeddings', kind='random', dim=64, num_classes=5)
    noise = MODELS.build(dict(cfg, phrases=4)).train()
    rows = MODELS.build(cfg).class_embeddings
    assert torch.equal(noise.class_embeddings, rows)
    text = noise(400)
    cosines = (text * rows).sum(2).flatten()
    near = (cosines - 1).abs() < 1e-5
    assert ((cosines - .9).abs() < 1e-5)[~near].all()
    # 2000 draws, of which a quarter is the row itself.
    assert abs(near.float().mean() - .25) < .04
    assert len(text[:, 0].unique(dim=0)) == 4
    # The same around the names, which stay what is deployed.
    noise = build(
        file, 'ControlEmbeddings', kind='noise', phrases=4, cosine=.8)
    assert_close(noise.class_embeddings, plain)
    cosines = (noise(400) * plain).sum(2)
    assert cosines.min().item() == pytest.approx(.8, abs=1e-5)
    assert len(noise.trained_vectors()) == 4 + 4 * 4
    # In a checkpoint are the names, not what is drawn around them.
    names = dict(type='ClassEmbeddings', file='no/file', dim=D)
    lost = build(
        file, 'ControlEmbeddings', kind='noise', phrases=4, embeddings=names)
    lost.load_state_dict(noise.state_dict())
    with pytest.raises(RuntimeError, match='no/file'):
        lost(2)


@each_case('options, words', [
    (dict(mode='best'), 'uniform'),
    (dict(confidence='image'), 'not known any more'),
    (dict(threshold=1.), r'\[0, 1\)'),
    (dict(type='ControlEmbeddings', kind='shuffled', phrases=2), 'shuffled'),
    (dict(type='ControlEmbeddings', kind='noise'), 'at least 2'),
    (dict(type='ControlEmbeddings', kind='noise', phrases=2,
          cosine=1.), r'\[0, 1\)'),
])
def test_bad_arguments(file, options, words):
    with pytest.raises(ValueError, match=words):
        build(file, **options)


def test_files_without_a_bank_of_phrases(make_embeddings):
    plain = make_embeddings(4, D, file='plain')
    with pytest.raises(ValueError, match='plain.*--keep-bank'):
        build(plain)
    odd = make_embeddings(4, D, bank=3, file='odd')
    with pytest.raises(ValueError, match='3 vectors.*1 phrases'):
        build(odd)


def test_toyclip_prefers_its_own_words(tmp_path):
    """The whole way, with a tower and the synonyms of the package."""
    record = encode_classes(
        'toy_scenes+synonyms', 'toyclip', 'photo', keep_bank=True)
    record.save(tmp_path / 'toy.safetensors')
    provider = build(
        tmp_path / 'toy.safetensors', classes='toy_scenes', num_classes=8)
    assert provider(3).shape == (3, 8, 64)
    # Most of what it was trained on is used, and of each class something.
    used = (provider.phrase_bank.probability > 0).sum(1)
    assert .6 * sum(map(len, record.phrases)) < used.sum()
    assert (used > 1).sum() >= 6
