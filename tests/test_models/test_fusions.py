# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The two-way bridge and DenseCLIP's context-aware text."""
import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from heads import ALIGN, ARGS, BALANCED, backward, data, without_gradient
from mmengine.structures import PixelData
from network_tester import samples
from tiny import CONTROL, PROMPTS, stir
from torch import nn

from mmseg_textkd.models import (ContextAwareText, TextClassifier, TextDDRHead,
                                 TextFCNHead, TextPIDHead)
from mmseg_textkd.models.text_parameters import (prompt_parameters,
                                                 text_providers)
from mmseg_textkd.text.encode_classes import encode_classes

BRIDGE = dict(type='TwoWayBridge', width=8, num_heads=2)
CONTEXT = dict(type='ContextAwareText', width=8, num_heads=2)
FUSIONS = dict(bridge=BRIDGE, context=CONTEXT)
KEPT = dict(use='inference')
GN = dict(type='GN', num_groups=2)
START = dict(text_gate=0, pixel_gate=0, gamma=1e-4, score_weight=0)
NAMES = ('loss_bridge_ce', 'loss_bridge_kl', 'loss_context_ce')


def head(text=CONTROL, **kwargs):
    torch.manual_seed(7)
    return TextFCNHead(text=text, **{**ARGS, **kwargs})


def attention(queries, keys, values, heads):
    """Rows that attend to rows, by the definition."""
    query, key, value = (
        rows.unflatten(1, (heads, -1)) for rows in (queries, keys, values))
    products = torch.einsum('qhd,khd->hqk', query, key) / query.shape[2]**.5
    shares = products.exp() / products.exp().sum(2, keepdim=True)
    return torch.einsum('hqk,khd->qhd', shares, value).flatten(1)


def norm_relu(module, x):
    """A ConvModule with an activation."""
    return module.norm(module.conv(x)).clamp(min=0)


def naive_block(block, pixels, tokens):
    """What the docstring of the block says, of one image."""
    heads, flat = block.num_heads, pixels.flatten(1).T
    query = block.query(block.norm_query(tokens))
    tokens = tokens + block.gathered(attention(query, flat, flat, heads))
    triple = block.qkv(block.norm_self(tokens)).chunk(3, dim=1)
    tokens = tokens + block.mixed(attention(*triple, heads))
    tokens = tokens + block.ffn(tokens)
    depthwise, pointwise = block.conv.conv
    middle = norm_relu(depthwise, pixels[None])
    pixels = pixels + pointwise.norm(pointwise.conv(middle))[0]
    pair = block.key_value(block.norm_told(tokens)).chunk(2, dim=1)
    told = attention(pixels.flatten(1).T, *pair, heads)
    return pixels + told.T.unflatten(1, pixels.shape[1:]), tokens


def naive_logits(classifier, feat):
    """Logits of one image (K, H, W), with e' of width D made in full."""
    bridge, text = classifier.fusion, classifier.text().double()
    separable = bridge.pixels_in
    pixels = norm_relu(separable.pointwise_conv,
                       norm_relu(separable.depthwise_conv, feat[None]))[0]
    tokens = bridge.text_in(text)
    for block in bridge.blocks:
        pixels, tokens = naive_block(block, pixels, tokens)
    text = text + bridge.text_gate * bridge.text_out(tokens)
    gained = torch.einsum('dc,chw->dhw', bridge.pixels_out.weight, pixels)
    gained = F.interpolate(
        gained[None], size=feat.shape[1:], mode='bilinear')[0]
    embeddings = classifier.projection(feat[None])[0]
    embeddings = embeddings + bridge.pixel_gate[:, None, None] * gained
    cosines = torch.einsum('dhw,kd->khw', embeddings, text)
    bias = classifier.logit_bias[:, None, None]
    return classifier.scale().double() * cosines + bias


@pytest.mark.stacks
@each_case('stride, norm, num_classes', [(1, 'bn', 3), (2, 'bn', 1),
                                         (2, 'none', 3), (2, 'l2', 3)])
