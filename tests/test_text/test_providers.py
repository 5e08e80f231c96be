# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Where the class-text matrix comes from: fixed, control and learned."""
import re

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmseg.registry import MODELS
from tiny import PROMPTS
from torch import nn

from mmseg_textkd.clip import TextTower
from mmseg_textkd.models.text_providers import TextProvider
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.embedding_statistics import center
from mmseg_textkd.text.encode_classes import encode_classes

NAMES = ('sky', 'car', 'signsymbol', 'road')
DIM = 16


def build(**cfg):
    """Build a provider as a head does."""
    cfg.setdefault('num_classes', len(NAMES))
    provider = MODELS.build(cfg)
    assert isinstance(provider, TextProvider)
    return provider


@pytest.fixture
def file(make_embeddings):
    return make_embeddings(len(NAMES), DIM, names=NAMES, bank=3)


@pytest.fixture
def fixed(file):
    return dict(type='ClassEmbeddings', file=file)


def keys(provider):
    return sorted(provider.state_dict())


# ------------------------------------------------------- ClassEmbeddings
def test_vectors_of_the_file(file, fixed):
    provider = build(**fixed)
    vectors = TextEmbeddings.load(file).vectors
    assert provider.filled and provider.dim == DIM
    assert provider.names == NAMES
    torch.testing.assert_close(provider(), vectors)
    assert keys(provider) == ['class_embeddings']
    assert not list(provider.parameters()) and not provider.learnable()
    # In either mode and stage they stay what they are.
    provider.train().start_learning()
    assert torch.equal(provider(), provider.class_embeddings)
    assert provider.distance_from_start() == 0


def test_centering(file, fixed):
    vectors = TextEmbeddings.load(file).vectors
    provider = build(**fixed, center=True)
    torch.testing.assert_close(provider(), center(vectors))
    # Not the trivial answer: the rows share a direction before, not after.
    assert F.cosine_similarity(vectors[0], vectors[1], dim=0) > 0.2
    assert provider().mean(0).norm() < vectors.mean(0).norm() / 4
    with pytest.warns(UserWarning, match='call it `center`'):
        old = build(**fixed, centre=True)
    assert torch.equal(old(), provider())


def test_zero_vectors_are_refused(fixed):
    """They have no direction, and stay zero when normalized."""
    provider = build(**fixed)
    vectors = provider().clone()
    vectors[1] = 0
    with pytest.raises(ValueError, match=r'rows \[1\].* zero'):
        provider.fill(vectors)
    assert (provider() != 0).any(dim=1).all()


def test_missing_file_needs_a_width(tmp_path):
    file = str(tmp_path / 'gone.safetensors')
    recipe = dict(vocabulary='camvid', model='ViT-B-16', pretrained='openai')
    command = re.escape('python tools/encode_text.py camvid --model ViT-B-16 '
                        f'--pretrained openai --out {file}')
    with pytest.raises(FileNotFoundError, match=command):
        build(type='ClassEmbeddings', file=file, build=recipe)
    provider = build(type='ClassEmbeddings', file=file, dim=8, build=recipe)
    assert not provider.filled and not provider.can_compute
    assert provider.class_embeddings.isnan().all()
    with pytest.raises(RuntimeError, match=command):
        provider()


@each_case('options, words', [
    (dict(dim=8), ['width 16', 'dim=8']),
    (dict(num_classes=5), ['4 classes', 'num_classes=5', 'signsymbol']),
    (dict(classes='camvid'), ['camvid', 'bicyclist']),
    (dict(classes=NAMES[::-1]), ['another order', "position 0: 'sky'"]),
])
def test_file_that_does_not_fit(fixed, options, words):
    with pytest.raises(ValueError) as error:
        build(**fixed, **options)
    for word in words:
        assert word in str(error.value)


def test_names_that_fit(fixed):
    assert build(**fixed, classes=list(NAMES)).filled


