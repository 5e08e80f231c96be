# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Targets, matching and losses against naive computations."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
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
    """Mean binary cross entropy of one mask."""
    p = logits.sigmoid()
    return -torch.where(mask > 0, p, 1 - p).log().mean().item()


def naive_dice(logits, mask):
    """Dice loss of one mask."""
    p = logits.sigmoid()
    shares = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    return 1 - shares.item()


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
    # An image without labels has no masks.
    targets = mask_targets(torch.full(SIZE, 255), SIZE, num_classes=8)
    assert len(targets.classes) == 0 and targets.masks.shape == (0, 0)
    rows, columns = match_masks(torch.randn(3, 9), torch.zeros(3, 0), targets)
    assert len(rows) == len(columns) == 0


def test_costs_of_all_pairs():
    logits = torch.randn(5, 12, dtype=torch.double) * 3
    masks = (torch.rand(3, 12) > .5).double()
    bce, dice = pairwise_mask_costs(logits, masks)
    for q, g in itertools.product(range(5), range(3)):
        pair = logits[q], masks[g]
        assert bce[q, g].item() == pytest.approx(naive_bce(*pair))
        assert dice[q, g].item() == pytest.approx(naive_dice(*pair))


@each_case('queries,classes', [(4, [0, 3]), (3, [1, 2, 4]), (2, [0, 1, 2])])
def test_the_matching_is_the_best_of_all(queries, classes):
    number = min(queries, len(classes))
    for _ in range(5):
        targets = mask_targets(labels_with(classes), SIZE, num_classes=5)
        scores = torch.randn(queries, 6)
        logits = torch.randn(queries, int(targets.valid.sum()))
        rows, columns = match_masks(scores, logits, targets)
        cost = -2 * scores.softmax(1)[:, classes]
        for q, g in itertools.product(range(queries), range(len(classes))):
            pair = logits[q], targets.masks[g]
            cost[q, g] += 5 * naive_bce(*pair) + 5 * naive_dice(*pair)
        every = itertools.product(
            itertools.permutations(range(queries), number),
            itertools.combinations(range(len(classes)), number))
        best = min(cost[list(qs), list(gs)].sum().item() for qs, gs in every)
        assert cost[rows, columns].sum().item() == pytest.approx(
            best, rel=1e-5)


def test_nan_does_not_stop_the_matching():
    targets = mask_targets(labels_with([0, 1]), SIZE, num_classes=2)
    logits = torch.randn(3, int(targets.valid.sum()))
    logits[1] = float('nan')
    rows, _ = match_masks(torch.randn(3, 3), logits, targets)
    assert rows.tolist() == [0, 2]


def random_batch(num_layers=2):
    """Predictions of 2 images, 5 queries, 4 classes, and their labels."""

    def leaf(*shape):
        return torch.randn(2, 5, *shape, dtype=torch.double).requires_grad_()

    text = F.normalize(torch.randn(4, 8, dtype=torch.double), dim=1)
    layers = [
        LayerPrediction(leaf(5), leaf(5), leaf(*SIZE))
        for _ in range(num_layers)
    ]
    labels = torch.stack([labels_with([0, 2, 3]), labels_with([1])])
    return layers, leaf(8), text, labels


def losses_of(*batch):
    return {name: v.item() for name, v in EBSegLoss()(*batch).items()}


def naive_class_loss(logits, wanted):
    """Weighted mean of the cross entropy, "no object" weighing 0.1."""
    weight = torch.tensor([1., 1., 1., 1., .1]).double()
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(),
                           weight).item()


def test_all_losses_one_by_one():
    layers, embeddings, text, labels = random_batch()
    targets = [mask_targets(x, SIZE, 4) for x in labels]
    expected = {}
    for prefix, (logits, attention, masks) in zip(('d0.', ''), layers):
        bce, dice, ssc, wanted = 0., 0., 0., torch.full((2, 5), 4)
        for n, t in enumerate(targets):
            rows, columns = match_masks(logits[n], masks[n][:, t.valid], t)
            classes = t.classes[columns]
            wanted[n, rows] = classes
            for q, g in zip(rows, columns):
                pair = masks[n, q][t.valid], t.masks[g]
                bce, dice = bce + naive_bce(*pair), dice + naive_dice(*pair)
            own = embeddings[n, rows] @ embeddings[n, rows].T
            ssc += F.mse_loss(own, text[classes] @ text[classes].T).item()
        # By the matches of embedding A, for both classifiers.
        values = dict(loss_mask=5 * bce / 4, loss_dice=5 * dice / 4)
        for name, scores in (('cls', logits), ('cls_attention', attention)):
            values[f'loss_{name}'] = 1.5 * naive_class_loss(scores, wanted)
        expected.update({prefix + key: v for key, v in values.items()})
    expected['loss_ssc'] = 10 * ssc / 2  # of the last layer
    found = losses_of(layers, embeddings, text, labels)
    assert found == pytest.approx(expected)


def test_ignored_pixels_and_the_order_of_queries_do_not_matter():
    layers, embeddings, text, labels = random_batch()
    before = losses_of(layers, embeddings, text, labels)
    masks = [layer.masks.detach().clone() for layer in layers]
    for own in masks:
        own[(labels == 255)[:, None].expand_as(own)] = 50.
    other = [p._replace(masks=own) for p, own in zip(layers, masks)]
    assert losses_of(other, embeddings, text, labels) == pytest.approx(before)
    order = torch.randperm(5)
    other = [LayerPrediction(*(x[:, order] for x in p)) for p in layers]
    after = losses_of(other, embeddings[:, order], text, labels)
    assert after == pytest.approx(before)


@each_case('ignored', [(0, ), (0, 1)])
def test_images_without_any_mask(ignored):
    layers, embeddings, text, labels = random_batch()
    labels[list(ignored)] = 255
    losses = EBSegLoss()(layers, embeddings, text, labels)
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    leaves = [embeddings, *(x for p in layers for x in p)]
    # Each has a gradient, as distributed training asks for.
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    zero = {n for n, v in losses.items() if v == 0}
    if len(ignored) == 2:
        names = ('d0.loss_dice', 'd0.loss_mask', 'loss_dice', 'loss_mask')
        assert sorted(zero) == [*names, 'loss_ssc']
    else:
        assert not zero and not embeddings.grad[0].any()


def test_structure_loss_has_the_right_gradient():
    own, texts = ([torch.randn(g, 6, dtype=torch.double) for g in (3, 1, 0)]
                  for _ in range(2))
    own = [x.requires_grad_() for x in own]
    assert torch.autograd.gradcheck(
        lambda *own: mask_structure_loss(own, texts), own)
    # Embeddings that are as the text cost nothing.
    units = [F.normalize(t, dim=1) for t in texts]
    assert mask_structure_loss(units, texts) == pytest.approx(0, abs=1e-20)
    # The diagonal draws the length to 1: (4 - 1)² for one mask in 3 images.
    longer = [units[0][:0], 2 * units[1], units[2]]
    loss = mask_structure_loss(longer, [texts[0][:0], *texts[1:]])
    assert loss.item() == pytest.approx(9 / 3)
