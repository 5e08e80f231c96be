# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Where the class-text matrix comes from: fixed, control and learned."""
import re

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmseg.registry import MODELS
from tiny import PROMPTS
from torch.testing import assert_close

from mmseg_textkd.clip import TextTower
from mmseg_textkd.models.text_providers import TextProvider
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.embedding_statistics import center
from mmseg_textkd.text.encode_classes import encode_classes

NAMES = ('sky', 'car', 'signsymbol', 'road')
DIM = 16
TOY_PHRASES = dict(sky='sky', pole='traffic light pole', car='car')


def build(type, **cfg):
    """Build a provider as a head does."""
    provider = MODELS.build(dict(num_classes=len(NAMES), type=type) | cfg)
    assert isinstance(provider, TextProvider)
    return provider


def control(kind, **options):
    return build('ControlEmbeddings', kind=kind, **options)


def residual(fixed, **options):
    return build('ResidualPromptLearner', embeddings=fixed, **options)


def mixture(fixed):
    return build('MixturePromptLearner', embeddings=fixed)


def started(provider):
    provider.train().start_learning()
    return provider


def keys(provider):
    return sorted(provider.state_dict())


def near(a, b, atol=1e-6):
    assert_close(a, b, atol=atol, rtol=0)


def write(file, seed=0):
    """Write vectors that share a direction, with a ragged bank."""
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(len(NAMES), 3, DIM, generator=generator) + 1
    bank = F.normalize(bank, dim=2) * mask[..., None]
    mean = F.normalize(bank.sum(1), dim=1)
    TextEmbeddings(mean, NAMES, bank=bank, bank_mask=mask).save(file)
    return dict(type='ClassEmbeddings', file=str(file))


@pytest.fixture
def fixed(tmp_path):
    return write(tmp_path / 'text.safetensors')


@pytest.fixture
def vectors(fixed):
    return TextEmbeddings.load(fixed['file']).vectors


@pytest.fixture
def gone(fixed, tmp_path):
    return dict(fixed, file=str(tmp_path / 'gone.safetensors'), dim=DIM)


@pytest.fixture(scope='module')
def tower():
    return TextTower('toyclip')


@pytest.fixture
def toy(tmp_path, tower):
    """Make a learner on ToyCLIP, with names of one and more tokens."""
    file = tmp_path / 'toy.safetensors'
    encode_classes(TOY_PHRASES, tower, 'photo').save(file)
    tokens = tower.tokenize(list(TOY_PHRASES.values()))
    assert len(tower.end_positions(tokens).unique()) > 1

    def make(center=False, **options):
        embeddings = dict(
            type='ClassEmbeddings', file=str(file), center=center)
        cfg = dict(PROMPTS, num_classes=3, embeddings=embeddings)
        return build(**cfg | options)

    return make


def test_vectors_of_the_file(fixed, vectors):
    provider = build(**fixed)
    assert provider.filled and provider.dim == DIM
    assert provider.names == NAMES
    assert_close(provider(), vectors)
    assert keys(provider) == ['class_embeddings']
    assert not list(provider.parameters()) and not provider.learnable()
    # In either mode and stage they stay what they are.
    provider.train().start_learning()
    assert torch.equal(provider(), provider.class_embeddings)
    assert provider.distance_from_start() == 0
    assert build(**fixed, classes=list(NAMES)).filled


def test_centering(fixed, vectors):
    provider = build(**fixed, center=True)
    assert_close(provider(), center(vectors))
    # Not the trivial answer: the rows share a direction before, not after.
    assert F.cosine_similarity(vectors[0], vectors[1], dim=0) > 0.2
    assert provider().mean(0).norm() < vectors.mean(0).norm() / 4
    with pytest.warns(UserWarning, match='call it `center`'):
        old = build(**fixed, centre=True)
    assert torch.equal(old(), provider())


def test_vectors_that_cannot_be_text(fixed, vectors):
    provider = build(**fixed)
    zero = vectors * torch.tensor([1., 0, 1, 1])[:, None]
    with pytest.raises(ValueError, match=r'rows \[1\].* zero'):
        provider.fill(zero)
    with pytest.raises(ValueError, match=r'\(3, 16\).*\(4, 16\)'):
        provider.fill(vectors[:3])
    assert_close(provider(), vectors)
    provider.load_state_dict(dict(class_embeddings=vectors * float('nan')))
    with pytest.raises(ValueError, match='must keep its text'):
        provider.check_loaded(resumed=True)