def test_bridge_is_that_of_the_definition(stride, norm, num_classes):
    text = dict(CONTROL, num_classes=num_classes)
    fusion = dict(BRIDGE, use='inference', stride=stride)
    module = TextClassifier(5, num_classes, text, norm, fusion=fusion)
    module = stir(module).double().eval()
    feat = torch.randn(2, 5, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        got, rows = module(feat), module.text()
        expected = torch.stack([naive_logits(module, f) for f in feat])
        plain = module.classify(module.projection(feat), rows)
        texts, products = module.fusion(feat, rows)
        # Text of each image's own is text like any other.
        again = module.fusion(feat, rows.expand(2, -1, -1))
    bound = 1e-5 if norm == 'l2' else 1e-10  # L2 norms are float32
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)
    assert (got - plain).abs().max() > .1
    torch.testing.assert_close(again, (texts, products))
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    # The short way of evaluation is that of training, statistics aside.
    for part in module.modules():
        part.training = not isinstance(part, nn.BatchNorm2d)
    torch.testing.assert_close(module(feat), got, rtol=bound, atol=bound)


def multi_head(module, queries, memory):
    """nn.MultiheadAttention on rows."""
    pairs = zip((queries, memory, memory), module.in_proj_weight.chunk(3),
                module.in_proj_bias.chunk(3))
    rows = (F.linear(x, weight, bias) for x, weight, bias in pairs)
    return module.out_proj(attention(*rows, module.num_heads))


def naive_text(module, feat, text):
    """Context-aware text of one image."""
    step, (_, height, width) = module.stride, feat.shape
    squares = [
        feat[:, y:y + step, x:x + step].mean(dim=(1, 2))
        for y in range(0, height, step) for x in range(0, width, step)
    ]
    memory = torch.stack([feat.mean(dim=(1, 2)), *squares])
    memory, tokens = module.memory_in(memory), module.text_in(text)
    for layer in module.layers:
        inside = layer.norm1(tokens)
        tokens = tokens + multi_head(layer.self_attn, inside, inside)
        inside = layer.norm2(tokens)
        tokens = tokens + multi_head(layer.multihead_attn, inside, memory)
        hidden = F.gelu(layer.linear1(layer.norm3(tokens)))
        tokens = tokens + layer.linear2(hidden)
    return text + module.gamma * module.text_out(tokens)


@pytest.mark.stacks
@each_case('size, num_classes', [((8, 8), 3), ((5, 6), 1), ((2, 3), 7)])
def test_context_is_that_of_the_definition(size, num_classes):
    module = ContextAwareText(5, 16, num_classes, width=8, num_heads=2)
    module = stir(module).double().eval()
    feat = torch.randn(2, 5, *size, dtype=torch.float64)
    text = torch.randn(num_classes, 16, dtype=torch.float64)
    with torch.no_grad():
        got = module(feat, text)
        expected = torch.stack([naive_text(module, f, text) for f in feat])
        again = module(feat, text.expand(2, -1, -1))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, got)
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_defaults_of_context_are_those_of_the_source():
    module = ContextAwareText(8, 16, 4)
    layer, other, _ = module.layers
    assert layer.self_attn.embed_dim == 256
    assert layer.multihead_attn.num_heads == 4 and layer.dropout.p == .1
    assert (module.temperature, module.loss_weight) == (.07, .4)
    # Layers that start alike would learn alike.
    assert not torch.equal(layer.linear1.weight, other.linear1.weight)


@each_case('kind, fusion, norm', [
    (TextFCNHead, BRIDGE, 'bn'),
    (TextFCNHead, BRIDGE, 'l2'),
    (TextFCNHead, CONTEXT, 'bn'),
    (TextPIDHead, CONTEXT, 'bn'),
])
def test_it_starts_as_the_network_without_it(kind, fusion, norm):
    """Also where the stock head initializes all that it has."""
    args = dict(text=CONTROL, in_channels=8, channels=8, num_classes=4)
    args.update(text_branch=dict(norm=norm))
    if kind is TextPIDHead:
        args['loss_decode'] = [dict(type='CrossEntropyLoss')] * 4
    else:
        args['dropout_ratio'] = 0.
    plain, kept = kind(**args), kind(**args, fusion=dict(fusion, **KEPT))
    for module in (plain, kept):
        module.init_weights()
    kept.load_state_dict(plain.state_dict(), strict=False)
    params = dict(kept.text_branch.fusion.named_parameters())
    gates = START.keys() & params.keys()
    assert len(gates) == 2
    for gate in gates:
        assert torch.equal(params[gate],
                           torch.full_like(params[gate], START[gate]))
    inputs, labels = data()
    if kind is TextFCNHead:
        expected, got = (m.loss(inputs, labels, {}) for m in (plain, kept))
        torch.testing.assert_close({k: got[k] for k in expected}, expected)
        more = {'loss_context_ce'} if fusion is CONTEXT else set()
        assert got.keys() - expected.keys() == more
        # The gates open by the loss of the network itself.
        got['loss_ce'].backward()
        assert all(params[gate].grad.any() for gate in gates - {'gamma'})
    feat = inputs[0] if kind is TextPIDHead else inputs
    torch.testing.assert_close(
        kept.eval()(feat), plain.eval()(feat), rtol=1e-5, atol=1e-5)


