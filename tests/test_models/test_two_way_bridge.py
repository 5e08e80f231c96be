# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The two-way bridge: its maths, its start, and what it teaches."""
import math
import zlib

import pytest
import tiny
import torch
import torch.nn.functional as F
from each_case import each_case
from network_tester import samples

from mmseg_textkd.models import (TextClassifier, TextDDRHead, TextFCNHead,
                                 TwoWayBridge)
from mmseg_textkd.text.encode_classes import encode_classes

CONTROL = dict(type='ControlEmbeddings', kind='random', dim=16)
BRIDGE = dict(type='TwoWayBridge', width=8, num_heads=2)
ARGS = dict(
    in_channels=8, channels=8, num_classes=4, num_convs=1, dropout_ratio=0.)
SIZE = (32, 64)


def head(fusion=None, text_losses=(), **kwargs):
    """A head whose network has the same weights with a bridge or without."""
    torch.manual_seed(7)
    built = TextFCNHead(
        text=kwargs.pop('text', CONTROL),
        text_losses=list(text_losses),
        fusion=None if fusion is None else dict(BRIDGE, **fusion),
        **ARGS,
        **kwargs)
    for name, param in built.named_parameters():
        if '.fusion.' not in name and 'text_losses' not in name:
            torch.manual_seed(zlib.crc32(name.encode()))
            param.data.normal_(std=.3)
    return built


def stir(module):
    torch.manual_seed(9)
    return tiny.stir(module)


def data(height=4, width=8):
    torch.manual_seed(3)
    feat = torch.randn(2, 8, height, width)
    return [feat], samples((8 * height, 8 * width), 4)


# ------------------------------------------------------------ the maths
def linear(module, x):
    out = module.weight @ x
    return out if module.bias is None else out + module.bias


def layer_norm(module, x):
    deviation = x - x.mean()
    x = deviation / (deviation.pow(2).mean() + module.eps).sqrt()
    return x * module.weight + module.bias


def conv_norm(module, x, act=True):
    """A ConvModule, its batch norm by the definition."""
    conv, norm = module.conv, module.norm
    x = F.conv2d(x[None], conv.weight, conv.bias, conv.stride, conv.padding,
                 conv.dilation, conv.groups)[0]
    x = (x - norm.running_mean[:, None, None]) / (
        norm.running_var + norm.eps).sqrt()[:, None, None]
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return x.clamp(min=0) if act else x


def attention(query, keys, values, heads):
    """One query, head by head and key by key."""
    out, step = torch.zeros_like(query), len(query) // heads
    for h in range(heads):
        part = slice(h * step, (h + 1) * step)
        weights = [
            math.exp((query[part] @ key[part]).item() / math.sqrt(step))
            for key in keys
        ]
        for weight, value in zip(weights, values):
            out[part] += weight / sum(weights) * value[part]
    return out


def naive_block(block, pixels, tokens):
    """What the docstring of the block says, in loops."""
    heads, shape = block.num_heads, pixels.shape[1:]
    flat = list(pixels.flatten(1).T)
    tokens = [
        t + linear(
            block.gathered,
            attention(
                linear(block.query, layer_norm(block.norm_query, t)), flat,
                flat, heads)) for t in tokens
    ]
    triples = [
        linear(block.qkv, layer_norm(block.norm_self, t)).chunk(3)
        for t in tokens
    ]
    keys, values = ([t[i] for t in triples] for i in (1, 2))
    tokens = [
        t + linear(block.mixed, attention(triple[0], keys, values, heads))
        for t, triple in zip(tokens, triples)
    ]
    norm, first, _, second = block.ffn
    tokens = [
        t + linear(second, F.gelu(linear(first, layer_norm(norm, t))))
        for t in tokens
    ]
    depthwise, pointwise = block.conv.conv
    middle = conv_norm(depthwise, pixels)
    pixels = pixels + conv_norm(pointwise, middle, act=False)
    pairs = [
        linear(block.key_value, layer_norm(block.norm_told, t)).chunk(2)
        for t in tokens
    ]
    keys, values = ([p[i] for p in pairs] for i in (0, 1))
    told = [attention(p, keys, values, heads) for p in pixels.flatten(1).T]
    return pixels + torch.stack(told, dim=1).unflatten(1, shape), tokens


