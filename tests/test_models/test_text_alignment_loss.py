# Copyright (c) mmseg_textkd contributors. All rights reserved.
import math

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case

from mmseg_textkd.models import TextAlignmentLoss

N, D, K, H, W = 2, 6, 4, 5, 3


def data(dtype=torch.float64):
    embeddings = torch.randn(N, D, H, W, dtype=dtype, requires_grad=True)
    text = torch.randn(K, D, dtype=dtype)
    labels = torch.randint(0, K, (N, H, W))
    labels[0, 0] = 255
    return embeddings, text, labels


def naive(embeddings, text, labels, scale, class_weight=None):
    total = norm = 0.
    for n in range(N):
        for y in range(H):
            for x in range(W):
                label = labels[n, y, x].item()
                if label == 255:
                    continue
                e = embeddings[n, :, y, x]
                cosines = [(e @ t / e.norm() / t.norm()).item() for t in text]
                denominator = sum(math.exp(scale * c) for c in cosines)
                weight = 1. if class_weight is None else class_weight[label]
                total -= weight * math.log(
                    math.exp(scale * cosines[label]) / denominator)
                norm += weight
    return total / norm


@each_case('class_weight', [None, [1., 2., .5, 3.]])
def test_against_a_naive_loop(class_weight):
    embeddings, text, labels = data()
    loss = TextAlignmentLoss(
        scale=dict(init=7.), class_weight=class_weight, loss_weight=0.4)
    value = loss(embeddings, text, labels)
    expected = 0.4 * naive(embeddings, text, labels, 7., class_weight)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_closed_form_of_orthogonal_text():
    """All pixels on their own class: log(1 + (K - 1) exp(-s))."""
    text = torch.eye(K, D)
    labels = torch.randint(0, K, (N, H, W))
    embeddings = text[labels].permute(0, 3, 1, 2) * 5
    loss = TextAlignmentLoss(scale=dict(init=3.))
    expected = math.log(1 + (K - 1) * math.exp(-3.))
    assert loss(embeddings, text, labels).item() == pytest.approx(
        expected, rel=1e-5)
    # Pixels that say nothing: log K.
    even = torch.ones(N, D, H, W)
    assert loss(even, text, labels).item() == pytest.approx(
        math.log(K), rel=1e-5)


def test_gradient_points_to_the_class():
    embeddings, text, labels = data()
    loss = TextAlignmentLoss(scale=dict(init=2., learnable=False)).double()
    assert torch.autograd.gradcheck(lambda e: loss(e, text, labels),
                                    (embeddings, ))
    value = loss(embeddings, text, labels)
    grad, = torch.autograd.grad(value, embeddings)
    assert loss(embeddings - 0.1 * grad, text, labels) < value
    assert grad[0, :, 0].abs().max() == 0  # ignored pixels


def test_all_ignored_is_zero_with_a_graph():
    embeddings, text, labels = data()
    loss = TextAlignmentLoss(class_weight=[1.] * K)
    value = loss(embeddings, text, torch.full_like(labels, 255))
    assert value.item() == 0
    value.backward()
    assert embeddings.grad.abs().max() == 0
    assert loss.scale.log_scale.grad.item() == 0


def test_upsampled_similarities():
    embeddings, text, labels = data()
    big = F.interpolate(
        labels[:, None].double(), scale_factor=4, mode='nearest')[:, 0].long()
    loss = TextAlignmentLoss(upsample=True)
    assert loss.full_resolution and not TextAlignmentLoss().full_resolution
    cosines = F.conv2d(
        F.normalize(embeddings, dim=1),
        F.normalize(text, dim=1)[..., None, None]) / 0.07
    expected = F.cross_entropy(
        F.interpolate(
            cosines, scale_factor=4, mode='bilinear', align_corners=False),
        big,
        ignore_index=255)
    assert loss(embeddings, text, big).item() == pytest.approx(
        expected.item(), rel=1e-5)


def test_bfloat16_is_computed_in_float32():
    embeddings, text, labels = data(torch.float32)
    low = embeddings.detach().bfloat16()
    loss = TextAlignmentLoss()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = loss(low, text, labels)
    torch.testing.assert_close(value, loss(low.float(), text, labels))
