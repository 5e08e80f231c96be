# Copyright (c) mmseg_textkd contributors. All rights reserved.
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmseg.registry import MODELS

from mmseg_textkd.models import LogitScale, PixelProjection, TextClassifier
from mmseg_textkd.text import TextEmbeddings

CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)


def build(norm='bn', num_classes=5, in_channels=7, text=None, **kwargs):
    """A classifier with nothing left at its neutral start value."""
    module = TextClassifier(in_channels, num_classes, text or CONTROL, norm,
                            **kwargs)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    module.train()
    for _ in range(3):  # moves the running statistics of the batch norm
        module(torch.randn(2, in_channels, 6, 5) * 2 + 1)
    return module


def reference(module, feat):
    """The definition, pixel by pixel and class by class, in float64."""
    proj, bn = module.projection.conv, module.projection.bn
    text = module.text().double()
    logits = torch.zeros(len(feat), len(text), *feat.shape[2:]).double()
    for n, y, x in torch.cartesian_prod(
            *map(torch.arange, (len(feat), feat.shape[2], feat.shape[3]))):
        e = proj.weight.double().flatten(1) @ feat[n, :, y, x].double()
        if proj.bias is not None:
            e = e + proj.bias.double()
        if module.projection.norm == 'bn':
            e = (e - bn.running_mean.double()
                 ) / torch.sqrt(bn.running_var.double() + bn.eps)
            e = e * bn.weight.double() + bn.bias.double()
        if module.projection.norm == 'l2':
            e = e / e.norm()
        for k, t in enumerate(text):
            logits[n, k, y, x] = math.exp(module.scale.log_scale.item()) * (
                e @ t / t.norm())
            if module.logit_bias is not None:
                logits[n, k, y, x] += module.logit_bias[k].double()
    return logits


@each_case('norm', ['bn', 'l2', 'none'])
@each_case('bias', [True, False])
def test_forward_matches_the_definition(norm, bias):
    module = build(norm, bias=bias).eval()
    feat = torch.randn(2, 7, 3, 4)
    torch.testing.assert_close(
        module(feat).double(), reference(module, feat), rtol=1e-4, atol=1e-5)


@each_case('norm', ['bn', 'none'])
@each_case('affine', [True, False])
@each_case('bias', [True, False])
def test_fold_is_exact(norm, affine, bias):
    module = build(
        norm, bias=bias, norm_cfg=dict(type='BN', affine=affine)).eval()
    feat = torch.randn(2, 7, 16, 16) * 3
    conv = module.as_conv()
    assert isinstance(conv, torch.nn.Conv2d)
    assert conv.weight.shape == (5, 7, 1, 1) and conv.bias.shape == (5, )
    with torch.no_grad():
        expected, got = module(feat), conv(feat)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(got.argmax(1), expected.argmax(1))


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


def test_fold_in_double_is_exact_to_rounding():
    module = build().eval().double()
    feat = torch.randn(1, 7, 8, 8).double()
    assert (module.as_conv()(feat) - module(feat)).abs().max() < 1e-12


def test_fold_refuses_training_mode_and_l2():
    with pytest.raises(RuntimeError, match='evaluation mode'):
        build().as_conv()
    with pytest.raises(ValueError, match="norm='l2'.*train with norm='bn'"):
        build('l2').eval().as_conv()
    norm_cfg = dict(type='BN', track_running_stats=False)
    with pytest.raises(ValueError, match='leave `track_running_stats` out'):
        build(norm_cfg=norm_cfg).eval().as_conv()


def test_norms_that_do_not_fold_are_refused():
    with pytest.raises(ValueError, match='BN or SyncBN'):
        build(norm_cfg=dict(type='GN', num_groups=2))
    with pytest.raises(ValueError, match="one of.*'bn'"):
        build('layer')


