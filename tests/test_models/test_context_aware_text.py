# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""DenseCLIP's context-aware text, and its published pitfalls."""
import math

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from network_tester import samples
from tiny import PROMPTS, stir
from torch import nn

from mmseg_textkd.models import (ContextAwareText, TextClassifier, TextFCNHead,
                                 TextPIDHead)
from mmseg_textkd.models.text_parameters import (prompt_parameters,
                                                 text_providers)

CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)
CONTEXT = dict(type='ContextAwareText', width=8, num_heads=2)
ARGS = dict(
    in_channels=8, channels=8, num_classes=4, num_convs=1, dropout_ratio=0.)


def head(text=CONTROL, **kwargs):
    torch.manual_seed(7)
    return TextFCNHead(text=text, **{**ARGS, **kwargs})


def data():
    torch.manual_seed(3)
    return [torch.randn(2, 8, 6, 9)], samples((48, 72), 4)


def norm(module, x):
    deviation = x - x.mean()
    x = deviation / (deviation.pow(2).mean() + module.eps).sqrt()
    return x * module.weight + module.bias


def attention(module, queries, memory):
    """Multi-head attention by hand, one query at a time."""
    weights = module.in_proj_weight.chunk(3)
    biases = module.in_proj_bias.chunk(3)
    keys, values = (
        torch.stack([weights[i] @ m + biases[i] for m in memory])
        for i in (1, 2))
    step = module.head_dim
    rows = []
    for query in queries:
        query, parts = weights[0] @ query + biases[0], []
        for h in range(module.num_heads):
            part = slice(h * step, (h + 1) * step)
            share = [
                math.exp((query[part] @ k[part]).item() / math.sqrt(step))
                for k in keys
            ]
            parts.append(
                sum(s / sum(share) * v[part] for s, v in zip(share, values)))
        rows.append(module.out_proj.weight @ torch.cat(parts) +
                    module.out_proj.bias)
    return rows


def naive_text(module, feat, text):
    """Context-aware text of one image, in loops."""
    squares = [
        feat[:, y:y + module.stride, x:x + module.stride].mean(dim=(1, 2))
        for y in range(0, feat.shape[1], module.stride)
        for x in range(0, feat.shape[2], module.stride)
    ]
    first, linear, last = module.memory_in
    memory = [
        norm(last, linear.weight @ norm(first, m) + linear.bias)
        for m in [feat.mean(dim=(1, 2)), *squares]
    ]
    first, linear = module.text_in
    tokens = [linear.weight @ norm(first, t) + linear.bias for t in text]
    for layer in module.layers:
        inside = [norm(layer.norm1, t) for t in tokens]
        found = attention(layer.self_attn, inside, inside)
        tokens = [t + f for t, f in zip(tokens, found)]
        inside = [norm(layer.norm2, t) for t in tokens]
        found = attention(layer.multihead_attn, inside, memory)
        tokens = [t + f for t, f in zip(tokens, found)]
        tokens = [
            t + layer.linear2.weight
            @ F.gelu(layer.linear1.weight @ norm(layer.norm3, t) +
                     layer.linear1.bias) + layer.linear2.bias for t in tokens
        ]
    last, linear = module.text_out
    return torch.stack([
        t + module.gamma * (linear.weight @ norm(last, token) + linear.bias)
        for t, token in zip(text, tokens)
    ])


@pytest.mark.stacks
@each_case('size', [(8, 8), (5, 6), (2, 3)])
def test_text_is_that_of_the_definition(size):
    torch.manual_seed(0)
    module = ContextAwareText(5, 16, 3, width=8, num_heads=2)
    module = stir(module).double().eval()
    feat = torch.randn(2, 5, *size, dtype=torch.float64)
    text = torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        got = module(feat, text)
        expected = torch.stack([naive_text(module, f, text) for f in feat])
        again = module(feat, text.expand(2, -1, -1))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, got)
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_defaults_are_those_of_the_source():
    module = ContextAwareText(8, 16, 4)
    assert len(module.layers) == 3
    for layer in module.layers:
        assert layer.self_attn.embed_dim == 256
        assert layer.multihead_attn.num_heads == 4
        assert layer.dropout.p == .1
    assert torch.equal(module.gamma, torch.full((16, ), 1e-4))
    assert (module.temperature, module.loss_weight) == (.07, .4)
    # Layers that start alike would learn alike.
    first, second = (m.linear1.weight for m in module.layers[:2])
    assert not torch.equal(first, second)


@each_case('num_classes', [1, 7, 150])
def test_classes_can_come_in_any_order_and_number(num_classes):
    torch.manual_seed(0)
    module = stir(ContextAwareText(5, 16, 4, width=8)).eval()
    feat, text = torch.randn(2, 5, 6, 8), torch.randn(num_classes, 16)
    order = torch.randperm(num_classes)
    with torch.no_grad():
        got, permuted = module(feat, text), module(feat, text[order])
    assert got.shape == (2, num_classes, 16)
    torch.testing.assert_close(permuted, got[:, order])


@each_case('role', ['classifier', 'auxiliary'])
def test_loss_is_the_cross_entropy_of_the_score_map(role):
    """Cosines, and a temperature in the loss only."""
    fusion = dict(CONTEXT, dropout=0., loss_weight=.7)
    module = stir(head(role=role, fusion=fusion))
    inputs, labels = data()
    got = module.loss(inputs, labels, {})['loss_context_ce']
    feat = module._forward_feature(inputs)
    with torch.no_grad():
        embeddings = module.text_branch.projection(feat)
        text = module.text_branch.fusion(feat, module.text_branch.text())
        score = F.cosine_similarity(
            embeddings[:, None], text[..., None, None], dim=2)
    found = module.text_branch.fusion.score(embeddings, feat,
                                            module.text_branch.text())
    torch.testing.assert_close(found, score)
    assert found.abs().max() <= 1 + 1e-6
    small = torch.cat([s.gt_sem_seg.data[:, ::8, ::8] for s in labels])
    expected = .7 * F.cross_entropy(score / .07, small, ignore_index=255)
    torch.testing.assert_close(got, expected)
    got.backward()
    for part in (module.text_branch.fusion.layers[0],
                 module.text_branch.projection.conv, module.convs[0].conv):
        assert all(p.grad.any() for p in part.parameters())
    assert module.text_branch.fusion.gamma.grad.any()


