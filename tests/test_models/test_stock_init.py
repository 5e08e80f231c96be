# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text classifiers that start from a stock classifier."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.config import Config
from mmseg.registry import MODELS
from tiny import CONTROL

import mmseg_textkd
from mmseg_textkd.models import TextClassifier
from mmseg_textkd.models.stock_init import (compare_with_stock, head_features,
                                            init_from_stock)

CHANNELS = 7
BN = dict(type='BN')


@pytest.fixture
def build(make_embeddings):
    """Get a function that builds a classifier away from its start values."""

    def make(num_classes=5, dim=16, **kwargs):
        file = make_embeddings(num_classes, dim)
        text = dict(type='ClassEmbeddings', file=file)
        module = TextClassifier(CHANNELS, num_classes, text, **kwargs)
        with torch.no_grad():
            for param in module.parameters():
                param.add_(torch.randn_like(param) * 0.3)
        return module

    return make


def stock(num_classes=5):
    return torch.randn(num_classes, CHANNELS, 1, 1), torch.randn(num_classes)


def batches():
    """Of different sizes and levels, so that their order could matter."""
    return [
        torch.randn(n, CHANNELS, 6, 5) * spread + level
        for n, spread, level in ((2, 1, 0), (1, 3, 5), (4, .5, -2))
    ]


@each_case('norm, num_classes, dim', [('bn', 5, 16), ('none', 5, 16),
                                      ('bn', 20, 6)])
@each_case('bias', [True, False])
def test_it_is_the_least_squares_solution(build, norm, num_classes, dim, bias):
    """Which is exact where there are no more classes than dimensions."""
    module = build(num_classes, dim, norm=norm, bias=bias)
    scale, text = module.scale().item(), module.text().clone()
    weight, offset = stock(num_classes)
    residual = init_from_stock(module, weight, offset, batches())
    # Text and scale are what the run has; only the rest gives way.
    assert module.scale().item() == scale
    assert torch.equal(module.text(), text)

    rows = scale * text.double().numpy()
    target = torch.cat([weight.flatten(1), offset[:, None]], 1).double()
    target = target[:, :CHANNELS if bias else None].numpy()
    solution = np.linalg.lstsq(rows, target, rcond=None)[0]
    kernel = module.projection.conv.weight.flatten(1).detach().numpy()
    np.testing.assert_allclose(kernel, solution[:, :CHANNELS], atol=1e-5)
    made = rows @ solution
    left = np.linalg.norm(made - target) / np.linalg.norm(target)
    assert residual == pytest.approx(left, abs=1e-6)
    if num_classes > dim:
        assert residual > .3
    else:
        assert residual < 1e-12
        np.testing.assert_allclose(made, target, rtol=1e-5, atol=1e-5)
    # What it cannot express is missing, and no more.
    made = torch.from_numpy(made).float()
    expected = (made[:, :CHANNELS, None,
                     None], offset if bias else made[:, CHANNELS])
    conv = module.eval().as_conv()
    torch.testing.assert_close((conv.weight, conv.bias),
                               expected,
                               rtol=1e-5,
                               atol=1e-4)
    for feat in (torch.randn(2, CHANNELS, 16, 16) * 3, batches()[1]):
        logits, got = F.conv2d(feat, *expected), module(feat)
        assert (got - logits).abs().max() < 1e-4 * logits.abs().max()
        assert torch.equal(got.argmax(1), logits.argmax(1))


def test_batch_norm_gets_the_statistics_of_all_pixels(build):
    module, features = build(), batches()
    init_from_stock(module, *stock(), iter(features))
    bn = module.projection.bn
    pixels = torch.cat([f.movedim(1, 0).flatten(1) for f in features], 1)
    with torch.no_grad():
        kernel = module.projection.conv.weight.flatten(1).double()
        embeddings = kernel @ pixels.double()
        mean, var = embeddings.mean(1), embeddings.var(1, correction=0)
        expected = mean, var, (var + bn.eps).sqrt(), mean
        found = bn.running_mean, bn.running_var, bn.weight, bn.bias
        torch.testing.assert_close([v.double() for v in found], [*expected],
                                   rtol=1e-4,
                                   atol=1e-5)


def test_equal_rows_share_what_their_classes_had(build):
    """Float32 noise between equal rows is not blown up into a solution."""
    vectors = F.normalize(torch.randn(5, 16), dim=1)
    vectors[3] = vectors[1] + 1e-7 * torch.randn(16)
    module, (weight, offset) = build(), stock()
    module.text.fill(vectors)
    residual = init_from_stock(module, weight, offset, batches())
    conv = module.eval().as_conv()
    mean = (weight[1] + weight[3]) / 2
    for k, expected in ((0, weight[0]), (1, mean), (3, mean)):
        torch.testing.assert_close(
            conv.weight[k], expected, rtol=1e-3, atol=1e-3)
    lost = (weight[1] - weight[3]).norm() / 2**.5 / weight.norm()
    assert residual == pytest.approx(lost.item(), rel=1e-3)
    assert module.projection.conv.weight.abs().max() < 100