@each_case('options, message', [
    (dict(dim=8), 'width 16.*dim=8'),
    (dict(num_classes=5), '4 classes.*num_classes=5.*signsymbol'),
    (dict(classes='camvid'), 'camvid.*bicyclist'),
    (dict(classes=NAMES[::-1]), "another order.*position 0: 'sky'"),
])
def test_file_that_does_not_fit(fixed, options, message):
    with pytest.raises(ValueError, match=f'(?s){message}'):
        build(**fixed, **options)


def test_missing_file_needs_a_width(gone):
    recipe = dict(vocabulary='camvid', model='ViT-B-16', pretrained='openai')
    command = re.escape('python tools/encode_text.py camvid --model ViT-B-16 '
                        f'--pretrained openai --out {gone["file"]}')
    with pytest.raises(FileNotFoundError, match=command):
        build(**gone | dict(dim=None, build=recipe))
    provider = build(**gone, build=recipe)
    assert not provider.filled and not provider.can_compute
    assert provider.class_embeddings.isnan().all()
    with pytest.raises(RuntimeError, match=command):
        provider()


def test_checkpoint_fills_a_missing_file(fixed, gone):
    """Then it can be tested, but not learn: its start is not there."""

    def shuffled(embeddings):
        return control('shuffled', embeddings=embeddings)

    for make in (lambda cfg: build(**cfg), shuffled, residual, mixture):
        whole, bare = started(make(fixed)), make(gone)
        with pytest.raises(RuntimeError, match='tools/encode_text.py'):
            bare()
        for param in whole.parameters():
            param.data.normal_()
        whole.refresh()
        bare.load_state_dict(whole.state_dict(), strict=True)
        assert torch.equal(bare.eval()(), whole.eval()())
        if make in (residual, mixture):
            assert bare.started
            with pytest.raises(RuntimeError, match='Stage 2 cannot start'):
                bare.train().start_learning()


def test_random_control_is_orthonormal_and_seeded():
    first, again, other = (
        control('random', dim=32, seed=seed)() for seed in (3, 3, 4))
    near(first @ first.T, torch.eye(4))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    before = torch.get_rng_state()
    assert control('random').dim == 512
    assert torch.equal(before, torch.get_rng_state())
    # Besides, the other control without a file.
    assert torch.equal(control('onehot')(), torch.eye(4))
    assert torch.equal(control('onehot', dim=7)(), torch.eye(4, 7))


@each_case('num', [2, 3, 19])
def test_shuffled_control_leaves_no_class_its_own(make_embeddings, num):
    source = dict(type='ClassEmbeddings', file=make_embeddings(num, DIM))
    vectors = build(**source, num_classes=num)()
    options = dict(embeddings=source, num_classes=num)
    orders = set()
    for seed in range(5):
        shuffled = control('shuffled', seed=seed, **options)()
        # Which row of the source each row is; one of each.
        order = torch.cdist(shuffled, vectors).argmin(1)
        assert_close(shuffled, vectors[order])
        assert sorted(order.tolist()) == list(range(num))
        assert (order != torch.arange(num)).all()
        orders.add(tuple(order.tolist()))
    # The seed decides; of 2 rows there is but one derangement, of 3 two.
    assert (len(orders) == 1) == (num == 2)


@each_case('options, message', [
    (dict(kind='normal'), "'normal'.*'random', 'shuffled', 'onehot'"),
    (dict(kind='shuffled'), "belongs to kind='shuffled'"),
    (dict(kind='random', embeddings={}), "belongs to kind='shuffled'"),
    (dict(kind='random', dim=3), '4 orthogonal rows.*dim=3'),
    (dict(kind='onehot', dim=3), '4 orthogonal rows.*dim=3'),
    (dict(type='LearnedEmbeddings', dim=3), '4 orthogonal rows.*dim=3'),
])
def test_bad_controls(options, message):
    with pytest.raises(ValueError, match=message):
        build(**dict(type='ControlEmbeddings') | options)


def test_texts_that_a_provider_refuses(make_embeddings, fixed):
    one = dict(type='ClassEmbeddings', file=make_embeddings(1, DIM))
    with pytest.raises(ValueError, match='1 class cannot be shuffled'):
        control('shuffled', embeddings=one, num_classes=1)
    for scale in (0, -1, float('nan')):
        with pytest.raises(ValueError, match='`scale` must be positive'):
            residual(fixed, scale=scale)
    for cfg in (dict(type='LearnedEmbeddings', dim=DIM),
                dict(type='ResidualPromptLearner', embeddings=fixed)):
        with pytest.raises(TypeError, match=f'got {cfg["type"]}'):
            residual(cfg)
    bankless = dict(one, file=make_embeddings(4, DIM, names=NAMES))
    for cfg in (bankless, dict(type='ControlEmbeddings', kind='random')):
        with pytest.raises(ValueError, match='--keep-bank'):
            mixture(cfg)