@each_case('role', ['classifier', 'auxiliary'])
@each_case('fusion', FUSIONS.values())
def test_training_only_leaves_the_plain_part_alone(role, fusion):
    args = dict(role=role, text_losses=[ALIGN])
    plain, taught = stir(head(**args)), head(**args, fusion=fusion)
    taught.load_state_dict(plain.state_dict(), strict=False)
    inputs, labels = data()
    expected, got = (m.loss(inputs, labels, {}) for m in (plain, taught))
    backward(got)
    # Else DDP complains.
    assert without_gradient(taught) == []
    added = {k: got.pop(k) for k in NAMES if k in got}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in got)
    names = NAMES[2:] if fusion is CONTEXT else NAMES[:2]
    assert tuple(added) == names and added[names[0]] > 0
    if fusion is BRIDGE:
        # In one role both classify alike still, and nothing is to be taught.
        taught_now = added['loss_bridge_kl'] > 1e-3
        assert taught_now == (role == 'auxiliary')
        assert taught_now or added['loss_bridge_kl'].abs() < 1e-6
    taught.text_branch.fusion.forward = None  # is not called
    assert torch.equal(taught.eval()(inputs), plain.eval()(inputs))


@each_case('options', [
    dict(temperature=1., ce_weight=.4, kl_weight=1.),
    dict(temperature=3., ce_weight=1., kl_weight=.3, detach_teacher=False),
])
def test_losses_of_the_bridge(options):
    # With a fusion the branch has a use without other losses.
    fusion = dict(BRIDGE, **options)
    module = stir(head(role='auxiliary', text_losses=[], fusion=fusion))
    stir(module.conv_seg, 1.)
    inputs, labels = data()
    module.loss(inputs, labels, {})
    for part in module.modules():  # else a forward moves the statistics
        part.training = not isinstance(part, nn.BatchNorm2d)
    got = module.loss(inputs, labels, {})
    branch = module.text_branch
    with torch.no_grad():
        feat = module._forward_feature(inputs)
        fused = branch.classify(
            branch.projection(feat), *branch.fusion(feat, branch.text()))
        student = module.conv_seg(feat)
    small = torch.cat([s.gt_sem_seg.data[:, ::8, ::8] for s in labels])
    ce = F.cross_entropy(fused, small, ignore_index=255)
    temperature = options['temperature']
    kl = F.kl_div(
        (student / temperature).log_softmax(1),
        (fused / temperature).log_softmax(1),
        reduction='none',
        log_target=True).sum(1)[small != 255].mean()
    assert kl > 1e-2 and (small == 255).any()
    expected = dict(
        loss_bridge_ce=options['ce_weight'] * ce,
        loss_bridge_kl=options['kl_weight'] * temperature**2 * kl)
    torch.testing.assert_close({k: got[k] for k in expected}, expected)
    # Only the plain classifier, which is deployed, learns by it by default.
    got['loss_bridge_kl'].backward()
    assert module.conv_seg.weight.grad.any()
    assert module.convs[0].conv.weight.grad.any()
    fused = [p.grad for p in branch.parameters() if p.grad is not None]
    assert any(g.any() for g in fused) == ('detach_teacher' in options)
    module.zero_grad()
    for sample in labels:
        sample.gt_sem_seg.data.fill_(255)
    nothing = module.loss(inputs, labels, {})
    assert all(nothing[name] == 0 for name in expected)
    backward(nothing)
    assert not branch.fusion.text_gate.grad.any()
    off = head(fusion=dict(BRIDGE, kl_weight=0.)).loss(inputs, labels, {})
    assert 'loss_bridge_kl' not in off


