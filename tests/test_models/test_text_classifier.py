# Copyright (c) mmseg_textkd contributors. All rights reserved.
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from tiny import CONTROL

from mmseg_textkd.models import LogitScale, PixelProjection, TextClassifier
from mmseg_textkd.text import TextEmbeddings

BN = dict(type='BN')


def build(norm='bn', text=CONTROL, **kwargs):
    """A classifier with nothing left at its neutral start value."""
    module = TextClassifier(7, 5, text, norm, **kwargs)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    for _ in range(3):  # moves the running statistics of the batch norm
        module(torch.randn(2, 7, 6, 5) * 2 + 1)
    return module


def reference(module, feat):
    """The definition."""
    conv, bn = module.projection.conv, module.projection.bn
    pixels = F.conv2d(feat, conv.weight, conv.bias)
    if module.projection.norm == 'bn':
        pixels = F.batch_norm(
            pixels,
            bn.running_mean,
            bn.running_var,
            bn.weight,
            bn.bias,
            eps=bn.eps)
    if module.projection.norm == 'l2':
        pixels = pixels / pixels.norm(dim=1, keepdim=True)
    rows = F.normalize(module.text().double(), dim=1)
    weight = module.scale.log_scale.exp() * rows[..., None, None]
    return F.conv2d(pixels, weight, module.logit_bias)


@each_case('norm', ['bn', 'l2', 'none'])
@each_case('affine', [True, False])
@each_case('bias', [True, False])
def test_forward_matches_the_definition_and_folds(norm, affine, bias):
    norm_cfg = dict(BN, affine=affine)
    module = build(norm, bias=bias, norm_cfg=norm_cfg).eval()
    feat = torch.randn(2, 7, 16, 16).double() * 3
    with torch.no_grad():
        single = module(feat.float()).double()
        module.double()
        expected, found = reference(module, feat), module(feat)
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-5)
    if norm == 'l2':
        return
    conv = module.as_conv()
    assert isinstance(conv, torch.nn.Conv2d)
    assert conv.weight.shape == (5, 7, 1, 1) and conv.bias.shape == (5, )
    assert (conv(feat) - found).abs().max() < 1e-12 * found.abs().max()
    got = module.float().as_conv()(feat.float())
    assert (got - single).abs().max() < 1e-5 * single.abs().max()
    assert torch.equal(got.argmax(1), single.argmax(1))


def test_batch_norm_without_a_projection():
    """Then the classifier is W norm(f) + b, and folds as that."""
    text = dict(type='LearnedEmbeddings', dim=7)
    module = TextClassifier(7, 5, text, project=False).eval()
    assert not module.projection.conv.weight.requires_grad
    bn = module.projection.bn
    for value in (bn.running_mean, bn.running_var, bn.weight, bn.bias,
                  module.text.vectors, module.logit_bias):
        value.data.uniform_(.5, 2)
    feat = torch.randn(2, 7, 3, 4) * 3
    normed = F.batch_norm(feat, bn.running_mean, bn.running_var, bn.weight,
                          bn.bias)
    rows = F.normalize(module.text.vectors, dim=1)
    expected = F.conv2d(normed, rows[..., None, None], module.logit_bias)
    torch.testing.assert_close(module(feat), expected)
    torch.testing.assert_close(module.as_conv()(feat), expected)
    with pytest.raises(ValueError, match='width of the features, 8, but'):
        TextClassifier(8, 5, text, project=False)


@each_case('options, error, match', [
    (dict(), RuntimeError, 'evaluation mode'),
    (dict(norm='l2'), ValueError, "norm='l2'.*train with norm='bn'"),
    (dict(norm_cfg=dict(BN, track_running_stats=False)), ValueError,
     'leave `track_running_stats` out'),
    (dict(norm_cfg=dict(type='GN', num_groups=2)), ValueError, 'BN or SyncBN'),
    (dict(norm='layer'), ValueError, "one of.*'bn'"),
    (dict(text=dict(type='FCNHead', in_channels=4, channels=4)), TypeError,
     'text provider'),
])
def test_what_does_not_fold_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        build(**options).train(not options).as_conv()


def test_amp_keeps_similarities_in_float32():
    module = build().eval()
    feat = torch.randn(1, 7, 8, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = module(feat)
        embeddings = module.projection(feat)
    assert embeddings.dtype == torch.bfloat16 and logits.dtype == torch.float32
    # The only loss of precision is that of the projection.
    rows = module.scale() * module.text()
    expected = F.conv2d(embeddings.float(), rows[..., None, None],
                        module.logit_bias)
    torch.testing.assert_close(logits, expected)


def test_l2_norm_of_half_precision_is_float32():
    """Where the squares overflow and a half has three digits."""
    projection = PixelProjection(7, 16, 'l2').half()
    feat = 300 * torch.randn(2, 7, 4, 5).half()
    with torch.no_grad():
        found, embeddings = projection(feat), projection.conv(feat)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.normalize(embeddings.float(), dim=1))


def test_scale_is_clamped_and_can_come_back():
    scale = LogitScale(init=99., max_scale=100.)
    with torch.no_grad():
        scale.log_scale.add_(3.)
    value = scale()
    assert value.item() == pytest.approx(100., rel=1e-5)
    value.backward()
    assert scale.log_scale.grad.item() == pytest.approx(100., rel=1e-5)
    fixed = LogitScale(init=2., learnable=False)
    assert not list(fixed.parameters()) and fixed().item() == pytest.approx(2.)
    assert 'log_scale' in fixed.state_dict()
    for init in (0., -1., 101.):
        with pytest.raises(ValueError, match='must start in'):
            LogitScale(init=init)


def test_text_of_each_image_and_several_phrases():
    """Of several phrases the best one counts, in training."""
    module = build(scale=dict(init=3.)).double()
    embeddings = torch.randn(3, 16, 2, 4).double()
    text = F.normalize(torch.randn(3, 5, 16).double(), dim=-1)
    # Logits of each image with each text.
    alone = torch.stack([module.classify(embeddings, rows) for rows in text])
    own = torch.stack([alone[n, n] for n in range(3)])
    torch.testing.assert_close(module.classify(embeddings, text), own)
    # The bias is that of the class, so the maximum may be taken after it.
    best = module.classify(embeddings, text[None])
    torch.testing.assert_close(best, alone.amax(0))
    assert all((one < best - 1e-3).any() for one in alone)


@each_case('mode', ['uniform', 'max'])
def test_fold_of_text_that_varies_in_training(make_embeddings, mode):
    """What is folded knows the plain names alone."""
    file = make_embeddings(5, 16, names=list('abcde'), bank=1)
    bank = F.normalize(torch.randn(5, 3, 16), dim=2)
    dataclasses.replace(
        TextEmbeddings.load(file),
        phrases=tuple((n, n * 2, n * 3) for n in 'abcde'),
        bank=bank,
        bank_mask=torch.ones(5, 3).bool()).save(file)
    text = dict(type='SynonymSampler', file=file, mode=mode, threshold=0.)
    module = TextClassifier(7, 5, text).double()
    feat = torch.randn(4, 7, 8, 8).double()
    module(feat).sum().backward()
    assert module.projection.conv.weight.grad.abs().max() > 0
    draws = [module(feat) for _ in range(2)]
    assert torch.equal(*draws) == (mode == 'max')
    module.eval()
    rows = module.text.class_embeddings.float()
    torch.testing.assert_close(rows, bank[:, 0])
    torch.testing.assert_close(module.as_conv()(feat), module(feat))
