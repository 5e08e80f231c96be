# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""LSeg's blocks, against their definition."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case

from mmseg_textkd.models import SpatialRegularization

pytestmark = pytest.mark.stacks

ACTIVATIONS = dict(lrelu=F.leaky_relu, relu=F.relu, tanh=torch.tanh)


def build(kind, depth, activation='lrelu'):
    """Blocks with nothing left at its neutral start value, in float64."""
    module = SpatialRegularization(kind, depth, activation).double()
    with torch.no_grad():
        for param in module.parameters():
            param.add_(.5 * torch.randn_like(param))
    return module


def naive(module, logits):
    """The definition, label by label and tap by tap."""
    for d in range(module.depth):
        padded = F.pad(logits, (1, 1, 1, 1))
        new = module.bias[d].expand_as(logits).clone()
        for i, j in itertools.product(range(3), repeat=2):
            rows = padded[:, :, i:i + logits.shape[2]]
            new += module.weight[d, i, j] * rows[..., j:j + logits.shape[3]]
        if module.kind == 'bottleneck':
            new += logits.amax(1, keepdim=True)
        last = d == module.depth - 1
        logits = new if last else ACTIVATIONS[module.activation](new)
    return logits


@each_case('kind, activation, depth, labels', [
    ('bottleneck', 'lrelu', 0, 3),
    ('depthwise', 'tanh', 1, 1),
    ('bottleneck', 'lrelu', 2, 1),
    ('bottleneck', 'tanh', 4, 19),
    ('depthwise', 'relu', 4, 19),
])
def test_blocks_match_the_definition(kind, activation, depth, labels):
    module = build(kind, depth, activation)
    logits = torch.randn(2, labels, 4, 5).double()
    torch.testing.assert_close(
        module(logits), naive(module, logits), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in module.parameters()) == 10 * depth


def test_start_keeps_the_order_of_the_labels():
    logits = torch.randn(1, 6, 5, 7)
    options = ('depthwise', 'bottleneck'), ('lrelu', 'tanh'), (1, 3)
    for kind, activation, depth in itertools.product(*options):
        out = SpatialRegularization(kind, depth, activation)(logits)
        assert torch.equal(out.argsort(1), logits.argsort(1))
        if depth == 1:
            shift = logits.amax(1, True) if kind == 'bottleneck' else 0
            assert torch.equal(out, logits + shift)


@each_case('option, match', [
    (dict(kind='pointwise'), "one of .*'bottleneck'.*'pointwise'"),
    (dict(activation='gelu'), "one of .*'tanh'.*'gelu'"),
    (dict(depth=-1), 'at least 0, but got -1'),
    (dict(depth=1.5), 'an int of at least 0, but got 1.5'),
])
def test_bad_options(option, match):
    with pytest.raises(ValueError, match=match):
        SpatialRegularization(**option)