def naive_logits(classifier, feat):
    """Logits of one image (K, H, W), with e' of width D made in full."""
    bridge, text = classifier.fusion, classifier.text().double()
    pixels = conv_norm(bridge.pixels_in.pointwise_conv,
                       conv_norm(bridge.pixels_in.depthwise_conv, feat))
    tokens = [linear(bridge.text_in, t) for t in text]
    for block in bridge.blocks:
        pixels, tokens = naive_block(block, pixels, tokens)
    norm, out = bridge.text_out
    text = [
        t + bridge.text_gate * linear(out, layer_norm(norm, token))
        for t, token in zip(text, tokens)
    ]
    gained = torch.einsum('dc,chw->dhw', bridge.pixels_out.weight, pixels)
    gained = F.interpolate(
        gained[None], size=feat.shape[1:], mode='bilinear')[0]
    embeddings = classifier.projection(feat[None])[0]
    embeddings = embeddings + bridge.pixel_gate[:, None, None] * gained
    scale = classifier.scale().double()
    return torch.stack([
        scale * torch.einsum('dhw,d->hw', embeddings, t) + b
        for t, b in zip(text, classifier.logit_bias)
    ])


@pytest.mark.stacks
@each_case('stride, norm', [(1, 'bn'), (2, 'bn'), (2, 'none'), (2, 'l2')])
def test_logits_are_those_of_the_definition(stride, norm):
    text = dict(CONTROL, num_classes=3)
    fusion = dict(BRIDGE, use='inference', stride=stride)
    module = TextClassifier(5, 3, text, norm, fusion=fusion)
    module = stir(module).double().eval()
    feat = torch.randn(2, 5, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        got = module(feat)
        expected = torch.stack([naive_logits(module, f) for f in feat])
        plain = module.classify(module.projection(feat), module.text())
    bound = 1e-5 if norm == 'l2' else 1e-10  # L2 norms are float32
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)
    assert (got - plain).abs().max() > .1
    # The short way of evaluation is that of training, statistics aside.
    for part in module.modules():
        part.training = not isinstance(part, torch.nn.BatchNorm2d)
    torch.testing.assert_close(module(feat), got, rtol=bound, atol=bound)


@each_case('num_classes', [1, 2, 150])
def test_classes_can_come_in_any_order_and_number(num_classes):
    """One bridge for all of them: no weight knows how many there are."""
    torch.manual_seed(0)
    bridge = stir(TwoWayBridge(5, 16, width=8, num_heads=2)).eval()
    feat, text = torch.randn(2, 5, 6, 8), torch.randn(num_classes, 16)
    order = torch.randperm(num_classes)
    with torch.no_grad():
        texts, products = bridge(feat, text)
        texts2, products2 = bridge(feat, text[order])
        # Text of each image's own is text like any other.
        texts3, products3 = bridge(feat, text.expand(2, -1, -1))
    assert texts.shape == (2, num_classes, 16)
    assert products.shape == (2, num_classes, 6, 8)
    torch.testing.assert_close(texts2, texts[:, order])
    torch.testing.assert_close(products2, products[:, order])
    torch.testing.assert_close(texts3, texts)
    torch.testing.assert_close(products3, products)
    # The images do have text of their own.
    assert (texts[0] - texts[1]).abs().max() > 1e-3


# ------------------------------------------------------------- the start
@each_case('norm', ['bn', 'l2'])
def test_it_starts_as_the_network_without_it(norm):
    branch = dict(norm=norm)
    plain = head(text_branch=branch)
    kept = head(dict(use='inference'), text_branch=branch)
    inputs, labels = data()
    text = kept.text_branch.text()
    fused, products = kept.text_branch.fusion(inputs[0], text)
    assert torch.equal(fused, text.expand(2, -1, -1))
    assert not products.any()
    expected = plain.loss(inputs, labels, {})
    got = kept.loss(inputs, labels, {})
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name])
    for module in (plain, kept):
        module.eval()
    torch.testing.assert_close(
        kept(inputs), plain(inputs), rtol=1e-5, atol=1e-5)
    # Nor is it disturbed by the init of a head.
    kept.init_weights()
    assert not kept.text_branch.fusion.pixel_gate.any()
    assert not kept.text_branch.fusion.text_gate.any()


