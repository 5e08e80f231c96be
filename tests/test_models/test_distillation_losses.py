# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Losses of distillation next to naive ones, and where they must not move."""
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.structures import InstanceData, PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

N, K, D, H, W = 3, 5, 6, 4, 7
IGNORE = 255
GUIDED = dict(kind='TextGuidedDistillationLoss', min_pixels=1)
SEGMENTOR = dict(GUIDED, teacher='segmentor')
SIMILARITY = dict(kind='TextSimilarityDistillationLoss')
CASES = [GUIDED, SEGMENTOR, SIMILARITY]


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def sample(labels, vectors, logits):
    """Data sample with both kinds of teacher."""
    sample = SegDataSample()
    sample.region_embeddings = InstanceData(labels=labels, vectors=vectors)
    sample.teacher = PixelData(logits=logits, features=torch.randn(4, H, W))
    return sample


def batch():
    """Embeddings, text, labels, and samples with teachers."""
    labels = torch.randint(0, K, (N, H, W))
    labels[labels == K - 1] = IGNORE  # the last class is absent
    labels[0, 0] = IGNORE
    # Of class 2 the tower knows nothing, of class 4 it does.
    known = torch.tensor([3, 0, 4, 1])
    samples = []
    for _ in range(N):
        logits = torch.randn(K, H, W)
        samples.append(sample(known, unit(4, D).float(), logits))
    embeddings = 3 * torch.randn(N, D, H, W, dtype=torch.float64)
    text = unit(K, D)
    return dict(
        embeddings=embeddings, text=text, labels=labels, samples=samples)


def call(loss, batch, **changes):
    batch = dict(batch, **changes)
    samples = batch.pop('samples')
    return loss(**batch, ignore_index=IGNORE, batch_data_samples=samples)


def build(kind, **options):
    return MODELS.build(dict(type=kind, **options))


def tower_vector(sample, mask, label, text, temperature):
    regions = sample.region_embeddings
    own, = (regions.labels == label).nonzero(as_tuple=True)
    return regions.vectors[own[0]].double() if len(own) else None


def text_vector(sample, mask, label, text, temperature):
    """What the segmentor takes a class for, in the space of the text."""
    logits = sample.teacher.logits.double()[:, mask]
    return F.normalize((logits / temperature).softmax(0).sum(1) @ text, dim=0)


def naive_guided(batch, teacher, gamma=1., min_pixels=1, temperature=1.):
    """The formula of the docstring."""
    images = []
    for pixels, labels, sample in zip(batch['embeddings'], batch['labels'],
                                      batch['samples']):
        students, teachers, text = [], [], []
        for k in range(K):
            mask = labels == k
            vector = teacher(sample, mask, k, batch['text'], temperature)
            if mask.sum() >= min_pixels and vector is not None:
                students.append(F.normalize(pixels[:, mask].sum(1), dim=0))
                teachers.append(vector)
                text.append(batch['text'][k])
        if not text:
            continue
        s, v, t = map(torch.stack, (students, teachers, text))
        terms = (gamma * t @ t.T - s @ v.T)**2
        terms.diagonal().copy_(((s - v)**2).sum(1))
        images.append(terms.mean())
    return torch.stack(images).mean().item()


@pytest.mark.stacks
@each_case('options, teacher, changes', [
    (dict(min_pixels=1, gamma=dict(init=.7)), tower_vector, dict(gamma=.7)),
    (dict(min_pixels=6), tower_vector, dict(min_pixels=6)),
    (SEGMENTOR, text_vector, dict()),
    (dict(SEGMENTOR, temperature=4.), text_vector, dict(temperature=4.)),
])
def test_guided(options, teacher, changes):
    data = batch()
    data['labels'][1] = IGNORE  # an image that does not count
    loss = build(**{**GUIDED, **options}, loss_weight=10.)
    expected = naive_guided(data, teacher, **changes)
    for text in (data['text'], data['text'].expand(N, -1, -1)):
        got = call(loss, data, text=text).item()
        assert got == pytest.approx(10 * expected, rel=1e-6)
    assert loss.loss_name == 'loss_text_guided'