@pytest.mark.parametrize('learner', [None, 'ResidualPromptLearner'])
def test_checkpoint_fills_a_missing_file(tmp_path, fixed, learner):

    def make(embeddings):
        if learner is None:
            return build(**embeddings)
        return build(type=learner, embeddings=embeddings)

    whole = make(fixed)
    gone = dict(fixed, file=str(tmp_path / 'gone.safetensors'), dim=DIM)
    bare = make(gone)
    with pytest.raises(RuntimeError, match='tools/encode_text.py'):
        bare()
    bare.load_state_dict(whole.state_dict())
    assert torch.equal(bare(), whole())
    if learner is not None:
        # It can be tested, but not learn: what it starts from is not there.
        with pytest.raises(RuntimeError, match='Stage 2 cannot start'):
            bare.start_learning()


# ----------------------------------------------------- ControlEmbeddings
def test_random_control_is_orthonormal_and_seeded():
    first, again, other = (
        build(type='ControlEmbeddings', kind='random', dim=32, seed=seed)()
        for seed in (3, 3, 4))
    torch.testing.assert_close(
        first @ first.T, torch.eye(4), atol=1e-6, rtol=0)
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    before = torch.get_rng_state()
    assert build(type='ControlEmbeddings', kind='random').dim == 512
    assert torch.equal(before, torch.get_rng_state())


def test_onehot_control():
    provider = build(type='ControlEmbeddings', kind='onehot')
    assert torch.equal(provider(), torch.eye(4))
    wide = build(type='ControlEmbeddings', kind='onehot', dim=7)
    assert torch.equal(wide(), torch.eye(4, 7))


@each_case('num', [2, 3, 19])
def test_shuffled_control_leaves_no_class_its_own(make_embeddings, num):
    source = dict(type='ClassEmbeddings', file=make_embeddings(num, DIM))
    vectors = build(**source, num_classes=num)()
    orders = set()
    for seed in range(5):
        shuffled = build(
            type='ControlEmbeddings',
            kind='shuffled',
            embeddings=source,
            seed=seed,
            num_classes=num)
        # Which row of the source each row is; one of each.
        order = torch.cdist(shuffled(), vectors).argmin(1)
        torch.testing.assert_close(shuffled(), vectors[order])
        assert sorted(order.tolist()) == list(range(num))
        assert (order != torch.arange(num)).all()
        orders.add(tuple(order.tolist()))
    # The seed decides; of 2 rows there is but one derangement, of 3 two.
    assert (len(orders) == 1) == (num == 2)


def test_shuffled_control_without_its_file(tmp_path, fixed):
    gone = dict(fixed, file=str(tmp_path / 'gone.safetensors'), dim=DIM)
    control = dict(type='ControlEmbeddings', kind='shuffled')
    bare = build(**control, embeddings=gone)
    with pytest.raises(RuntimeError, match='tools/encode_text.py'):
        bare()
    whole = build(**control, embeddings=fixed)
    bare.load_state_dict(whole.state_dict())
    assert torch.equal(bare(), whole())


@each_case('options, message', [
    (dict(kind='noise'), "'noise'.*'random', 'shuffled', 'onehot'"),
    (dict(kind='shuffled'), "belongs to kind='shuffled'"),
    (dict(kind='random', embeddings={}), "belongs to kind='shuffled'"),
    (dict(kind='random', dim=3), '4 orthogonal rows.*dim=3'),
    (dict(kind='onehot', dim=3), '4 orthogonal rows.*dim=3'),
])
def test_bad_controls(options, message):
    with pytest.raises(ValueError, match=message):
        build(type='ControlEmbeddings', **options)


def test_one_class_cannot_be_shuffled(make_embeddings):
    source = dict(type='ClassEmbeddings', file=make_embeddings(1, DIM))
    with pytest.raises(ValueError, match='1 class cannot be shuffled'):
        build(
            type='ControlEmbeddings',
            kind='shuffled',
            embeddings=source,
            num_classes=1)


# ------------------------------------------------- ResidualPromptLearner
def residual(fixed, **options):
    return build(type='ResidualPromptLearner', embeddings=fixed, **options)


def test_residual_starts_at_the_fixed_text(fixed):
    provider = residual(fixed).train()
    before = provider()
    assert not before.requires_grad  # stage 1
    provider.start_learning()
    torch.testing.assert_close(provider(), build(**fixed)())
    assert provider().requires_grad and provider.distance_from_start() < 1e-12
    provider.stop_learning()
    assert torch.equal(provider(), before)


