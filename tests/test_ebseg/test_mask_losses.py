# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Targets, matching and losses against naive computations."""
import itertools
import math

import pytest
import torch
from each_case import each_case

from mmseg_textkd.models.ebseg import EBSegLoss
from mmseg_textkd.models.ebseg.ebseg_loss import (LayerPrediction,
                                                  mask_structure_loss)
from mmseg_textkd.models.ebseg.mask_matching import (mask_targets, match_masks,
                                                     pairwise_mask_costs)

SIZE = (4, 6)


def labels_with(classes, size=SIZE, ignored=3):
    """A label map of exactly these classes, with some ignored pixels."""
    flat = torch.tensor(classes)[torch.randint(
        len(classes), (math.prod(size), ))]
    flat[:len(classes)] = torch.tensor(classes)
    flat[len(flat) - ignored:] = 255
    return flat.view(size)


def naive_bce(logits, mask):
    """Mean binary cross entropy of one mask, in plain Python."""
    total = 0.
    for x, t in zip(logits.tolist(), mask.tolist()):
        p = 1 / (1 + math.exp(-x))
        total -= math.log(p if t else 1 - p)
    return total / len(mask)


def naive_dice(logits, mask):
    """Dice loss of one mask, in plain Python."""
    p = [1 / (1 + math.exp(-x)) for x in logits.tolist()]
    overlap = sum(a * b for a, b in zip(p, mask.tolist()))
    return 1 - (2 * overlap + 1) / (sum(p) + sum(mask.tolist()) + 1)


def test_targets_are_the_classes_in_the_image():
    labels = torch.tensor([[0, 0, 7, 7], [0, 255, 7, 2]])
    targets = mask_targets(labels, (2, 4), num_classes=8)
    assert targets.classes.tolist() == [0, 2, 7]
    assert targets.valid.tolist() == [[True] * 4, [True, False, True, True]]
    assert targets.masks.tolist() == [[1, 1, 0, 0, 1, 0, 0],
                                      [0, 0, 0, 0, 0, 0, 1],
                                      [0, 0, 1, 1, 0, 1, 0]]
    with pytest.raises(ValueError, match='num_classes=7'):
        mask_targets(labels, (2, 4), num_classes=7)


def test_an_image_without_labels_has_no_masks():
    targets = mask_targets(torch.full(SIZE, 255), SIZE, num_classes=8)
    assert len(targets.classes) == 0 and targets.masks.shape == (0, 0)
    rows, columns = match_masks(torch.randn(3, 9), torch.zeros(3, 0), targets)
    assert len(rows) == len(columns) == 0


def test_costs_of_all_pairs():
    logits = torch.randn(5, 12, dtype=torch.double) * 3
    masks = (torch.rand(3, 12) > .5).double()
    bce, dice = pairwise_mask_costs(logits, masks)
    for q, g in itertools.product(range(5), range(3)):
        assert bce[q,
                   g].item() == pytest.approx(naive_bce(logits[q], masks[g]))
        assert dice[q, g].item() == pytest.approx(
            naive_dice(logits[q], masks[g]))


@each_case('queries,classes', [(4, [0, 3]), (3, [1, 2, 4]), (2, [0, 1, 2])])
def test_the_matching_is_the_best_of_all(queries, classes):
    for _ in range(5):
        targets = mask_targets(labels_with(classes), SIZE, num_classes=5)
        scores = torch.randn(queries, 6)
        logits = torch.randn(queries, int(targets.valid.sum()))
        rows, columns = match_masks(scores, logits, targets)
        prob = scores.softmax(1)

        def cost(pairs):
            return sum(-2 * prob[q, classes[g]].item() +
                       5 * naive_bce(logits[q], targets.masks[g]) +
                       5 * naive_dice(logits[q], targets.masks[g])
                       for q, g in pairs)

        number = min(queries, len(classes))
        every = (
            zip(qs, gs)
            for qs in itertools.permutations(range(queries), number)
            for gs in itertools.combinations(range(len(classes)), number))
        best = min(cost(pairs) for pairs in every)
        assert cost(zip(rows.tolist(), columns.tolist())) == pytest.approx(
            best, rel=1e-5)


def test_nan_does_not_stop_the_matching():
    targets = mask_targets(labels_with([0, 1]), SIZE, num_classes=2)
    logits = torch.randn(3, int(targets.valid.sum()))
    logits[1] = float('nan')
    rows, _ = match_masks(torch.randn(3, 3), logits, targets)
    assert rows.tolist() == [0, 2]


def random_batch(num_layers=2, dtype=torch.double):
    """Predictions of 2 images, 5 queries, 4 classes, and their labels."""
    text = torch.nn.functional.normalize(torch.randn(4, 8, dtype=dtype), dim=1)
    layers = [
        LayerPrediction(
            torch.randn(2, 5, 5, dtype=dtype, requires_grad=True),
            torch.randn(2, 5, 5, dtype=dtype, requires_grad=True),
            torch.randn(2, 5, *SIZE, dtype=dtype, requires_grad=True))
        for _ in range(num_layers)
    ]
    embeddings = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    labels = torch.stack([labels_with([0, 2, 3]), labels_with([1])])
    return layers, embeddings, text, labels