@pytest.mark.parametrize('center', [False, True])
def test_learners_start_at_the_fixed_text(fixed, toy, center):
    """The switch must not undo the centering either."""
    fixed['center'] = center
    for provider in (residual(fixed), mixture(fixed),
                     toy(center, init='a photo of a')):
        before = provider.train()()
        assert not before.requires_grad  # stage 1
        text = started(provider)()
        near(text, before)
        assert text.requires_grad and provider.distance_from_start() < 1e-6
        provider.stop_learning()
        assert torch.equal(provider(), before)


def test_residual_equals_its_formula(fixed, vectors):
    provider = residual(fixed, scale=0.3)
    offset = torch.randn(len(NAMES), DIM)
    provider.offset.data.copy_(offset)
    expected = F.normalize(vectors + 0.3 * offset, dim=1)
    near(started(provider)(), expected)
    drift = 1 - (expected * vectors).sum(1).mean().item()
    assert provider.distance_from_start() == pytest.approx(drift, abs=1e-6)
    assert keys(provider) == ['class_embeddings', 'offset', 'started']
    # The buffer is that of the start until evaluation begins.
    near(provider.class_embeddings, vectors)
    near(provider.eval()(), expected)
    provider.offset.data.zero_()
    near(provider(), expected)
    provider.refresh()
    near(provider(), vectors)


def test_residual_gradient(fixed, vectors):
    """d/dx of g.normalize(t + a x) at x = 0 is a (g - (g.t) t)."""
    provider = started(residual(fixed, scale=0.7))
    direction = torch.randn(len(NAMES), DIM)
    (provider() * direction).sum().backward()
    along = (direction * vectors).sum(1, keepdim=True) * vectors
    assert_close(provider.offset.grad, 0.7 * (direction - along))
    assert list(provider.learnable()) == ['offset']


def test_learned_vectors():
    """They start as the random control and are weights, in either mode."""
    learned = dict(type='LearnedEmbeddings', dim=32, seed=3)
    first = control('random', dim=32, seed=3)()
    provider = build(**learned)
    assert_close(provider(), first)
    assert keys(provider) == ['class_embeddings', 'vectors']
    assert provider.distance_from_start() < 1e-12 and not provider.learnable()
    provider.stop_learning()
    # Their gradient is that of normalize: length does not count.
    provider.vectors.data.mul_(2.)
    direction = torch.randn(len(NAMES), 32)
    (provider() * direction).sum().backward()
    along = (direction * first).sum(1, keepdim=True) * first
    assert_close(provider.vectors.grad, (direction - along) / 2)
    # What they have become is what evaluation and a checkpoint get.
    vectors = torch.randn(len(NAMES), 32)
    provider.vectors.data.copy_(vectors)
    rows = vectors / vectors.square().sum(1, keepdim=True).sqrt()
    assert_close(provider.eval()(), rows)
    drift = 1 - (rows * first).sum(1).mean().item()
    assert provider.distance_from_start() == pytest.approx(drift, abs=1e-6)
    provider.refresh()
    copy = build(**learned)
    copy.load_state_dict(provider.state_dict())
    assert_close(copy.class_embeddings, rows)
    assert torch.equal(copy(), provider()) and not copy.check_loaded(True)


def test_masked_entries_have_no_weight(fixed):
    provider = started(mixture(fixed))
    assert keys(provider) == ['class_embeddings', 'started', 'weights']
    bank, mask = provider.bank, provider.bank_mask
    # A huge weight on what is not there changes nothing.
    provider.weights.data[~mask] = 50.
    near(provider(), provider.base)
    provider().sum().backward()
    assert (provider.weights.grad[~mask] == 0).all()
    assert (provider.weights.grad[0] != 0).any()
    provider.weights.data[0] = torch.tensor([1., -2., 0.5])
    share = torch.tensor([1., -2., 0.5]).exp()
    expected = F.normalize(share @ bank[0], dim=0)
    assert_close(provider()[0], expected)
    # All weight on one: it is that one.
    provider.weights.data[3] = torch.tensor([0., 200., 0.])
    assert_close(provider()[3], bank[3, 1])


def test_context_of_words_equals_the_sentence(toy, tower):
    provider = started(toy(init='a photo of a'))
    # Sorted, as MMEngine writes a config: the names decide.
    words = dict(car=['truck', 'car'], pole='pole', sky='sky')
    other = started(toy(init='a photo of a', vocabulary=words))
    for learner, phrases in ((provider, TOY_PHRASES.values()),
                             (other, ('sky', 'pole', 'truck'))):
        sentences = [f'a photo of a {p}.' for p in phrases]
        expected = F.normalize(tower.encode_text(sentences), dim=1)
        near(learner(), expected, atol=1e-5)