def test_residual_equals_its_formula(file, fixed):
    provider = residual(fixed, scale=0.3).train()
    vectors = TextEmbeddings.load(file).vectors.double()
    offset = torch.randn(len(NAMES), DIM)
    provider.offset.data.copy_(offset)
    provider.start_learning()
    expected = vectors + 0.3 * offset.double()
    expected /= expected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(
        provider().double(), expected, atol=1e-6, rtol=0)
    drift = 1 - (expected * vectors).sum(1)
    assert provider.distance_from_start() == pytest.approx(
        drift.mean().item(), abs=1e-6)
    # In evaluation it is what has been refreshed last.
    provider.eval()
    torch.testing.assert_close(provider(), build(**fixed)())
    provider.refresh()
    torch.testing.assert_close(
        provider().double(), expected, atol=1e-6, rtol=0)


def test_residual_gradient(fixed):
    """d/dx of g.normalize(t + a x) at x = 0 is a (g - (g.t) t)."""
    provider = residual(fixed, scale=0.7).train()
    provider.start_learning()
    text, direction = build(**fixed)(), torch.randn(len(NAMES), DIM)
    (provider() * direction).sum().backward()
    along = (direction * text).sum(1, keepdim=True) * text
    torch.testing.assert_close(provider.offset.grad, 0.7 * (direction - along))
    assert list(provider.learnable()) == ['offset']


def test_residual_checkpoint_holds_no_base(fixed):
    provider = residual(fixed).train()
    provider.start_learning()
    provider.offset.data.normal_()
    provider.refresh()
    assert keys(provider) == ['class_embeddings', 'offset', 'started']
    copy = residual(fixed)
    assert not copy.started
    copy.load_state_dict(provider.state_dict())
    assert copy.started and torch.equal(copy(), provider.eval()())


@each_case('scale', [0, -1, float('nan')])
def test_residual_needs_a_scale(fixed, scale):
    with pytest.raises(ValueError, match='`scale` must be positive'):
        residual(fixed, scale=scale)


def test_a_learner_starts_from_fixed_text(fixed):
    inner = dict(type='ResidualPromptLearner', embeddings=fixed)
    with pytest.raises(TypeError, match='got ResidualPromptLearner'):
        residual(inner)


# ----------------------------------------------------- LearnedEmbeddings
def test_learned_vectors():
    """They start as the random control and are weights, in either mode."""
    learned = dict(type='LearnedEmbeddings', dim=32, seed=3)
    control = build(type='ControlEmbeddings', kind='random', dim=32, seed=3)
    provider = build(**learned)
    torch.testing.assert_close(provider(), control())
    assert keys(provider) == ['class_embeddings', 'vectors']
    assert provider.distance_from_start() < 1e-12 and not provider.learnable()
    provider.stop_learning()
    # Their gradient is that of normalize: length does not count.
    provider.vectors.data.mul_(2.)
    direction = torch.randn(len(NAMES), 32)
    (provider() * direction).sum().backward()
    along = (direction * control()).sum(1, keepdim=True) * control()
    torch.testing.assert_close(provider.vectors.grad, (direction - along) / 2)
    # What they have become is what evaluation and a checkpoint get.
    vectors = torch.randn(len(NAMES), 32)
    provider.vectors.data.copy_(vectors)
    rows = vectors / vectors.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(provider.eval()(), rows)
    drift = 1 - (rows * control()).sum(1).mean().item()
    assert provider.distance_from_start() == pytest.approx(drift, abs=1e-6)
    provider.refresh()
    copy = build(**learned)
    copy.load_state_dict(provider.state_dict())
    torch.testing.assert_close(copy.class_embeddings, rows)
    assert torch.equal(copy(), provider()) and not copy.check_loaded(True)
    with pytest.raises(TypeError, match='got LearnedEmbeddings'):
        residual(learned)
    with pytest.raises(ValueError, match='4 orthogonal rows.*dim=3'):
        build(type='LearnedEmbeddings', dim=3)


# -------------------------------------------------- MixturePromptLearner
def write_bank(path, vectors, mask):
    """Write an embeddings file with a ragged bank."""
    bank = F.normalize(vectors, dim=2) * mask[..., None]
    TextEmbeddings(
        vectors=F.normalize(bank.sum(1), dim=1),
        names=NAMES,
        bank=bank,
        bank_mask=mask).save(path)
    return dict(
        type='MixturePromptLearner',
        embeddings=dict(type='ClassEmbeddings', file=str(path)))


