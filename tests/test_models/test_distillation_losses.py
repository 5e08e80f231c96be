# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Losses of distillation next to naive loops, and where they must not move."""
import math

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.structures import InstanceData, PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

N, K, D, H, W = 3, 5, 6, 4, 7
IGNORE = 255


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.fixture
def batch():
    """Embeddings, text, labels, and samples with both kinds of teacher."""
    labels = torch.randint(0, K, (N, H, W))
    labels[labels == K - 1] = IGNORE  # the last class is absent
    labels[0, 0] = IGNORE
    samples = []
    for _ in range(N):
        sample = SegDataSample()
        # Of class 2 the tower knows nothing, of class 4 it does.
        sample.region_embeddings = InstanceData(
            labels=torch.tensor([0, 1, 3, 4]), vectors=unit(4, D).float())
        sample.teacher = PixelData(
            logits=torch.randn(K, H, W), features=torch.randn(4, H, W))
        samples.append(sample)
    return dict(
        embeddings=3 * torch.randn(N, D, H, W, dtype=torch.float64),
        text=unit(K, D),
        labels=labels,
        samples=samples)


def call(loss, batch, **changes):
    batch = dict(batch, **changes)
    return loss(
        batch['embeddings'],
        batch['text'],
        batch['labels'],
        ignore_index=IGNORE,
        batch_data_samples=batch['samples'])


def build(kind, **options):
    return MODELS.build(dict(type=kind, **options))


def pixels(batch, image, label):
    return [(y, x) for y in range(H) for x in range(W)
            if batch['labels'][image, y, x] == label]


def student(batch, image, label):
    """The unit mean of the embeddings of a class, pixel by pixel."""
    total = torch.zeros(D, dtype=torch.float64)
    for y, x in pixels(batch, image, label):
        total += batch['embeddings'][image, :, y, x]
    return total / total.norm()


def tower_vector(batch, image, label):
    regions = batch['samples'][image].region_embeddings
    for own, vector in zip(regions.labels.tolist(), regions.vectors):
        if own == label:
            return vector.double()
    return None


def text_vector(batch, image, label, temperature):
    """What the segmentor takes a class for, in the space of the text."""
    logits = batch['samples'][image].teacher.logits.double()
    vector = torch.zeros(D, dtype=torch.float64)
    for y, x in pixels(batch, image, label):
        share = [math.exp(z / temperature) for z in logits[:, y, x].tolist()]
        for k in range(K):
            vector += share[k] / sum(share) * batch['text'][k]
    return vector / vector.norm()


def naive_guided(batch, teacher, gamma, min_pixels=1):
    """The formula of the docstring, term by term."""
    text, images = batch['text'], []
    for i in range(N):
        known = {}
        for k in range(K):
            if len(pixels(batch, i, k)) < min_pixels:
                continue
            vector = teacher(batch, i, k)
            if vector is not None:
                known[k] = student(batch, i, k), vector
        terms = []
        for a, (s, v) in known.items():
            terms.append(sum((s - v)**2))
            for b, (_, other) in known.items():
                if a != b:
                    terms.append(
                        (gamma * sum(text[a] * text[b]) - sum(s * other))**2)
        if terms:
            assert len(terms) == len(known)**2
            images.append(sum(terms) / len(terms))
    return float(sum(images) / len(images))


@pytest.mark.stacks
@pytest.mark.parametrize('min_pixels', [1, 6])
def test_guided_by_regions(batch, min_pixels):
    batch['labels'][1] = IGNORE  # an image that does not count
    loss = build(
        'TextGuidedDistillationLoss',
        gamma=dict(init=.7),
        min_pixels=min_pixels,
        loss_weight=10.)
    expected = naive_guided(batch, tower_vector, .7, min_pixels)
    assert call(loss, batch).item() == pytest.approx(10 * expected, rel=1e-6)
    assert loss.loss_name == 'loss_text_guided'


@pytest.mark.parametrize('temperature', [1., 4.])
def test_guided_by_a_segmentor(batch, temperature):
    loss = build(
        'TextGuidedDistillationLoss',
        teacher='segmentor',
        temperature=temperature,
        min_pixels=1,
        loss_weight=1.)
    expected = naive_guided(batch,
                            lambda b, i, k: text_vector(b, i, k, temperature),
                            1.)
    assert call(loss, batch).item() == pytest.approx(expected, rel=1e-6)


def naive_divergence(student, teacher, labels, temperature):
    """T^2 times the mean KL over pixels, from the definition."""
    total = number = 0
    for i, y, x in (labels != IGNORE).nonzero().tolist():
        p, q = ([math.exp(v / temperature) for v in z[i, :, y, x].tolist()]
                for z in (teacher.double(), student.double()))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
        number += 1
    return temperature**2 * total / number