@each_case('role', ['classifier', 'auxiliary'])
def test_training_only_leaves_the_plain_part_alone(role):
    losses = [dict(type='TextAlignmentLoss')]
    plain = head(role=role, text_losses=losses)
    taught = head(dict(), role=role, text_losses=losses)
    inputs, labels = data()
    expected = plain.loss(inputs, labels, {})
    got = taught.loss(inputs, labels, {})
    bridge = {k: got.pop(k) for k in ('loss_bridge_ce', 'loss_bridge_kl')}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in got)
    assert bridge['loss_bridge_ce'] > 0
    if role == 'classifier':
        # Both classify alike still, and there is nothing to teach.
        assert bridge['loss_bridge_kl'].abs() < 1e-6
    else:
        assert bridge['loss_bridge_kl'] > 1e-3
    plain.eval(), taught.eval()
    assert torch.equal(plain(inputs), taught(inputs))
    calls = []
    taught.text.fusion.register_forward_hook(lambda *args: calls.append(1))
    taught(inputs)
    assert not calls


# ----------------------------------------------------------- the learning
@each_case('use', ['training', 'inference'])
def test_gradients_reach_the_gates_and_then_both_branches(use):
    module = head(dict(use=use))
    inputs, labels = data()
    optimizer = torch.optim.SGD(module.parameters(), lr=.1)

    def step():
        optimizer.zero_grad()
        losses = module.loss(inputs, labels, {})
        sum(v for k, v in losses.items() if 'loss' in k).backward()
        optimizer.step()
        grads = {
            n: p.grad
            for n, p in module.text_branch.fusion.named_parameters()
        }
        assert all(g is not None for g in grads.values())
        return {n for n, g in grads.items() if g.any()}

    gates = {'text_gate', 'pixel_gate'}
    assert step() == gates
    reached = step()
    everything = {n for n, _ in module.text_branch.fusion.named_parameters()}
    # A convolution's bias before a norm would have none; there is none.
    assert everything - reached == set()


def test_every_parameter_has_a_gradient_in_either_role():
    for role in ('classifier', 'auxiliary'):
        module = head(dict(), role=role)
        losses = module.loss(*data(), {})
        sum(v for k, v in losses.items() if 'loss' in k).backward()
        without = [n for n, p in module.named_parameters() if p.grad is None]
        assert without == []


def test_it_learns_what_the_classifier_cannot_see():
    """Which class an image has is written in its corner only."""
    torch.manual_seed(0)
    text = dict(CONTROL, num_classes=2)
    module = TextClassifier(
        4, 2, text, fusion=dict(BRIDGE, use='inference', stride=1))
    optimizer = torch.optim.Adam(module.parameters(), lr=.01)
    labels = torch.tensor([0, 1] * 4)
    feat = torch.randn(8, 4, 6, 6)
    feat[:, :, 0, 0] = 3 * labels[:, None] - 1.5
    target = labels[:, None, None].expand(-1, 6, 6)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(feat), target).backward()
        optimizer.step()
    with torch.no_grad():
        fused = module(feat).argmax(1)
        plain = module.classify(module.projection(feat), module.text())
    assert (fused == target).float().mean() > .95
    assert (plain.argmax(1) == target).float().mean() < .9


# ------------------------------------------------------- the distillation
def naive_divergence(teacher, student, valid, temperature):
    total = number = 0
    for n, y, x in valid.nonzero().tolist():
        p = [math.exp(z / temperature) for z in teacher[n, :, y, x].tolist()]
        q = [math.exp(z / temperature) for z in student[n, :, y, x].tolist()]
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q)))
                     for a, b in zip(p, q))
        number += 1
    return temperature**2 * total / number


@each_case('temperature', [1., 3.])
def test_divergence_is_that_of_the_definition(temperature):
    bridge = TwoWayBridge(5, 16, width=8, temperature=temperature)
    teacher, student = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    valid = torch.rand(2, 4, 5) > .4
    got = bridge.divergence(teacher, student, valid)
    expected = naive_divergence(teacher, student, valid, temperature)
    assert got.item() == pytest.approx(expected, rel=1e-10)
    assert got > 0
    assert bridge.divergence(teacher, teacher, valid) == 0
    # A class-independent shift changes no probability.
    shifted = bridge.divergence(teacher + 5, teacher, valid)
    assert shifted.abs() < 1e-12


@each_case('detach', [True, False])
def test_who_learns_by_the_distillation(detach):
    """By default only the plain classifier, which is deployed."""
    module = head(dict(detach_teacher=detach), role='auxiliary')
    stir(module.text_branch)
    loss = module.loss(*data(), {})['loss_bridge_kl']
    assert loss > 0
    loss.backward()
    assert module.conv_seg.weight.grad.any()
    assert module.convs[0].conv.weight.grad.any()
    fused = [p.grad for p in module.text_branch.parameters()]
    assert any(g is not None and g.any() for g in fused) != detach