@pytest.fixture
def mixture(tmp_path):
    counts = torch.tensor([3, 1, 2, 3])
    mask = torch.arange(3) < counts[:, None]
    return write_bank(tmp_path / 'bank.safetensors',
                      torch.randn(len(NAMES), 3, DIM), mask)


def test_uniform_mixture_is_the_ensemble(mixture):
    provider = build(**mixture).train()
    before = provider()
    provider.start_learning()
    torch.testing.assert_close(provider(), before, atol=1e-6, rtol=0)
    record = provider.record
    for k in range(len(NAMES)):
        mean = record.bank[k][record.bank_mask[k]].mean(0)
        torch.testing.assert_close(provider()[k], mean / mean.norm())
    assert keys(provider) == ['class_embeddings', 'started', 'weights']


def test_masked_entries_have_no_weight(mixture):
    provider = build(**mixture).train()
    provider.start_learning()
    bank, mask = provider.bank, provider.bank_mask
    # A huge weight on what is not there changes nothing.
    provider.weights.data[~mask] = 50.
    torch.testing.assert_close(provider(), provider.base, atol=1e-6, rtol=0)
    provider().sum().backward()
    assert (provider.weights.grad[~mask] == 0).all()
    assert (provider.weights.grad[0] != 0).any()
    provider.weights.data[0] = torch.tensor([1., -2., 0.5])
    share = torch.tensor([1., -2., 0.5]).exp()
    expected = (share[:, None] * bank[0]).sum(0)
    torch.testing.assert_close(provider()[0], expected / expected.norm())
    # All weight on one: it is that one.
    provider.weights.data[3] = torch.tensor([0., 200., 0.])
    torch.testing.assert_close(provider()[3], bank[3, 1])


def test_mixture_of_centered_text_starts_where_it_was(mixture):
    """The switch must not undo the centering."""
    mixture['embeddings']['center'] = True
    provider = build(**mixture).train()
    before = provider()
    provider.start_learning()
    torch.testing.assert_close(provider(), before, atol=1e-5, rtol=0)


def test_mixture_needs_a_bank(make_embeddings):
    file = make_embeddings(len(NAMES), DIM, names=NAMES)
    fixed = dict(type='ClassEmbeddings', file=file)
    control = dict(type='ControlEmbeddings', kind='random')
    for embeddings in (fixed, control):
        with pytest.raises(ValueError, match='--keep-bank'):
            build(type='MixturePromptLearner', embeddings=embeddings)


