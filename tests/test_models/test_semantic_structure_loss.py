# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.dist import all_reduce
from processes import run_ranks
from torch import distributed, nn

from mmseg_textkd.models import SemanticStructureLoss
from mmseg_textkd.models.losses import structure_loss

N, D, K, H, W = 2, 6, 5, 5, 4
OPTIONS = [
    dict(target='raw'),
    dict(target='centered'),
    dict(target='standardized'),
    dict(target='raw', off_diagonal=False, scale=dict(init=2.)),
    dict(target='centered', off_diagonal=False),
    dict(target='standardized', off_diagonal=False),
    dict(target='centered', scale=dict(init=.5, learnable=False)),
]


def build(min_pixels=1, **options):
    return SemanticStructureLoss(min_pixels=min_pixels, **options).double()


def data(dtype=torch.float64, images=N):
    """Class 3 is absent, class 4 has one pixel, one row is ignored."""
    torch.manual_seed(3)
    embeddings = torch.randn(images, D, H, W, dtype=dtype, requires_grad=True)
    text = torch.randn(K, D, dtype=dtype) + 2
    labels = torch.randint(0, 3, (images, H, W))
    labels[0, 0] = 255
    labels[0, 1, 1] = 4
    return embeddings, text, labels


def naive(embeddings,
          text,
          labels,
          target,
          off_diagonal=True,
          scale=None,
          min_pixels=1):
    """The loss, pair by pair."""
    pixels = {k: embeddings.movedim(1, -1)[labels == k] for k in range(K)}
    means = {k: p.sum(0) for k, p in pixels.items() if len(p) >= min_pixels}
    rows = F.normalize(text, dim=1)
    if target == 'centered':
        rows = rows - rows.mean(0)
    factor = (scale or {}).get('init', 1.)
    pairs = [(a, b) for a in means for b in means
             if a != b or not off_diagonal]
    cosine = torch.nn.CosineSimilarity(dim=0)
    ours = torch.stack([factor * cosine(means[a], means[b]) for a, b in pairs])
    theirs = torch.stack([cosine(rows[a], rows[b]) for a, b in pairs])
    if target == 'standardized':
        correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1]
        return 2 * (1 - correlation)
    return F.mse_loss(ours, theirs)


@each_case('options', OPTIONS)
def test_against_a_naive_loop(options):
    values = []
    for min_pixels in (1, 2):
        loss = build(min_pixels, loss_weight=3., **options)
        expected = 3 * naive(*data(), **options, min_pixels=min_pixels)
        values.append(loss(*data()).item())
        # Standardizing adds 1e-6 to a variance.
        assert values[-1] == pytest.approx(
            expected.item(),
            rel=1e-5 if 'stand' in options['target'] else 1e-6)
    embeddings, text, labels = data()
    big = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert loss(embeddings, text, big).item() == pytest.approx(values[-1])
    # One pixel of class 4 counts in the first and not in the second.
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@each_case('options', OPTIONS)
def test_gradient(options):
    embeddings, text, labels = data()
    loss = build(**options)
    text.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: loss(e, text, labels),
                                    (embeddings, ))
    loss(embeddings, text, labels).backward()
    # The text is the target; ignored pixels take no part.
    assert text.grad is None
    assert embeddings.grad[0, :, 0].abs().max() == 0
    assert embeddings.grad[0, :, 1:].abs().min() > 0
    if loss.scale is not None and loss.scale.learnable:
        assert loss.scale.log_scale.grad.abs() > 0


def test_core_by_hand():
    a = torch.tensor([[1., .5, 0], [.5, 1, .25], [0, .25, 1]])
    b = torch.tensor([[1., .25, 0], [.25, .5, .25], [0, .25, 1]])
    assert structure_loss(a, b, ~torch.eye(3).bool()).item() == pytest.approx(
        2 * .0625 / 6)
    whole = structure_loss(a, b, torch.ones(3, 3).bool()).item()
    assert whole == pytest.approx((2 * .0625 + .25) / 9)


@each_case('options', OPTIONS)
@each_case('how', ['one class', 'all ignored', 'all too small'])
def test_fewer_than_two_classes_give_zero_with_a_graph(options, how):
    embeddings, text, labels = data()
    labels[:] = 2 if how == 'one class' else 255
    if how == 'all too small':
        labels[0, 0] = torch.arange(4)
    loss = SemanticStructureLoss(**options).double()
    value = loss(embeddings, text, labels)
    assert value.item() == 0
    value.backward()
    assert embeddings.grad.abs().max() == 0
    if loss.scale is not None and loss.scale.learnable:
        assert loss.scale.log_scale.grad.item() == 0


def test_two_classes_have_one_pair_without_deviation():
    embeddings, text, labels = data()
    labels[labels != 255] %= 2
    value = build(target='standardized')(embeddings, text, labels)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert embeddings.grad.isfinite().all()


def test_text_of_each_image_and_several_phrases():
    embeddings, text, labels = data()
    loss = build()
    value = loss(embeddings, text, labels)
    own = loss(embeddings, text.expand(N, K, D), labels)
    torch.testing.assert_close(own, value)
    # Unit rows, as providers give them.
    drawn = F.normalize(torch.stack([text, text.roll(1, 0)]), dim=2)
    mean = loss(embeddings, drawn.mean(0), labels)
    for several in (drawn, drawn[None]):
        torch.testing.assert_close(loss(embeddings, several, labels), mean)
    assert mean != value