def test_a_head_with_one_logit_is_taught_as_with_two():
    """Its logit is that of the second class minus that of the first."""
    args = dict(role='auxiliary', text_losses=[], fusion=BRIDGE, num_classes=2)
    sigmoid = dict(type='CrossEntropyLoss', use_sigmoid=True)
    one = stir(head(out_channels=1, loss_decode=sigmoid, **args))
    two = head(**args)
    state = one.state_dict()
    for name in ('weight', 'bias'):
        logit = state[f'conv_seg.{name}']
        state[f'conv_seg.{name}'] = torch.cat([-logit / 2, logit / 2])
    two.load_state_dict(state)
    torch.manual_seed(3)
    inputs = [torch.randn(2, 8, 4, 8)], samples((32, 64), 2), {}
    losses = [module.loss(*inputs) for module in (one, two)]
    assert losses[0]['loss_bridge_kl'] > 1e-3
    for name in NAMES[:2]:
        torch.testing.assert_close(losses[0][name], losses[1][name])


@each_case('options', [
    dict(fusion=dict(BRIDGE, **KEPT), text_losses=[ALIGN]),
    dict(text_branch=dict(BALANCED, unseen=[1])),
])
def test_losses_in_evaluation_mode(options):
    """As a project's validation loss: with the statistics of batch norm."""
    module = stir(head(**options))
    inputs, labels = data()
    for sample in labels:
        seen = sample.gt_sem_seg.data
        seen[seen == 1] = 255
        sample.teacher = PixelData(embeddings=torch.randn(16, 4, 8))
    name, = (f'loss_{k}' for k in ('text_align', 'image_embedding')
             if ('fusion' in options) == (k == 'text_align'))
    found = module.eval().loss(inputs, labels, {})[name]
    for part in module.modules():
        part.training = not isinstance(part, nn.BatchNorm2d)
    torch.testing.assert_close(found, module.loss(inputs, labels, {})[name])


@each_case('role', ['classifier', 'auxiliary'])
def test_loss_of_context_is_the_cross_entropy_of_the_score_map(role):
    """Cosines, and a temperature in the loss only."""
    fusion = dict(CONTEXT, dropout=0., loss_weight=.7)
    module = stir(head(role=role, fusion=fusion))
    inputs, labels = data()
    got = module.loss(inputs, labels, {})['loss_context_ce']
    feat, branch = module._forward_feature(inputs), module.text_branch
    with torch.no_grad():
        embeddings = branch.projection(feat)
        text = branch.fusion(feat, branch.text())
        score = F.cosine_similarity(
            embeddings[:, None], text[..., None, None], dim=2)
    found = branch.fusion.score(embeddings, feat, branch.text())
    torch.testing.assert_close(found, score)
    small = torch.cat([s.gt_sem_seg.data[:, ::8, ::8] for s in labels])
    expected = .7 * F.cross_entropy(score / .07, small, ignore_index=255)
    torch.testing.assert_close(got, expected)
    got.backward()
    for part in (branch.fusion.layers[0], branch.projection.conv,
                 module.convs[0].conv):
        assert all(p.grad.any() for p in part.parameters())
    assert branch.fusion.gamma.grad.any()


def test_a_concatenated_score_map_is_an_added_one():
    """One linear classifier of [features, map], written out."""
    fusion = dict(CONTEXT, use='inference', num_classes=3)
    module = TextClassifier(5, 3, dict(CONTROL, num_classes=3), fusion=fusion)
    module = stir(module).eval()
    feat = torch.randn(2, 5, 4, 6)
    with torch.no_grad():
        embeddings, text = module.projection(feat), module.text()
        plain = module.classify(embeddings, text)
        score = module.fusion.score(embeddings, feat, text)
        # The plain part as a convolution, K more columns beside it.
        weight, shift = module.projection.affine(torch.float32)
        scaled = module.scale() * text
        more = module.scale() * module.fusion.score_weight
        joint = torch.cat([scaled @ weight, more], dim=1)[..., None, None]
        bias = scaled @ shift + module.logit_bias
        expected = F.conv2d(torch.cat([feat, score], dim=1), joint, bias)
        got = module(feat)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > .1