def test_mixture_without_its_file(tmp_path, mixture):
    whole = build(**mixture).train()
    whole.start_learning()
    whole.weights.data.normal_()
    whole.refresh()
    gone = dict(
        mixture['embeddings'],
        file=str(tmp_path / 'gone.safetensors'),
        dim=DIM)
    bare = build(type='MixturePromptLearner', embeddings=gone)
    result = bare.load_state_dict(whole.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(bare.weights, whole.weights)
    assert torch.equal(bare.eval()(), whole.eval()())


# -------------------------------------------------- ContextPromptLearner
TOY = ('sky', 'pole', 'car')
TOY_PHRASES = dict(sky='sky', pole='traffic light pole', car='car')


@pytest.fixture(scope='module')
def tower():
    return TextTower('toyclip')


@pytest.fixture
def toy(tmp_path, tower):
    """Config of a learner on ToyCLIP, with names of one and more tokens."""
    file = tmp_path / 'toy.safetensors'
    encode_classes(TOY_PHRASES, tower, 'photo').save(file)
    assert len({
        int(n)
        for n in tower.end_positions(
            tower.tokenize(list(TOY_PHRASES.values())))
    }) > 1

    def make(**options):
        embeddings = dict(type='ClassEmbeddings', file=str(file))
        return build(**{
            **PROMPTS, 'num_classes': 3,
            'embeddings': embeddings,
            **options
        })

    return make


def started(provider):
    provider.train().start_learning()
    return provider


def test_context_of_words_equals_the_sentence(toy, tower):
    provider = started(toy(init='a photo of a'))
    sentences = [f'a photo of a {p}.' for p in TOY_PHRASES.values()]
    expected = F.normalize(tower.encode_text(sentences), dim=1)
    torch.testing.assert_close(provider(), expected, atol=1e-5, rtol=0)
    # As the fixed text was made with the same template, nothing jumps.
    torch.testing.assert_close(provider(), provider.base, atol=1e-5, rtol=0)
    assert provider.distance_from_start() < 1e-6


def test_context_for_each_class(toy):
    provider = started(toy(class_specific=True))
    assert provider.context.shape == (3, 4, 64)
    provider()[1].sum().backward()
    grad = provider.context.grad.flatten(1).norm(dim=1)
    assert grad[1] > 0 and grad[0] == 0 and grad[2] == 0
    # Equal vectors for all are the unified context.
    unified = started(toy())
    provider.context.data.copy_(unified.context.data.expand(3, -1, -1))
    torch.testing.assert_close(provider(), unified(), atol=1e-6, rtol=0)


def test_the_tower_is_out_of_sight_and_untouched(toy, tower):
    provider = toy()
    before = keys(provider), [n for n, _ in provider.named_parameters()]
    assert not provider.can_compute and provider.tower is None
    started(provider)
    loaded = provider.tower
    assert isinstance(loaded, TextTower)
    assert not any(isinstance(m, TextTower) for m in provider.modules())
    after = keys(provider), [n for n, _ in provider.named_parameters()]
    assert before == after == (['class_embeddings', 'context', 'started'
                                ], ['context'])
    provider().square().sum().backward()  # constant: rows are of unit length
    assert provider.context.grad.abs().max() < 1e-5
    provider().sum().backward()
    assert (provider.context.grad.norm(dim=1) > 1e-3).all()
    for weight in loaded.parameters():
        assert weight.grad is None and not weight.requires_grad
    torch.optim.SGD(provider.parameters(), lr=1.).step()
    assert provider.distance_from_start() > 1e-4
    assert loaded.checksum() == tower.checksum()
    assert not loaded.training


def test_context_goes_on_from_a_checkpoint(toy):
    """Words are for the start only."""
    provider = started(toy(init='a photo of a'))
    provider.context.data.normal_(std=0.02)
    provider.refresh()
    again = toy(init='a photo of a')
    again.load_state_dict(provider.state_dict())
    torch.testing.assert_close(again.eval()(), provider.eval()())
    started(again)
    assert torch.equal(again.context, provider.context)
    # Taken from a checkpoint of stage 1 the words are still to come.
    fresh = toy(init='a photo of a')
    fresh.load_state_dict(toy(init='a photo of a').state_dict())
    started(fresh)
    assert fresh.distance_from_start() < 1e-6


def test_random_context_is_small(toy):
    context = toy(n_ctx=16, class_specific=True).context
    assert context.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(context.mean().item()) < 0.002


def test_context_of_centered_text_starts_where_it_was(toy, tmp_path):
    provider = toy(
        init='a photo of a',
        embeddings=dict(
            type='ClassEmbeddings',
            file=str(tmp_path / 'toy.safetensors'),
            center=True)).train()
    before = provider()
    torch.testing.assert_close(started(provider)(), before, atol=1e-5, rtol=0)


def test_words_from_a_vocabulary_of_its_own(toy, tower):
    words = dict(sky='sky', pole='pole', car=['truck', 'car'])
    provider = started(toy(init='a photo of a', vocabulary=words))
    sentences = [f'a photo of a {p}.' for p in ('sky', 'pole', 'truck')]
    expected = F.normalize(tower.encode_text(sentences), dim=1)
    torch.testing.assert_close(provider(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('options, words', [
    (dict(position='middle'), ["'middle'", 'not known any more']),
    (dict(n_ctx=0), ['`n_ctx` must be at least 1']),
])
def test_bad_context_is_refused_when_built(toy, options, words):
    with pytest.raises(ValueError) as error:
        toy(**options)
    for word in words:
        assert word in str(error.value)


@each_case('options, words', [
    (dict(token_dim=32), ['width 64', 'token_dim=32', 'token_dim=64']),
    (dict(init='a photo of'), ["'a photo of' has 3 tokens", 'n_ctx=3']),
    (dict(n_ctx=28), ['traffic light pole', '28 context', 'room for 32']),
    (dict(vocabulary=['sky', 'car', 'pole']), ["'sky', 'car', 'pole'"]),
    (dict(vocabulary=dict(TOY_PHRASES, car='very ' * 40 + 'long car')),
     ['longer than the 32', 'very very']),
    (dict(embeddings=dict(type='ControlEmbeddings', kind='onehot', dim=64)),
     ['has no class names', '`vocabulary`']),
    (dict(
        embeddings=dict(type='ControlEmbeddings', kind='onehot', dim=64),
        vocabulary=['sky', 'car']), ['2 class names', '3 classes']),
    (dict(embeddings=dict(type='ControlEmbeddings', kind='random', dim=16)),
     ['width 64', 'width 16']),
])
def test_bad_context_is_refused_at_the_switch(toy, options, words):
    provider = toy(**options).train()
    with pytest.raises(ValueError) as error:
        provider.start_learning()
    for word in words:
        assert word in str(error.value)
    # It has not half begun.
    assert not provider.started and not provider.learning


# ------------------------------------------------------------ all of them
def test_unequal_text_after_loading(make_embeddings, mixture, toy, tmp_path):
    """A resumed run keeps its text; any other takes that of its config."""

    def fixed(seed):
        return dict(
            type='ClassEmbeddings',
            file=make_embeddings(
                len(NAMES), DIM, names=NAMES, seed=seed, bank=3, file=seed))

    def toy_file():
        encode_classes(TOY_PHRASES, 'toyclip',
                       ['drawing of {}']).save(tmp_path / 'toy.safetensors')

    def kinds(seed):
        yield build(**fixed(seed))
        yield build(
            type='ControlEmbeddings', kind='shuffled', embeddings=fixed(seed))
        yield residual(fixed(seed))
        yield build(type='MixturePromptLearner', embeddings=fixed(seed))
        yield toy()

    first = list(kinds(0))
    same = list(kinds(0))
    toy_file()
    other = list(kinds(1))
    assert len(first) == len(other) == 5
    for a, b, c in zip(first, same, other):
        wanted = c().clone()
        assert (a() - wanted).abs().max() > 1e-2
        for provider in (b, c):
            provider.load_state_dict(a.state_dict())
        assert b.check_loaded(resumed=True) is None
        with pytest.raises(ValueError, match='must keep its text'):
            c.check_loaded(resumed=True)
        assert torch.equal(c(), a())  # refused, and left alone
        assert "config's are used" in c.check_loaded(resumed=False)
        torch.testing.assert_close(c(), wanted, atol=1e-6, rtol=0)
        assert c.check_loaded(resumed=True) is None


def test_learned_text_is_no_difference(fixed, mixture, toy):
    """Prompts have moved on from the file, and are to."""
    for make in (lambda: residual(fixed), lambda: build(**mixture), toy):
        provider = started(make())
        for param in provider.parameters():
            param.data.add_(torch.randn_like(param))
        provider.refresh()
        assert provider.distance_from_start() > 1e-3
        loaded = make()
        loaded.load_state_dict(provider.state_dict())
        for resumed in (True, False):
            assert loaded.check_loaded(resumed) is None
        torch.testing.assert_close(loaded.eval()(), provider.eval()())


def test_nan_in_a_checkpoint_is_a_difference(fixed):
    provider = build(**fixed)
    state = provider.state_dict()
    provider.load_state_dict({k: v * float('nan') for k, v in state.items()})
    with pytest.raises(ValueError, match='must keep its text'):
        provider.check_loaded(resumed=True)


def test_shape_of_what_is_filled_in(fixed):
    with pytest.raises(ValueError, match=r'\(3, 16\).*\(4, 16\)'):
        build(**fixed).fill(torch.zeros(3, DIM))


def test_gradient_flows_in_float32_under_autocast(fixed, mixture, toy):
    learners = [residual(fixed), build(**mixture), toy()]
    for provider in map(started, learners):
        plain = provider()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            text = provider()
        assert text.dtype == torch.float32 and torch.equal(text, plain)
        (text * torch.randn_like(text)).sum().backward()
        for param in provider.parameters():
            assert isinstance(param, nn.Parameter)
            assert param.grad.abs().max() > 0