@pytest.mark.stacks
@pytest.mark.parametrize('temperature', [1., 4.])
def test_logits_and_similarity_maps(batch, temperature):
    teacher = torch.stack([s.teacher.logits for s in batch['samples']])
    logits = torch.randn(N, K, H, W)
    loss = build('LogitDistillationLoss', temperature=temperature)
    got = loss(logits, teacher, batch['labels'], ignore_index=IGNORE)
    assert got.item() == pytest.approx(
        naive_divergence(logits, teacher, batch['labels'], temperature),
        rel=1e-5)

    cosines = torch.zeros(N, K, H, W, dtype=torch.float64)
    for i, k, y, x in torch.ones(N, K, H, W).nonzero().tolist():
        e = batch['embeddings'][i, :, y, x]
        cosines[i, k, y, x] = sum(batch['text'][k] * e) / sum(e * e)**.5
    loss = build(
        'TextSimilarityDistillationLoss',
        scale=dict(init=5.),
        temperature=temperature)
    assert call(loss, batch).item() == pytest.approx(
        naive_divergence(5 * cosines, teacher, batch['labels'], temperature),
        rel=1e-5)


@pytest.mark.stacks
@pytest.mark.parametrize('temperature', [1., 4.])
def test_channel_wise(batch, temperature):
    teacher, logits = torch.randn(2, N, K, H, W)
    labels = batch['labels']
    total = 0
    for i in range(N):
        for k in range(K):
            p, q = ([
                math.exp(v / temperature)
                for v in z[i, k][labels[i] != IGNORE].tolist()
            ] for z in (teacher, logits))
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q))
    loss = build('ChannelWiseDistillationLoss', temperature=temperature)
    got = loss(logits, teacher, labels, ignore_index=IGNORE)
    assert got.item() == pytest.approx(
        3 * temperature**2 * total / (N * K), rel=1e-5)


CASES = [
    dict(kind='TextGuidedDistillationLoss', min_pixels=1),
    dict(kind='TextGuidedDistillationLoss', min_pixels=1, teacher='segmentor'),
    dict(kind='TextSimilarityDistillationLoss'),
]
IDS = ['regions', 'segmentor', 'similarity']


@pytest.mark.parametrize('case', CASES, ids=IDS)
def test_text_losses_do_not_mind(case, batch):
    """Order of classes and images, length of embeddings, copies of text."""
    loss = build(**case)
    expected = call(loss, batch).item()
    assert expected > 0

    scaled = batch['embeddings'] * 7.
    if case['kind'] == 'TextSimilarityDistillationLoss':
        # Each pixel may have a length of its own.
        scaled = scaled * torch.rand(N, 1, H, W).add(.1)
    assert call(
        loss, batch, embeddings=scaled).item() == pytest.approx(expected)

    order = torch.randperm(N)
    shuffled = dict(
        embeddings=batch['embeddings'][order],
        labels=batch['labels'][order],
        samples=[batch['samples'][i] for i in order])
    assert call(loss, batch, **shuffled).item() == pytest.approx(expected)

    place = torch.randperm(K)  # class k becomes place[k]
    text = torch.empty_like(batch['text'])
    text[place] = batch['text']
    labels = batch['labels']
    labels = torch.where(labels == IGNORE, labels,
                         place[labels.where(labels != IGNORE, 0)])
    samples = []
    for old in batch['samples']:
        sample = SegDataSample()
        logits = torch.empty_like(old.teacher.logits)
        logits[place] = old.teacher.logits
        sample.teacher = PixelData(logits=logits)
        sample.region_embeddings = InstanceData(
            labels=place[old.region_embeddings.labels],
            vectors=old.region_embeddings.vectors)
        samples.append(sample)
    permuted = call(loss, batch, text=text, labels=labels, samples=samples)
    assert permuted.item() == pytest.approx(expected)

    own = batch['text'].expand(N, -1, -1)
    assert call(loss, batch, text=own).item() == pytest.approx(expected)


@pytest.mark.parametrize('case', CASES, ids=IDS)
def test_gradients_of_text_losses(case, batch):
    loss = build(**case)
    embeddings = batch['embeddings'].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda e: call(loss, batch, embeddings=e), embeddings, atol=1e-4)
    # The text is given; the factor on it, or on the cosines, is learned.
    text = batch['text'].requires_grad_()
    call(loss, batch).backward()
    assert text.grad is None
    factor, = loss.parameters()
    assert factor.grad.abs() > 0
    # Teachers are untouched.
    assert not any(s.teacher.logits.requires_grad for s in batch['samples'])


@pytest.mark.parametrize(
    'kind', ['LogitDistillationLoss', 'ChannelWiseDistillationLoss'])
