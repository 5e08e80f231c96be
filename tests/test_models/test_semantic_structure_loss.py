# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
import math

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


def cosine(a, b):
    a, b = torch.as_tensor(a).tolist(), torch.as_tensor(b).tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(
        sum(x**2 for x in a) * sum(y**2 for y in b))


def naive(embeddings,
          text,
          labels,
          target,
          off_diagonal=True,
          scale=None,
          min_pixels=1):
    """The loss in plain Python."""
    sums, counts = {}, {}
    for n in range(len(labels)):
        for y in range(H):
            for x in range(W):
                k = labels[n, y, x].item()
                if k == 255:
                    continue
                pixel = embeddings[n, :, y, x].tolist()
                sums[k] = [a + b for a, b in zip(sums.get(k, [0] * D), pixel)]
                counts[k] = counts.get(k, 0) + 1
    classes = [k for k in sorted(counts) if counts[k] >= min_pixels]
    rows = text.tolist()
    rows = [[v / math.hypot(*row) for v in row] for row in rows]
    if target == 'centered':
        mean = [sum(column) / len(rows) for column in zip(*rows)]
        rows = [[v - m for v, m in zip(row, mean)] for row in rows]
    factor = (scale or {}).get('init', 1.)
    pairs = [(a, b) for a in classes for b in classes
             if a != b or not off_diagonal]
    ours = [factor * cosine(sums[a], sums[b]) for a, b in pairs]
    theirs = [cosine(rows[a], rows[b]) for a, b in pairs]
    if target == 'standardized':
        r = correlation(ours, theirs)
        return 2 * (1 - r)
    return sum((a - b)**2 for a, b in zip(ours, theirs)) / len(pairs)


def correlation(a, b):
    a, b = ([v - sum(s) / len(s) for v in s] for s in (a, b))
    return cosine(a, b)


@each_case('options', OPTIONS)
def test_against_a_naive_loop(options):
    embeddings, text, labels = data()
    for min_pixels in (1, 2):
        loss = build(min_pixels, loss_weight=3., **options)
        expected = 3 * naive(embeddings, text, labels, **options,
                             min_pixels=min_pixels)  # yapf: disable
        # Standardizing adds 1e-6 to a variance.
        assert loss(embeddings, text, labels).item() == pytest.approx(
            expected, rel=1e-5 if 'stand' in options['target'] else 1e-6)
    # One pixel of class 4 counts in the first and not in the second.
    one, two = (
        build(n, **options)(embeddings, text, labels).item() for n in (1, 2))
    assert one != pytest.approx(two, rel=1e-3)


@each_case('options', OPTIONS)
def test_gradient(options):
    embeddings, text, labels = data()
    loss = build(**options)
    text.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: loss(e, text, labels),
                                    (embeddings, ))
    value = loss(embeddings, text, labels)
    value.backward()
    # The text is the target; ignored pixels take no part.
    assert text.grad is None
    assert embeddings.grad[0, :, 0].abs().max() == 0
    assert embeddings.grad[0, :, 1:].abs().min() > 0
    better = loss(embeddings - 0.01 * embeddings.grad, text, labels)
    assert better < value
    if loss.scale is not None and loss.scale.learnable:
        assert loss.scale.log_scale.grad.abs() > 0


def test_core_by_hand():
    a = torch.tensor([[1., .5, 0], [.5, 1, .25], [0, .25, 1]])
    b = torch.tensor([[1., .25, 0], [.25, .5, .25], [0, .25, 1]])
    assert structure_loss(a, b).item() == pytest.approx(2 * .0625 / 6)
    assert structure_loss(
        a, b, off_diagonal=False).item() == pytest.approx(
            (2 * .0625 + .25) / 9)
    some = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]]).bool()
    assert structure_loss(a, b, pairs=some).item() == pytest.approx(.0625)
    assert some.sum() == 4
    one = torch.ones(1, 1, requires_grad=True)
    alone = structure_loss(one, torch.zeros(1, 1))
    alone.backward()
    assert alone.item() == 0 and one.grad.item() == 0