def naive_divergence(student, teacher, labels, temperature):
    """T^2 times the mean KL over pixels."""
    p, q = ((z.double().movedim(1, -1)[labels != IGNORE] / temperature)
            for z in (teacher, student))
    kl = F.kl_div(q.log_softmax(1), p.softmax(1), reduction='batchmean')
    return temperature**2 * kl.item()


@pytest.mark.stacks
@each_case('temperature', [1., 4.])
def test_logits_similarity_maps_and_channels(temperature):
    data = batch()
    labels = data['labels']
    teacher = torch.stack([s.teacher.logits for s in data['samples']])
    logits = torch.randn(N, K, H, W)
    loss = build('LogitDistillationLoss', temperature=temperature)
    got = loss(logits, teacher, labels, ignore_index=IGNORE)
    expected = naive_divergence(logits, teacher, labels, temperature)
    assert got.item() == pytest.approx(expected, rel=1e-5)

    cosines = F.cosine_similarity(
        data['embeddings'][:, None], data['text'][..., None, None], dim=2)
    loss = build(**SIMILARITY, scale=dict(init=5.), temperature=temperature)
    expected = naive_divergence(5 * cosines, teacher, labels, temperature)
    for text in (data['text'], data['text'].expand(N, -1, -1)):
        got = call(loss, data, text=text).item()
        assert got == pytest.approx(expected, rel=1e-5)

    # A distribution over the places of an image, for each channel.
    total = 0
    for ours, theirs, mask in zip(logits, teacher, labels != IGNORE):
        rows = (z[:, mask][..., None] for z in (ours, theirs))
        total += naive_divergence(*rows, torch.zeros(K, 1), temperature)
    loss = build('ChannelWiseDistillationLoss', temperature=temperature)
    got = loss(logits, teacher, labels, ignore_index=IGNORE)
    assert got.item() == pytest.approx(3 * total / N, rel=1e-5)


@each_case('case', CASES)
def test_gradients_of_text_losses(case):
    loss, data = build(**case), batch()
    embeddings = data['embeddings'].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda e: call(loss, data, embeddings=e), embeddings, atol=1e-4)
    # The text is given; the factor on it, or on the cosines, is learned.
    text = data['text'].requires_grad_()
    logits = [s.teacher.logits.requires_grad_() for s in data['samples']]
    call(loss, data).backward()
    factor, = loss.parameters()
    assert factor.grad.abs() > 0
    assert text.grad is None and all(z.grad is None for z in logits)


def test_one_logit_is_that_of_the_second_of_two_classes():
    loss, labels = build('LogitDistillationLoss'), batch()['labels']
    student, teacher = (torch.randn(N, 1, H, W) for _ in range(2))

    def two(logit):
        return torch.cat([-logit / 2, logit / 2], dim=1)

    one, both = (loss(a, b, labels, ignore_index=IGNORE)
                 for a, b in ((student, teacher), (two(student),
                                                   two(teacher))))
    assert one > 0
    torch.testing.assert_close(one, both)
    # Of a teacher with one logit, read as the two names.
    data = batch()
    data.update(text=unit(2, D), labels=data['labels'].clamp(max=1))
    for case in (SEGMENTOR, SIMILARITY):
        found = []
        for form in (lambda logit: logit, two):
            for image, logit in zip(data['samples'], teacher):
                image.teacher = PixelData(logits=form(logit[None])[0])
            found.append(call(build(**case), data))
        torch.testing.assert_close(*found)
        assert found[0] > 0