def naive_class_loss(logits, wanted):
    """Weighted mean of the cross entropy, "no object" weighing 0.1."""
    total = weights = 0.
    for image, classes in zip(logits.tolist(), wanted):
        for scores, k in zip(image, classes):
            weight = 0.1 if k == 4 else 1.
            log_sum = math.log(sum(math.exp(s) for s in scores))
            total += weight * (log_sum - scores[k])
            weights += weight
    return total / weights


def test_all_losses_against_plain_python():
    layers, embeddings, text, labels = random_batch()
    losses = EBSegLoss()(layers, embeddings, text, labels)
    assert sorted(losses) == sorted([
        *(f'{prefix}loss_{name}' for prefix in ('d0.', '')
          for name in ('cls', 'cls_attention', 'mask', 'dice')), 'loss_ssc'
    ])
    targets = [mask_targets(x, SIZE, 4) for x in labels]
    for prefix, (logits, attention, masks) in zip(('d0.', ''), layers):
        bce = dice = 0.
        wanted, pairs = [[4] * 5, [4] * 5], []
        for n, t in enumerate(targets):
            found = match_masks(logits[n], masks[n][:, t.valid], t)
            pairs.append(found)
            for q, g in zip(*(x.tolist() for x in found)):
                wanted[n][q] = t.classes[g].item()
                bce += naive_bce(masks[n, q][t.valid], t.masks[g])
                dice += naive_dice(masks[n, q][t.valid], t.masks[g])
        assert losses[f'{prefix}loss_mask'].item() == pytest.approx(5 * bce /
                                                                    4)
        assert losses[f'{prefix}loss_dice'].item() == pytest.approx(5 * dice /
                                                                    4)
        assert losses[f'{prefix}loss_cls'].item() == pytest.approx(
            1.5 * naive_class_loss(logits, wanted))
        # With the matches of embedding A.
        assert losses[f'{prefix}loss_cls_attention'].item() == pytest.approx(
            1.5 * naive_class_loss(attention, wanted))
    # Of the last layer.
    ssc = 0.
    for n, (rows, columns) in enumerate(pairs):
        total = 0.
        for i, a in zip(rows.tolist(), columns.tolist()):
            for j, b in zip(rows.tolist(), columns.tolist()):
                own = (embeddings[n, i] * embeddings[n, j]).sum().item()
                ta, tb = (text[targets[n].classes[x]] for x in (a, b))
                total += (own - (ta * tb).sum().item())**2
        ssc += total / len(rows)**2
    assert losses['loss_ssc'].item() == pytest.approx(10 * ssc / 2)


def test_ignored_pixels_have_no_say():
    layers, embeddings, text, labels = random_batch(1)
    before = EBSegLoss()(layers, embeddings, text, labels)
    masks = layers[0].masks.detach().clone()
    masks[(labels == 255)[:, None].expand_as(masks)] = 50.
    other = [layers[0]._replace(masks=masks)]
    after = EBSegLoss()(other, embeddings, text, labels)
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_order_of_queries_does_not_matter():
    layers, embeddings, text, labels = random_batch(2)
    order = torch.randperm(5)
    before = EBSegLoss()(layers, embeddings, text, labels)
    layers = [LayerPrediction(*(x[:, order] for x in p)) for p in layers]
    after = EBSegLoss()(layers, embeddings[:, order], text, labels)
    for name in before:
        torch.testing.assert_close(after[name], before[name])


@each_case('ignored', [(0, ), (0, 1)])
def test_images_without_any_mask(ignored):
    layers, embeddings, text, labels = random_batch(2)
    for n in ignored:
        labels[n] = 255
    losses = EBSegLoss()(layers, embeddings, text, labels)
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    leaves = [embeddings, *(x for p in layers for x in p)]
    # Each has a gradient, as distributed training asks for.
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    zero = [n for n, v in losses.items() if v == 0]
    if len(ignored) == 2:
        assert sorted(zero) == sorted([
            'd0.loss_mask', 'd0.loss_dice', 'loss_mask', 'loss_dice',
            'loss_ssc'
        ])
    else:
        assert not zero and not embeddings.grad[0].any()


def test_structure_loss_has_the_right_gradient():
    lists = [
        torch.randn(g, 6, dtype=torch.double, requires_grad=True)
        for g in (3, 1, 0)
    ]
    texts = [torch.randn(g, 6, dtype=torch.double) for g in (3, 1, 0)]
    assert torch.autograd.gradcheck(
        lambda *own: mask_structure_loss(own, texts), lists)
    # Embeddings that are as the text cost nothing.
    units = [torch.nn.functional.normalize(t, dim=1) for t in texts]
    assert mask_structure_loss(units, texts) == pytest.approx(0, abs=1e-20)
    # The diagonal draws the length to 1: (4 - 1)² for one mask in 3 images.
    assert mask_structure_loss(
        [units[0][:0], 2 * units[1], units[2]],
        [texts[0][:0], texts[1], texts[2]]).item() == pytest.approx(9 / 3)