def test_amp_keeps_similarities_in_float32():
    module = build().eval()
    feat = torch.randn(1, 7, 8, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = module(feat)
        embeddings = module.projection(feat)
    assert embeddings.dtype == torch.bfloat16 and logits.dtype == torch.float32
    # The only loss of precision is that of the projection.
    expected = F.conv2d(embeddings.float(),
                        module.text()[..., None, None] *
                        module.scale()) + module.logit_bias[:, None, None]
    torch.testing.assert_close(logits, expected)


def test_half_precision_of_large_features_stays_finite():
    module = build('l2').half().eval()
    feat = torch.full((1, 7, 2, 2), 300.).half()
    assert module(feat).isfinite().all()


def test_scale_is_clamped_and_can_come_back():
    scale = LogitScale(init=99., max_scale=100.)
    with torch.no_grad():
        scale.log_scale.add_(3.)
    value = scale()
    assert value.item() == pytest.approx(100., rel=1e-5)
    value.backward()
    assert scale.log_scale.grad.item() == pytest.approx(100., rel=1e-5)


@each_case('init', [0., -1., 101.])
def test_bad_scale(init):
    with pytest.raises(ValueError, match='must start in'):
        LogitScale(init=init)


def test_fixed_scale_is_no_parameter():
    scale = LogitScale(init=2., learnable=False)
    assert not list(scale.parameters()) and scale().item() == pytest.approx(2.)
    assert 'log_scale' in scale.state_dict()


def test_text_must_be_a_provider():
    with pytest.raises(TypeError, match='text provider'):
        TextClassifier(7, 5, dict(type='FCNHead', in_channels=4, channels=4))


def test_is_registered():
    module = MODELS.build(
        dict(
            type='TextClassifier',
            in_channels=4,
            num_classes=3,
            text=dict(type='ControlEmbeddings', kind='onehot')))
    assert module.text.dim == 3


@each_case('bias', [True, False])
def test_each_image_may_have_its_own_text(bias):
    module = build(bias=bias).double().eval()
    embeddings = torch.randn(3, module.text.dim, 2, 4).double()
    text = F.normalize(torch.randn(3, 5, module.text.dim).double(), dim=-1)
    together = module.classify(embeddings, text)
    for n in range(3):
        alone = module.classify(embeddings[n:n + 1], text[n])
        torch.testing.assert_close(together[n:n + 1], alone)


def test_of_several_phrases_the_best_one_counts():
    """In training; what is folded knows the plain names alone."""
    module = build(scale=dict(init=3.)).double()
    dim = module.text.dim
    embeddings = torch.randn(2, dim, 2, 4).double()
    phrases = F.normalize(torch.randn(1, 3, 5, dim).double(), dim=-1)
    together = module.classify(embeddings, phrases)
    alone = [module.classify(embeddings, text) for text in phrases[0]]
    # The bias is that of the class, so the maximum may be taken after it.
    torch.testing.assert_close(together, torch.stack(alone).amax(0))
    assert all((one < together - 1e-3).any() for one in alone)


@each_case('mode', ['uniform', 'max'])
def test_fold_of_text_that_varies_in_training(make_embeddings, mode):
    file = make_embeddings(5, 16, names=list('abcde'), bank=1)
    record = TextEmbeddings.load(file)
    bank = F.normalize(torch.randn(5, 3, 16), dim=2)
    dataclasses.replace(
        record,
        phrases=tuple((n, n * 2, n * 3) for n in 'abcde'),
        bank=bank,
        bank_mask=torch.ones(5, 3).bool()).save(file)
    text = dict(type='SynonymSampler', file=file, mode=mode, threshold=0.)
    module = TextClassifier(7, 5, text).double()
    feat = torch.randn(4, 7, 8, 8).double()
    module.train()(feat).sum().backward()
    assert module.projection.conv.weight.grad.abs().max() > 0
    draws = [module(feat) for _ in range(2)]
    assert torch.equal(*draws) == (mode == 'max')
    module.eval()
    torch.testing.assert_close(module.text.class_embeddings.float(), bank[:,
                                                                          0])
    torch.testing.assert_close(module.as_conv()(feat), module(feat))


def test_l2_norm_of_half_precision_is_float32():
    """Where the squares overflow and a half has two or three digits."""
    projection = PixelProjection(7, 16, 'l2').bfloat16()
    feat = torch.randn(2, 7, 4, 5).bfloat16()
    with torch.no_grad():
        found, embeddings = projection(feat), projection.conv(feat)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.normalize(embeddings.float(), dim=1))
    torch.testing.assert_close(
        found.norm(dim=1), torch.ones(2, 4, 5), rtol=0, atol=1e-6)