def test_gradients_of_logit_losses(kind, batch):
    loss = build(kind)
    teacher, logits = torch.randn(
        2, N, K, H, W, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: loss(z, teacher, batch['labels'], ignore_index=IGNORE),
        logits)
    leaf = teacher.detach().requires_grad_()
    loss(logits, leaf, batch['labels'], ignore_index=IGNORE).backward()
    assert leaf.grad is None
    # Ignored pixels get none, and a change there changes nothing.
    grad, = torch.autograd.grad(
        loss(logits, teacher, batch['labels'], ignore_index=IGNORE), logits)
    ignored = (batch['labels'] == IGNORE)[:, None].expand_as(grad)
    assert (grad[ignored] == 0).all() and (grad[~ignored] != 0).any()
    other = torch.where(ignored, 100., teacher)
    for changed in ((logits, other), (other.where(ignored, logits), teacher)):
        assert loss(
            *changed, batch['labels'], ignore_index=IGNORE).item() == loss(
                logits, teacher, batch['labels'], ignore_index=IGNORE).item()


@each_case('what', ['ignored', 'unknown', 'one class', 'pixel'])
@each_case('case', CASES)
def test_degenerate_batches_of_text_losses(case, what, batch):
    labels = torch.full((N, H, W), IGNORE)
    if what == 'unknown':
        labels[:] = 2  # of which the tower knows nothing
    elif what == 'one class':
        labels[:] = 1
    elif what == 'pixel':
        labels[0, 1, 1], labels[0, 2, 2] = 0, 3
    loss = build(**case)
    embeddings = batch['embeddings'].requires_grad_()
    value = call(loss, batch, labels=labels)
    value.backward()
    grads = [embeddings.grad, *(p.grad for p in loss.parameters())]
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    empty = what == 'ignored' or (what == 'unknown' and case is CASES[0])
    if empty:
        assert value == 0 and all((g == 0).all() for g in grads)
    else:
        assert value > 0 and (embeddings.grad != 0).any()
    if case is CASES[0] and what == 'one class':
        expected = naive_guided(dict(batch, labels=labels), tower_vector, 1.)
        assert value.item() == pytest.approx(10 * expected)


def test_degenerate_batches_of_logit_losses():
    logits = torch.randn(2, K, 3, 3, requires_grad=True)
    teacher = torch.randn(2, K, 3, 3)
    labels = torch.full((2, 3, 3), IGNORE)
    for kind in ('LogitDistillationLoss', 'ChannelWiseDistillationLoss'):
        loss = build(kind)
        value = loss(logits, teacher, labels, ignore_index=IGNORE)
        grad, = torch.autograd.grad(value, logits)
        assert value == 0 and (grad == 0).all()
        # Half precision with large logits.
        value = loss(300 * logits.half(), -300 * teacher.half(),
                     torch.zeros_like(labels))
        assert value.dtype == torch.float32 and value.isfinite()
    # One pixel of a channel is all of it: nothing to learn.
    labels[0, 1, 1] = 0
    assert loss(logits, teacher, labels, ignore_index=IGNORE) == 0


def test_features_of_another_width():
    torch.manual_seed(0)
    features, teacher = torch.randn(2, 3, H, W), torch.randn(2, 4, H, W)
    labels = torch.zeros(2, H, W, dtype=torch.long)
    loss = build('ChannelWiseDistillationLoss', on='features', align=(3, 4))
    own = build('ChannelWiseDistillationLoss', on='features')
    value = loss(features, teacher, labels)
    assert value.item() == own(loss.align(features), teacher, labels).item()
    value.backward()
    assert (loss.align.weight.grad != 0).any()
    with pytest.raises(
            ValueError, match='3 channels and the teacher 4.*align'):
        own(features, teacher, labels)


@each_case('kind, options, message', [
    ('TextGuidedDistillationLoss', dict(teacher='clip'), 'one of'),
    ('TextGuidedDistillationLoss', dict(min_pixels=0), 'at least 1'),
    ('TextGuidedDistillationLoss', dict(temperature=0), 'positive'),
    ('TextSimilarityDistillationLoss', dict(temperature=-1), 'positive'),
    ('LogitDistillationLoss', dict(temperature=0.), 'positive'),
    ('ChannelWiseDistillationLoss', dict(temperature=0.), 'positive'),
    ('ChannelWiseDistillationLoss', dict(on='pixels'), "'logits' or"),
])
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **options)


def test_what_the_samples_must_bring(batch):
    for case, message in zip(
            CASES, ('add_region_embeddings', 'teacher=dict', 'teacher=dict')):
        with pytest.raises(ValueError, match=message):
            call(build(**case), batch, samples=[SegDataSample()] * N)
    loss = build(**CASES[0])
    with pytest.raises(ValueError, match='of 6 dimensions.*one CLIP model'):
        call(
            loss,
            batch,
            text=unit(K, D + 1),
            embeddings=torch.randn(N, D + 1, H, W))
    batch['labels'][batch['labels'] == 3] = IGNORE
    with pytest.raises(ValueError, match='up to 4 do not fit.*for 4 classes'):
        call(loss, batch, text=unit(K - 1, D))
    with pytest.raises(ValueError, match='teacher has 5 classes.*text 4'):
        call(build(**CASES[2]), batch, text=unit(K - 1, D))