def test_context_for_each_class(toy):
    provider = started(toy(class_specific=True))
    assert provider.context.shape == (3, 4, 64)
    provider()[1].sum().backward()
    grad = provider.context.grad.flatten(1).norm(dim=1)
    assert grad[1] > 0 and grad[0] == 0 and grad[2] == 0
    # Equal vectors for all are the unified context.
    unified = started(toy())
    provider.context.data.copy_(unified.context.data.expand(3, -1, -1))
    near(provider(), unified())


def test_the_tower_is_out_of_sight_and_untouched(toy, tower):
    provider = toy()
    before = keys(provider), [n for n, _ in provider.named_parameters()]
    assert not provider.can_compute and provider.tower is None
    started(provider)
    loaded = provider.tower
    assert isinstance(loaded, TextTower)
    assert not any(isinstance(m, TextTower) for m in provider.modules())
    after = keys(provider), [n for n, _ in provider.named_parameters()]
    names = ['class_embeddings', 'context', 'started']
    assert before == after == (names, ['context'])
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
    assert_close(again.eval()(), provider.eval()())
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
    with pytest.raises(ValueError, match="'middle'.*not known any more"):
        toy(position='middle')
    with pytest.raises(ValueError, match='`n_ctx` must be at least 1'):
        toy(n_ctx=0)


@each_case('options, message', [
    (dict(token_dim=32), 'width 64.*token_dim=32.*token_dim=64'),
    (dict(init='a photo of'), "'a photo of' has 3 tokens.*n_ctx=3"),
    (dict(n_ctx=28), 'traffic light pole.*28 context.*room for 32'),
    (dict(vocabulary=['sky', 'car', 'pole']), "'sky', 'car', 'pole'"),
    (dict(vocabulary=dict(TOY_PHRASES, car='very ' * 40 + 'long car')),
     'longer than the 32.*very very'),
    (dict(embeddings=dict(type='ControlEmbeddings', kind='onehot', dim=64)),
     'has no class names.*`vocabulary`'),
    (dict(
        embeddings=dict(type='ControlEmbeddings', kind='onehot', dim=64),
        vocabulary=['sky', 'car']), '2 class names.*3 classes'),
    (dict(embeddings=dict(type='ControlEmbeddings', kind='random', dim=16)),
     'width 64.*width 16'),
])
def test_bad_context_is_refused_at_the_switch(toy, options, message):
    provider = toy(**options)
    with pytest.raises(ValueError, match=f'(?s){message}'):
        started(provider)
    # It has not half begun.
    assert not provider.started and not provider.learning


def test_unequal_text_after_loading(toy, tmp_path):
    """A resumed run keeps its text; any other takes that of its config."""

    def kinds(seed):
        fixed = write(tmp_path / f'{seed}.safetensors', seed)
        yield build(**fixed)
        yield control('shuffled', embeddings=fixed)
        yield residual(fixed)
        yield mixture(fixed)
        yield toy()

    first, same = list(kinds(0)), list(kinds(0))
    other = encode_classes(TOY_PHRASES, 'toyclip', ['drawing of {}'])
    other.save(tmp_path / 'toy.safetensors')
    for a, b, c in zip(first, same, kinds(1), strict=True):
        wanted = c().clone()
        assert (a() - wanted).abs().max() > 1e-2
        for provider in (b, c):
            provider.load_state_dict(a.state_dict())
        assert b.check_loaded(resumed=True) is None
        with pytest.raises(ValueError, match='must keep its text'):
            c.check_loaded(resumed=True)
        assert torch.equal(c(), a())  # refused, and left alone
        assert "config's are used" in c.check_loaded(resumed=False)
        near(c(), wanted)
        assert c.check_loaded(resumed=True) is None


def test_learned_text_is_no_difference(fixed, toy):
    """Prompts have moved on from the file, and are to."""
    for make in (lambda: residual(fixed), lambda: mixture(fixed), toy):
        provider = started(make())
        for param in provider.parameters():
            param.data.add_(torch.randn_like(param))
        provider.refresh()
        assert provider.distance_from_start() > 1e-3
        loaded = make()
        loaded.load_state_dict(provider.state_dict())
        for resumed in (True, False):
            assert loaded.check_loaded(resumed) is None
        assert_close(loaded.eval()(), provider.eval()())


def test_gradient_flows_in_float32_under_autocast(fixed, toy):
    for provider in map(started, (residual(fixed), mixture(fixed), toy())):
        plain = provider()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            text = provider()
        assert text.dtype == torch.float32 and torch.equal(text, plain)
        (text * torch.randn_like(text)).sum().backward()
        for param in provider.parameters():
            assert param.grad.abs().max() > 0