def test_zero_where_pixels_lie_as_the_text_does():
    _, text, labels = data()
    unit = F.normalize(text, dim=1)
    seen = labels.where(labels != 255, 0)
    for target, rows in (('raw', unit), ('centered', unit - unit.mean(0)),
                         ('standardized', unit)):
        embeddings = rows[seen].permute(0, 3, 1, 2) * 7
        turned = embeddings.flip(1)
        for pixels in (embeddings, turned):
            value = build(target=target)(pixels, text, labels)
            assert value.item() == pytest.approx(0, abs=1e-5)
    # 'raw' asks for what 'centered' does not.
    assert build(target='raw')(embeddings - 1, text, labels) > 1e-3


@each_case('options', OPTIONS)
def test_what_must_not_matter(options):
    embeddings, text, labels = data()
    loss = build(**options)
    value = loss(embeddings, text, labels)
    # Length, order of images and names of classes.
    for other in (loss(embeddings * 100, text * 3,
                       labels), loss(embeddings.flip(0), text,
                                     labels.flip(0))):
        torch.testing.assert_close(other, value)
    order = torch.randperm(K)
    renamed = labels.clone()
    for new, old in enumerate(order.tolist()):
        renamed[labels == old] = new
    torch.testing.assert_close(loss(embeddings, text[order], renamed), value)
    # Which text belongs to which class does matter.
    other = loss(embeddings, text.roll(1, 0), labels).item()
    assert other != pytest.approx(value.item(), rel=1e-3)


def test_batch_and_not_each_image():
    embeddings, text, labels = data()
    labels[0], labels[1] = 0, 1
    alone = [build()(embeddings[i:i + 1], text, labels[i:i + 1])
             for i in (0, 1)]  # yapf: disable
    assert alone == [0, 0]
    assert build()(embeddings, text, labels) > 0


def change(labels, how):
    labels = labels.clone()
    if how == 'one class':
        labels[labels != 255] = 2
    elif how == 'all ignored':
        labels[:] = 255
    elif how == 'all too small':
        labels[:] = 255
        labels[0, 0] = torch.arange(4)
    return labels


@each_case('options', OPTIONS)
@each_case('how', ['one class', 'all ignored', 'all too small'])
def test_fewer_than_two_classes_give_zero_with_a_graph(options, how):
    embeddings, text, labels = data()
    loss = build(min_pixels=2, **options)
    value = loss(embeddings, text, change(labels, how))
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


def test_regions_of_one_pixel():
    embeddings, text, _ = data()
    labels = torch.full((N, H, W), 255)
    labels[0, 0, 0], labels[1, 2, 3] = 0, 3
    loss = build(target='raw')
    expected = (cosine(embeddings[0, :, 0, 0], embeddings[1, :, 2, 3]) -
                cosine(text[0], text[3]))**2
    value = loss(embeddings, text, labels)
    assert value.item() == pytest.approx(expected)
    value.backward()
    assert embeddings.grad.isfinite().all()
    assert SemanticStructureLoss()(embeddings, text, labels) == 0


def test_other_resolutions():
    embeddings, text, labels = data()
    loss = build()
    value = loss(embeddings, text, labels)
    big = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(loss(embeddings, text, big), value)


def test_text_of_each_image_and_several_phrases():
    embeddings, text, labels = data()
    loss = build()
    value = loss(embeddings, text, labels)
    drawn = torch.stack([text, text.roll(1, 0)])
    torch.testing.assert_close(
        loss(embeddings, text.expand(N, K, D), labels), value)
    # Unit rows, as providers give them.
    drawn = F.normalize(drawn, dim=2)
    mean = loss(embeddings, drawn.mean(0), labels)
    torch.testing.assert_close(loss(embeddings, drawn, labels), mean)
    torch.testing.assert_close(loss(embeddings, drawn[None], labels), mean)
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


# ------------------------------------------------------------- memory
def remembering(momentum=.9):
    return build(target='raw', momentum=momentum, shape=(K, D)).train()


