# Copyright (c) mmseg_textkd contributors. All rights reserved.
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


@each_case('weight', [None, [1., 2., .5, 3.]])
@each_case('upsample', [False, True])
def test_it_is_the_cross_entropy_of_the_cosines(weight, upsample):
    embeddings, text, labels = data()
    cosines = F.cosine_similarity(
        embeddings[:, None], text[..., None, None], dim=2)
    if upsample:
        labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
        cosines = F.interpolate(cosines, scale_factor=4, mode='bilinear')
    scale = dict(scale=dict(init=7.)) if weight else {}
    loss = TextAlignmentLoss(
        **scale, class_weight=weight, upsample=upsample, loss_weight=.4)
    assert loss.full_resolution == upsample
    weight = weight and torch.tensor(weight).double()
    logits = cosines * (7. if scale else 1 / .07)
    expected = .4 * F.cross_entropy(logits, labels, weight, ignore_index=255)
    assert loss(embeddings, text, labels).item() == pytest.approx(
        expected.item(), rel=1e-5)


def test_all_ignored_is_zero_with_a_graph():
    embeddings, text, labels = data()
    loss = TextAlignmentLoss(class_weight=[1.] * K)
    value = loss(embeddings, text, torch.full_like(labels, 255))
    assert value.item() == 0
    value.backward()
    assert embeddings.grad.abs().max() == 0
    assert loss.scale.log_scale.grad.item() == 0


def test_bfloat16_is_computed_in_float32():
    embeddings, text, labels = data(torch.float32)
    low, loss = embeddings.detach().bfloat16(), TextAlignmentLoss()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = loss(low, text, labels)
    torch.testing.assert_close(value, loss(low.float(), text, labels))