def test_bfloat16_is_computed_in_float32():
    embeddings, text, labels = data(torch.float32)
    low = embeddings.detach().bfloat16()
    for target in ('raw', 'centered', 'standardized'):
        loss = SemanticStructureLoss(target, min_pixels=1)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            value = loss(low, text, labels)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(low.float(), text, labels))


def remembering():
    return build(target='raw', momentum=.9, shape=(K, D)).train()


def test_memory_is_a_moving_average_and_gives_more_pairs():
    embeddings, text, labels = data()
    loss = remembering()
    first = loss(embeddings, text, labels)
    assert first == build(target='raw')(embeddings, text, labels)
    before = loss.memory.clone()
    assert before[3].abs().max() == 0
    torch.testing.assert_close(before[4],
                               F.normalize(embeddings[0, :, 1, 1], dim=0))
    only = labels.where(labels == 255, 3)
    # Class 3 has not been seen, so it is not compared with itself, but with
    # the others that have been.
    rest = [0, 1, 2, 4]
    value = loss(embeddings, text, only)
    mean = embeddings.movedim(1, -1)[only == 3].sum(0)
    ours = F.cosine_similarity(mean[None], before[rest])
    theirs = F.cosine_similarity(text[3:4], text[rest])
    torch.testing.assert_close(value, F.mse_loss(ours, theirs))
    value.backward()
    assert embeddings.grad.abs().max() > 0
    # Of what is absent nothing moves.
    assert torch.equal(loss.memory[rest], before[rest])
    old = F.normalize(mean, dim=0)
    torch.testing.assert_close(loss.memory[3], old)
    loss(-embeddings + 1, text, only)
    new = F.normalize(-mean + (only == 3).sum(), dim=0)
    torch.testing.assert_close(loss.memory[3],
                               F.normalize(.9 * old + .1 * new, dim=0))


def test_memory_rests_in_evaluation_and_goes_on_from_a_checkpoint():
    embeddings, text, labels = data()
    first, second = labels.clone(), labels.clone()
    first[0], second[1] = 255, 3
    # Class 2 is in the first batch only, classes 3 and 4 in the second.
    second[second == 2] = 0
    whole, resumed = remembering(), remembering()
    whole(embeddings, text, first)
    saved = copy.deepcopy(whole.state_dict())
    assert list(saved) == ['memory']
    resumed.load_state_dict(saved)
    assert resumed(embeddings, text, second) == whole(embeddings, text, second)
    assert torch.equal(resumed.memory, whole.memory)
    assert not torch.equal(whole.memory, saved['memory'])
    before = whole.memory.clone()
    whole.eval()(embeddings, text, first)
    assert torch.equal(whole.memory, before)
    # Nothing of the last batch's graph is kept.
    assert not whole.memory.requires_grad
    with pytest.raises(ValueError, match=r'\(5, 6\).*\(4, 6\)'):
        whole(embeddings, text[:4], labels.clamp(max=3))


def step(rank, world, options):
    """One rank's part of a batch of four, as DDP would do it."""
    torch.manual_seed(0)
    images, text, labels = data(images=4)
    layer = nn.Conv2d(D, D, 1).double()
    nn.init.normal_(layer.weight)
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    # Each image has text of its own.
    text = F.normalize(text + torch.randn(4, K, D, dtype=torch.float64), dim=2)
    loss = build(gather=True, **options).train()
    value = loss(layer(images.detach()[own]), text[own], labels[own])
    value.backward()
    grads = [layer.weight.grad]
    if loss.scale is not None:
        grads.append(loss.scale.log_scale.grad)
    for grad in grads:
        all_reduce(grad, 'mean')
    return [value.detach(), loss.memory, *grads]


def rank_main(rank, world, cases, store, out):
    distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    results = [step(rank, world, options) for options in cases]
    torch.save(results, f'{out}_{rank}.pt')


@pytest.mark.stacks
def test_two_ranks_equal_one_process_with_both_batches(tmp_path):
    cases = [
        dict(target='centered'),
        dict(target='standardized'),
        dict(target='raw', scale=dict(init=2.)),
        dict(target='raw', momentum=.9, shape=(K, D)),
    ]
    out = str(tmp_path / 'result')
    run_ranks(rank_main, cases, str(tmp_path / 'store'), out)
    alone = [step(0, 1, options) for options in cases]
    assert all(one[0] > 0 and one[2].abs().max() > 0 for one in alone)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(f'{out}_{rank}.pt'), alone)


@each_case('options, words', [
    (dict(target='cosine'), 'standardized'),
    (dict(min_pixels=0), 'at least 1'),
    (dict(momentum=.9), 'needs `shape`'),
    (dict(shape=(2, 3)), 'needs `shape`'),
    (dict(momentum=1., shape=(2, 3)), r'\[0, 1\)'),
    (dict(target='standardized', scale={}), 'scale'),
])
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        SemanticStructureLoss(**options)