def test_prompts_learn_through_the_decoder_and_the_tower_does_not():
    """DenseCLIP's issues: no `no_grad` around prompts, no learning tower."""
    text = dict(
        PROMPTS,
        vocabulary=['sky', 'road', 'car', 'person'],
        embeddings=dict(CONTROL, dim=64))
    module = head(text, fusion=CONTEXT)
    provider, = text_providers(module).values()
    provider.start_learning()
    before = provider.tower.checksum()
    module.loss(*data(), {})['loss_context_ce'].backward()
    prompts = prompt_parameters(module)
    assert prompts and all(p.grad.any() for p in prompts.values())
    tower = list(provider.tower.parameters())
    assert all(not p.requires_grad and p.grad is None for p in tower)
    assert provider.tower.checksum() == before
    assert not set(map(id, module.parameters())) & set(map(id, tower))


@each_case('fusion', [BRIDGE, dict(CONTEXT, dropout=0.)])
def test_similarities_are_float32_under_amp(fusion):
    module = stir(head(fusion=fusion))
    inputs, labels = data()
    full = module.loss(inputs, labels, {})
    with torch.autocast('cpu', torch.bfloat16):
        half = module.loss(inputs, labels, {})
        branch = module.text_branch
        found = branch.fusion(inputs[0], branch.text())
    found = found if isinstance(found, tuple) else (found, )
    assert all(part.dtype == torch.float32 for part in found)
    for name in set(NAMES) & set(full):
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(
            full[name].item(), rel=.1, abs=.01)


# One that does not fold is not taken over into the branch.
@each_case('kind, norm, has, has_not', [
    (TextDDRHead, dict(type='SyncBN'), 'SyncBatchNorm', 'BatchNorm2d'),
    (TextFCNHead, GN, 'BatchNorm2d', 'GroupNorm'),
])
def test_norms_of_the_bridge_are_those_of_the_head(kind, norm, has, has_not):
    args = dict(ARGS, text=CONTROL, fusion=dict(BRIDGE, **KEPT), norm_cfg=norm)
    if kind is TextDDRHead:
        args['loss_decode'] = [dict(type='CrossEntropyLoss')] * 2
        del args['num_convs']
    kinds = {type(m).__name__ for m in kind(**args).text.fusion.modules()}
    assert has in kinds and has_not not in kinds


@each_case('fusion, kwargs, message', [
    ('bridge', dict(use='testing'), "use.*must be one of.*'testing'"),
    ('bridge', KEPT, "needs role='classifier'"),
    ('bridge', dict(num_heads=3), 'num_heads=3'),
    ('bridge', dict(stride=4), 'stride=4'),
    ('bridge', dict(num_blocks=0), 'num_blocks=0'),
    ('bridge', dict(kl_weight=-1.), 'kl_weight=-1'),
    ('bridge', dict(temperature=0.), 'temperature=0'),
    ('bridge', dict(ce_weight=0.), 'never learn what it is to teach'),
    ('context', dict(num_heads=3), 'num_heads=3'),
    ('context', dict(stride=0), 'stride=0'),
    ('context', dict(num_layers=0), 'num_layers=0'),
    ('context', dict(temperature=0.), 'temperature=0'),
    ('context', dict(loss_weight=0.), 'loss_weight=0'),
    ('bridge', dict(wide=32), "unexpected keyword argument 'wide'"),
    ('context', dict(ce_weight=1.), "unexpected keyword argument 'ce_weight'"),
])
def test_bad_arguments(fusion, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        head(fusion=dict(FUSIONS[fusion], **kwargs), role='auxiliary')


@each_case('use', ['training', 'inference'])
def test_several_phrases_a_class_are_refused(use, tmp_path):
    words = {n: [n, f'the {n}'] for n in ('car', 'road', 'sky', 'pole')}
    file = str(tmp_path / 'phrases.safetensors')
    encode_classes(words, 'toyclip', 'photo', keep_bank=True).save(file)
    text = dict(type='SynonymSampler', file=file, threshold=0.)
    fusion = dict(BRIDGE, use=use)
    fine = head(dict(text, mode='mean'), fusion=fusion)
    assert fine.loss(*data(), None)['loss_ce'] > 0
    with pytest.raises(ValueError, match="2 phrases a class, as mode='max'"):
        head(dict(text, mode='max'), fusion=fusion).loss(*data(), None)