def test_weights_of_the_losses():
    inputs, labels = data()
    one, two = (
        stir(head(dict(ce_weight=w, kl_weight=w, temperature=2.)))
        for w in (1., .3))
    one, two = (m.loss(inputs, labels, {}) for m in (one, two))
    for name in ('loss_bridge_ce', 'loss_bridge_kl'):
        assert one[name] > 1e-3
        torch.testing.assert_close(two[name], .3 * one[name])
    off = head(dict(kl_weight=0.)).loss(inputs, labels, {})
    assert 'loss_bridge_kl' not in off


def test_ignored_pixels_count_for_nothing():
    module = stir(head(dict()))
    inputs, labels = data()
    expected = module.loss(inputs, labels, {})
    logits = torch.randn(2, 4, 4, 8)
    small = torch.cat([s.gt_sem_seg.data[:, ::8, ::8] for s in labels])
    naive = F.cross_entropy(logits, small, ignore_index=255)
    got = module.text_branch.fusion.cross_entropy(logits, small, 255)
    torch.testing.assert_close(got, naive)
    for sample in labels:
        sample.gt_sem_seg.data.fill_(255)
    nothing = module.loss(inputs, labels, {})
    for name in ('loss_bridge_ce', 'loss_bridge_kl'):
        assert expected[name] > 0 and nothing[name] == 0
    nothing['loss_bridge_ce'].backward()
    assert not module.text_branch.fusion.text_gate.grad.any()


def test_similarities_are_float32_under_amp():
    module = stir(head(dict()))
    inputs, labels = data()
    with torch.autocast('cpu', torch.bfloat16):
        text, products = module.text_branch.fusion(inputs[0],
                                                   module.text_branch.text())
        losses = module.loss(inputs, labels, {})
    assert text.dtype == products.dtype == torch.float32
    full = module.loss(inputs, labels, {})
    for name in ('loss_bridge_ce', 'loss_bridge_kl'):
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == pytest.approx(
            full[name].item(), rel=.1, abs=.01)


# ------------------------------------------------------------ other heads
def test_other_norms_and_heads():
    fusion = dict(BRIDGE, use='inference')
    built = TextDDRHead(
        in_channels=16,
        channels=8,
        num_classes=4,
        text=CONTROL,
        fusion=fusion,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        loss_decode=[dict(type='CrossEntropyLoss')] * 2)
    kinds = {type(m).__name__ for m in built.text.fusion.modules()}
    assert 'SyncBatchNorm' in kinds and 'BatchNorm2d' not in kinds
    # One that does not fold is not taken over into the branch.
    other = TextFCNHead(
        text=CONTROL,
        fusion=fusion,
        norm_cfg=dict(type='GN', num_groups=2),
        **ARGS)
    kinds = {type(m).__name__ for m in other.text.fusion.modules()}
    assert 'BatchNorm2d' in kinds and 'GroupNorm' not in kinds


@each_case('kwargs, message', [
    (dict(use='testing'), "use.*must be one of.*'testing'"),
    (dict(num_heads=3), 'num_heads=3'),
    (dict(stride=4), 'stride=4'),
    (dict(num_blocks=0), 'num_blocks=0'),
    (dict(kl_weight=-1.), 'kl_weight=-1'),
    (dict(temperature=0.), 'temperature=0'),
    (dict(ce_weight=0.), 'never learn what it is to teach'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        head(kwargs)


def test_bad_places():
    with pytest.raises(ValueError, match="needs role='classifier'"):
        head(dict(use='inference'), role='auxiliary')
    # With a fusion the branch has a use without other losses.
    assert len(head(dict(), role='auxiliary').text_losses) == 0


@each_case('use', ['training', 'inference'])
def test_several_phrases_a_class_are_refused(use, tmp_path):
    words = dict(
        car=['car', 'auto'],
        road=['road', 'street'],
        sky=['sky', 'heaven'],
        pole=['pole', 'post'])
    file = str(tmp_path / 'phrases.safetensors')
    encode_classes(words, 'toyclip', 'photo', keep_bank=True).save(file)
    text = dict(type='SynonymSampler', file=file, threshold=0.)
    fine = head(dict(use=use), text=dict(text, mode='mean'))
    assert fine.loss(*data(), None)['loss_ce'] > 0
    with pytest.raises(ValueError, match="2 phrases a class, as mode='max'"):
        head(dict(use=use), text=dict(text, mode='max')).loss(*data(), None)