@each_case('kind', ['LogitDistillationLoss', 'ChannelWiseDistillationLoss'])
def test_gradients_of_logit_losses(kind):
    loss, labels = build(kind), batch()['labels']
    teacher, logits = (
        torch.randn(N, K, H, W, dtype=torch.float64, requires_grad=True)
        for _ in range(2))

    def call(logits, teacher=teacher):
        return loss(logits, teacher, labels, ignore_index=IGNORE)

    assert torch.autograd.gradcheck(call, logits)
    value = call(logits)
    value.backward()
    assert teacher.grad is None
    # Ignored pixels get none, and a change there changes nothing.
    ignored = (labels == IGNORE)[:, None].expand_as(logits)
    assert (logits.grad[ignored] == 0).all()
    assert (logits.grad[~ignored] != 0).any()
    other = torch.where(ignored, 100., teacher)
    assert call(logits, other) == call(other.where(ignored, logits)) == value


@each_case('what', ['ignored', 'unknown', 'one class', 'pixel'])
@each_case('case', CASES)
def test_degenerate_batches_of_text_losses(case, what):
    labels, data = torch.full((N, H, W), IGNORE), batch()
    if what == 'unknown':
        labels[:] = 2  # of which the tower knows nothing
    elif what == 'one class':
        labels[:] = 1
    elif what == 'pixel':
        labels[0, 1, 1], labels[0, 2, 2] = 0, 3
    loss = build(**case)
    embeddings = data['embeddings'].requires_grad_()
    value = call(loss, data, labels=labels)
    value.backward()
    grads = [embeddings.grad, *(p.grad for p in loss.parameters())]
    assert value.isfinite() and all(g.isfinite().all() for g in grads)
    if what == 'ignored' or (what == 'unknown' and case is GUIDED):
        assert value == 0 and all((g == 0).all() for g in grads)
    else:
        assert value > 0 and (embeddings.grad != 0).any()
    if case is GUIDED and what == 'one class':
        expected = naive_guided(dict(data, labels=labels), tower_vector)
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
    features, teacher = torch.randn(2, 3, H, W), torch.randn(2, 4, H, W)
    labels = torch.zeros(2, H, W, dtype=torch.long)
    options = dict(kind='ChannelWiseDistillationLoss', on='features')
    loss, own = build(**options, align=(3, 4)), build(**options)
    value = loss(features, teacher, labels)
    assert value.item() == own(loss.align(features), teacher, labels).item()
    value.backward()
    assert (loss.align.weight.grad != 0).any()
    match = '3 channels and the teacher 4.*align'
    with pytest.raises(ValueError, match=match):
        own(features, teacher, labels)


@each_case('options, message', [
    (dict(GUIDED, teacher='clip'), 'one of'),
    (dict(GUIDED, min_pixels=0), 'at least 1'),
    (dict(GUIDED, temperature=0), 'positive'),
    (dict(SIMILARITY, temperature=-1), 'positive'),
    (dict(kind='LogitDistillationLoss', temperature=0.), 'positive'),
    (dict(kind='ChannelWiseDistillationLoss', temperature=0.), 'positive'),
    (dict(kind='ChannelWiseDistillationLoss', on='pixels'), "'logits' or"),
])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


WIDER = dict(text=unit(K, D + 1), embeddings=torch.randn(N, D + 1, H, W))
NOTHING = dict(samples=[SegDataSample()] * N)
NO_3 = dict(
    text=unit(K - 1, D), labels=torch.full((N, H, W), 2, dtype=torch.long))


@each_case('case, changes, message', [
    (GUIDED, NOTHING, 'add_region_embeddings'),
    (SEGMENTOR, NOTHING, 'teacher=dict'),
    (SIMILARITY, NOTHING, 'teacher=dict'),
    (GUIDED, WIDER, 'of 6 dimensions.*one CLIP model'),
    (GUIDED, NO_3, 'up to 4 do not fit.*for 4 classes'),
    (SIMILARITY, NO_3, 'teacher has 5 classes.*text 4'),
])
def test_what_the_samples_must_bring(case, changes, message):
    with pytest.raises(ValueError, match=message):
        call(build(**case), batch(), **changes)
