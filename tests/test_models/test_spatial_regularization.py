# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""LSeg's blocks, against their definition pixel by pixel."""
import itertools
import math

import pytest
import torch
from each_case import each_case

from mmseg_textkd.models import SpatialRegularization

pytestmark = pytest.mark.stacks

SCALAR = dict(
    lrelu=lambda v: v if v > 0 else .01 * v,
    relu=lambda v: max(v, 0.),
    tanh=math.tanh)


def build(kind, depth, activation='lrelu'):
    """Blocks with nothing left at its neutral start value, in float64."""
    module = SpatialRegularization(kind, depth, activation).double()
    with torch.no_grad():
        for param in module.parameters():
            param.add_(.5 * torch.randn_like(param))
    return module


def naive(module, logits):
    """The definition in plain Python, value by value."""
    images, labels, height, width = logits.shape
    for d in range(module.depth):
        kernel, bias = module.weight[d].tolist(), module.bias[d].item()
        old, new = logits.tolist(), torch.zeros_like(logits)
        for n, k, y, x in itertools.product(*map(range, logits.shape)):
            value = bias
            for i, j in itertools.product(range(3), repeat=2):
                row, column = y + i - 1, x + j - 1
                if 0 <= row < height and 0 <= column < width:
                    value += kernel[i][j] * old[n][k][row][column]
            if module.kind == 'bottleneck':
                value += max(old[n][j][y][x] for j in range(labels))
            if d < module.depth - 1:
                value = SCALAR[module.activation](value)
            new[n, k, y, x] = value
        logits = new
    return logits


@each_case('kind, activation, depth', [
    ('bottleneck', 'lrelu', 0),
    ('depthwise', 'tanh', 1),
    ('bottleneck', 'lrelu', 2),
    ('bottleneck', 'tanh', 4),
    ('depthwise', 'relu', 4),
])
def test_blocks_match_the_definition(kind, depth, activation):
    module = build(kind, depth, activation)
    logits = torch.randn(2, 3, 4, 5).double()
    with torch.no_grad():
        torch.testing.assert_close(
            module(logits), naive(module, logits), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in module.parameters()) == 10 * depth


@each_case('kind', ['depthwise', 'bottleneck'])
@each_case('labels', [1, 19])
def test_any_number_of_labels_in_any_order(kind, labels):
    module = build(kind, 3)
    logits = torch.randn(2, labels, 3, 3).double()
    order = torch.randperm(labels)
    with torch.no_grad():
        expected = module(logits)[:, order]
        torch.testing.assert_close(module(logits[:, order]), expected)
        # A label more leaves the others alone, unless it is the largest of a
        # bottleneck.
        other = logits.amax(1, True) + 1
        more = module(torch.cat([logits, other], 1))[:, order]
        assert torch.allclose(more, expected) == (kind == 'depthwise')


@each_case('kind, activation', [('depthwise', 'tanh'), ('bottleneck', 'lrelu'),
                                ('bottleneck', 'relu')])
def test_gradient(kind, activation):
    module = build(kind, 2, activation)
    logits = torch.randn(1, 3, 3, 4).double().requires_grad_()
    weight, bias = module.weight, module.bias

    def forward(logits, weight, bias):
        return torch.func.functional_call(module,
                                          dict(weight=weight,
                                               bias=bias), logits)

    assert torch.autograd.gradcheck(forward, (logits, weight, bias))


def test_start_keeps_the_order_of_the_labels():
    logits = torch.randn(1, 6, 5, 7)
    for kind, activation in itertools.product(('depthwise', 'bottleneck'),
                                              ('lrelu', 'tanh')):
        for depth in (1, 2, 3):
            out = SpatialRegularization(kind, depth, activation)(logits)
            assert torch.equal(out.argsort(1), logits.argsort(1))
            if depth == 1:
                shift = logits.amax(1, True) if kind == 'bottleneck' else 0
                assert torch.equal(out, logits + shift)
    assert SpatialRegularization(depth=0)(logits) is logits


@each_case('option, match', [
    (dict(kind='pointwise'), "one of .*'bottleneck'.*'pointwise'"),
    (dict(activation='gelu'), "one of .*'tanh'.*'gelu'"),
    (dict(depth=-1), 'at least 0, but got -1'),
    (dict(depth=1.5), 'an int of at least 0, but got 1.5'),
])
def test_bad_options(option, match):
    with pytest.raises(ValueError, match=match):
        SpatialRegularization(**option)