@each_case('role', ['classifier', 'auxiliary'])
def test_training_only_leaves_the_plain_part_alone(role):
    plain, taught = head(role=role), head(role=role, fusion=CONTEXT)
    taught.load_state_dict(plain.state_dict(), strict=False)
    inputs, labels = data()
    expected, got = (m.loss(inputs, labels, {}) for m in (plain, taught))
    assert got.pop('loss_context_ce') > 0
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in got)
    plain.eval(), taught.eval()
    assert torch.equal(plain(inputs), taught(inputs))
    losses = taught.train().loss(inputs, labels, {})
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    without = [n for n, p in taught.named_parameters() if p.grad is None]
    assert without == []


def test_a_concatenated_score_map_is_an_added_one():
    """One linear classifier of [features, map], written out."""
    fusion = dict(CONTEXT, use='inference', num_classes=3)
    module = TextClassifier(5, 3, dict(CONTROL, num_classes=3), fusion=fusion)
    module = stir(module).eval()
    feat = torch.randn(2, 5, 4, 6)
    with torch.no_grad():
        plain = module.classify(module.projection(feat), module.text())
        score = module.fusion.score(
            module.projection(feat), feat, module.text())
        # The plain part as a convolution, K more columns beside it.
        weight, shift = module.projection.affine(torch.float32)
        scaled = module.scale() * module.text()
        joint = torch.cat(
            [scaled @ weight,
             module.scale() * module.fusion.score_weight],
            dim=1)
        bias = scaled @ shift + module.logit_bias
        expected = F.conv2d(
            torch.cat([feat, score], dim=1), joint[..., None, None], bias)
        got = module(feat)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > .1


@each_case('kind', [TextFCNHead, TextPIDHead])
def test_it_starts_as_the_network_without_it(kind):
    """Also where the stock head initializes all that it has."""
    args = dict(text=CONTROL, in_channels=8, channels=8, num_classes=4)
    if kind is TextPIDHead:
        args['loss_decode'] = [dict(type='CrossEntropyLoss')] * 4
    plain = kind(**args)
    kept = kind(**args, fusion=dict(CONTEXT, use='inference'))
    for module in (plain, kept):
        module.init_weights()
        module.eval()
    kept.load_state_dict(plain.state_dict(), strict=False)
    feat = torch.randn(2, 8, 6, 9)
    feat = feat if kind is TextPIDHead else [feat]
    torch.testing.assert_close(kept(feat), plain(feat), rtol=1e-5, atol=1e-5)
    assert torch.equal(kept.text_branch.fusion.gamma, torch.full((16, ), 1e-4))


def test_a_kept_one_learns_by_both_losses():
    module = head(fusion=dict(CONTEXT, use='inference', dropout=0.))
    losses = module.loss(*data(), {})
    assert losses['loss_context_ce'] > 0
    losses['loss_ce'].backward()
    assert module.text_branch.fusion.score_weight.grad.any()


def test_prompts_learn_through_the_decoder_and_the_tower_does_not():
    """DenseCLIP's issues: no `no_grad` around prompts, no learning tower."""
    text = dict(
        PROMPTS,
        vocabulary=['sky', 'road', 'car', 'person'],
        embeddings=dict(type='ControlEmbeddings', kind='random', dim=64))
    module = head(text=text, fusion=CONTEXT)
    provider, = text_providers(module).values()
    provider.start_learning()
    before = provider.tower.checksum()
    module.loss(*data(), {})['loss_context_ce'].backward()
    prompts = prompt_parameters(module)
    assert prompts and all(p.grad.any() for p in prompts.values())
    assert all(not p.requires_grad and p.grad is None
               for p in provider.tower.parameters())
    assert provider.tower.checksum() == before
    known = {id(p) for p in module.parameters()}
    assert not known & {id(p) for p in provider.tower.parameters()}


def test_scores_are_float32_under_amp():
    module = stir(head(fusion=dict(CONTEXT, dropout=0.)))
    inputs, labels = data()
    full = module.loss(inputs, labels, {})['loss_context_ce']
    with torch.autocast('cpu', torch.bfloat16):
        half = module.loss(inputs, labels, {})['loss_context_ce']
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=.1)


def test_dropout_is_for_training_only():
    module = head(fusion=dict(CONTEXT, gamma=1.))
    feat, text = torch.randn(1, 8, 6, 9), module.text_branch.text()
    fusion = module.text_branch.fusion
    assert any(isinstance(m, nn.Dropout) for m in fusion.modules())
    first, second = fusion(feat, text), fusion(feat, text)
    assert not torch.equal(first, second)
    fusion.eval()
    assert torch.equal(fusion(feat, text), fusion(feat, text))


@each_case('kwargs, message', [
    (dict(use='testing'), "use.*must be one of.*'testing'"),
    (dict(num_heads=3), 'num_heads=3'),
    (dict(stride=0), 'stride=0'),
    (dict(num_layers=0), 'num_layers=0'),
    (dict(temperature=0.), 'temperature=0'),
    (dict(loss_weight=0.), 'loss_weight=0'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        head(fusion=dict(CONTEXT, **kwargs))