def test_memory_is_a_moving_average_and_gives_more_pairs():
    embeddings, text, labels = data()
    loss = remembering()
    first = loss(embeddings, text, labels)
    assert first == build(target='raw')(embeddings, text, labels)
    before = loss.memory.clone()
    assert before[3].abs().max() == 0
    torch.testing.assert_close(before[4],
                               F.normalize(embeddings[0, :, 1, 1], dim=0))
    only = labels.clone()
    only[only != 255] = 3
    # Class 3 has not been seen, so it is not compared with itself, but with
    # the three others that have been: 0, 1, 2 and 4.
    value = loss(embeddings, text, only)
    mean = embeddings.permute(0, 2, 3, 1)[only == 3].sum(0)
    expected = [(cosine(mean, before[k]) - cosine(text[3], text[k]))**2
                for k in (0, 1, 2, 4)]
    assert value.item() == pytest.approx(sum(expected) / 4)
    value.backward()
    assert embeddings.grad.abs().max() > 0
    # Of what is absent nothing moves.
    rest = [0, 1, 2, 4]
    assert torch.equal(loss.memory[rest], before[rest])
    torch.testing.assert_close(loss.memory[3], F.normalize(mean, dim=0))
    old = loss.memory[3].clone()
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
    whole = remembering()
    whole(embeddings, text, first)
    saved = copy.deepcopy(whole.state_dict())
    assert list(saved) == ['memory']
    resumed = remembering()
    resumed.load_state_dict(saved)
    assert resumed(embeddings, text, second) == whole(embeddings, text, second)
    assert torch.equal(resumed.memory, whole.memory)
    assert not torch.equal(whole.memory, saved['memory'])
    # A fresh one does not give that value: the memory matters.
    assert remembering()(embeddings, text,
                         second) != whole(embeddings, text, second)
    before = whole.memory.clone()
    whole.eval()(embeddings, text, first)
    assert torch.equal(whole.memory, before)
    # Nothing of the last batch's graph is kept.
    assert not whole.memory.requires_grad
    with pytest.raises(ValueError, match=r'\(5, 6\).*\(4, 6\)'):
        whole(embeddings, text[:4], labels.clamp(max=3))


# -------------------------------------------------------------- ranks
def step(rank, world, options, queue):
    """One rank's part of a batch of four, as DDP would do it."""
    if world > 1:
        distributed.init_process_group(
            'gloo', init_method=f'file://{queue}', rank=rank, world_size=world)
    torch.manual_seed(0)
    images, text, labels = data(images=4)
    layer = nn.Conv2d(D, D, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(D, D, 1, 1))
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


def rank_main(rank, world, cases, queue, out):
    results = [step(rank, world, options, f'{queue}_{i}')
               if i == 0 else step_again(rank, world, options)
               for i, options in enumerate(cases)]  # yapf: disable
    torch.save(results, f'{out}_{rank}.pt')


def step_again(rank, world, options):
    """The process group is there already."""
    inits, distributed.init_process_group = (distributed.init_process_group,
                                             lambda *args, **kwargs: None)
    try:
        return step(rank, world, options, '')
    finally:
        distributed.init_process_group = inits


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
    first, second = (torch.load(f'{out}_{rank}.pt') for rank in (0, 1))
    for i, options in enumerate(cases):
        one = step(0, 1, options, None)
        assert one[0] > 0 and one[2].abs().max() > 0
        for got in (first[i], second[i]):
            assert len(got) == len(one)
            for a, b in zip(got, one):
                torch.testing.assert_close(a, b)


def test_name_and_bad_arguments():
    assert SemanticStructureLoss().loss_name == 'loss_structure'
    for options, words in ((dict(target='cosine'), 'standardized'),
                           (dict(min_pixels=0), 'at least 1'),
                           (dict(momentum=.9), 'needs `shape`'),
                           (dict(shape=(2, 3)), 'needs `shape`'),
                           (dict(momentum=1., shape=(2, 3)), r'\[0, 1\)'),
                           (dict(target='standardized', scale={}), 'scale')):
        with pytest.raises(ValueError, match=words):
            SemanticStructureLoss(**options)