def test_a_dead_channel_stays_finite(build):
    """One feature that never varies: nothing to divide by."""
    module, (weight, offset) = build(), stock()
    weight[:, 1:] = 0
    features = [torch.full((2, CHANNELS, 4, 4), 0.5)]
    init_from_stock(module, weight, offset, features)
    near = compare_with_stock(module.train(), weight, offset, features)
    assert near.max_difference < 1e-4
    near = compare_with_stock(module.eval(), weight, offset, batches())
    assert near.max_difference < 1e-3


@each_case('kwargs, change, words', [
    (dict(norm='l2'), {}, "norm='l2'.*role='auxiliary'.*load_from"),
    (dict(norm_cfg=dict(BN, affine=False)), {}, 'cannot be undone'),
    (dict(norm_cfg=dict(BN, track_running_stats=False)), {}, 'be undone'),
    (dict(project=False, dim=CHANNELS), {}, 'project=False'),
    ({}, dict(features=[]), 'there are none'),
    ({}, dict(weight=torch.ones(4, 7, 1, 1)), r'\(4, 7, 1, 1\).*\(5,'),
    ({}, dict(weight=torch.ones(5, 3, 1, 1)), r'\(5, 3, 1, 1\).*\(5, 7,'),
    ({}, dict(bias=torch.ones(4)), r'shape \(4,\)'),
    ({}, dict(bias=torch.full((5, ), torch.nan)), 'NaN'),
    ({}, dict(weight=torch.full((5, 7, 1, 1), torch.inf)), 'infinity'),
    ({}, dict(features=[torch.full((1, 7, 2, 2), torch.nan)]), 'NaN'),
])
def test_what_cannot_be_done_changes_nothing(build, kwargs, change, words):
    module = build(**kwargs)
    before = copy.deepcopy(module.state_dict())
    weight, bias = stock()
    values = dict(weight=weight, bias=bias, features=batches())
    with pytest.raises(ValueError, match=words):
        init_from_stock(module, **{**values, **change})
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_comparison_counts_what_it_should(build):
    module = build(norm='none')
    weight, offset = stock()
    init_from_stock(module, weight, offset)
    with torch.no_grad():
        module.logit_bias[2] += 50  # wins everywhere
    feat = torch.randn(2, CHANNELS, 3, 4)
    logits = F.conv2d(feat, weight, offset)
    near = compare_with_stock(module, weight, offset, [feat[:1], feat[1:]])
    assert near.max_difference == pytest.approx(50, rel=1e-4)
    assert near.mean_difference == pytest.approx(50 / 5, rel=1e-4)
    assert near.max_logit == pytest.approx(logits.abs().max().item())
    assert near.agreement == (logits.argmax(1) == 2).float().mean()
    assert near.pixels == 24
    with pytest.raises(ValueError, match='no images'):
        compare_with_stock(module, weight, offset, [])


NETS = dict(
    TextFCNHead='bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    TextDDRHead=(
        'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py'))


def network(kind, text=True):
    """The text model, or the stock model that it is made of."""
    cfg = Config.fromfile(mmseg_textkd.stock_config(NETS[kind])).model
    cfg.backbone.init_cfg = cfg.pretrained = None
    if text:
        cfg.decode_head.update(type=kind, text=dict(CONTROL, dim=32))
    return MODELS.build(cfg)


@each_case('kind', NETS)
def test_network_predicts_what_the_stock_one_predicts(kind):
    reference, model = network(kind, text=False), network(kind)
    images = torch.randint(0, 256, (3, 2, 3, 64, 128)).byte()
    data = [dict(inputs=list(batch), data_samples=None) for batch in images]
    conv = reference.decode_head.conv_seg
    with torch.no_grad():
        conv.weight.normal_()
        for batch in data:  # moves the statistics of the batch norms
            inputs = reference.data_preprocessor(batch, False)['inputs']
            reference.train()(inputs)
    reference.eval()
    model.load_state_dict(reference.state_dict(), strict=False)
    learner = copy.deepcopy(model).train()
    before = {n: set(vars(m)) for n, m in learner.named_modules()}
    init_from_stock(model.decode_head.conv_seg, conv.weight, conv.bias,
                    head_features(learner, learner.decode_head, data, False))
    assert before == {n: set(vars(m)) for n, m in learner.named_modules()}
    assert not learner.decode_head.conv_seg._forward_pre_hooks
    inputs = reference.data_preprocessor(data[0], False)['inputs']
    with torch.no_grad():
        expected = reference(inputs)
        # The features that the tool measures on.
        features = list(
            head_features(model.eval(), model.decode_head, data, False))
        assert torch.equal(conv(features[0]), expected)
    near = compare_with_stock(model.decode_head.conv_seg, conv.weight,
                              conv.bias, features)
    assert near.max_difference < 1e-4 * near.max_logit
    assert near.agreement > .9999
    assert near.pixels == 3 * 2 * expected[0, 0].numel()
