# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The balance of supervised and distilled embeddings at every pixel."""
import copy
import math

import pytest
import torch
from each_case import each_case
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from network_tester import samples
from torch.utils.flop_counter import FlopCounterMode

from mmseg_textkd.apis import label_maps
from mmseg_textkd.apis.label_maps import select_classes
from mmseg_textkd.deploy import BalancedConvSeg, L2ConvSeg, fold_state_dict
from mmseg_textkd.deploy.balanced_conv_seg import fold_balanced
from mmseg_textkd.deploy.l2_conv_seg import fuse_l2
from mmseg_textkd.models import (BalancedTextClassifier, FrozenCLIPTeacher,
                                 FrozenCLIPViT, ImageEmbeddingDistillationLoss,
                                 TextClassifier, TextFCNHead)
from mmseg_textkd.models.layers.balance import (balance_log_probabilities,
                                                balance_probabilities)

pytestmark = pytest.mark.stacks

UNSEEN, NAMES = [1, 4], tuple('abcdef')
BRANCH = dict(type='BalancedTextClassifier', bias=False, unseen=UNSEEN)
ARGS = dict(
    in_channels=8,
    channels=8,
    num_classes=6,
    num_convs=1,
    concat_input=False,
    dropout_ratio=0.,
    norm_cfg=dict(type='BN'))
TOY = dict(
    model='toyclip',
    embed_dims=64,
    num_layers=3,
    patch_size=8,
    grid_size=4,
    out_dims=64,
    surgery_blocks=1)


@pytest.fixture
def text(make_embeddings):
    return dict(type='ClassEmbeddings', file=make_embeddings(6, 16, NAMES))


def settled(module, channels=8):
    """Nothing at its neutral start value, statistics included."""
    with torch.no_grad():
        for param in module.parameters():
            param.add_(.3 * torch.randn_like(param))
    module.train()
    for _ in range(3):
        feat = 1 + 2 * torch.randn(2, channels, 6, 6)
        for projection in (module.projection, module.image_projection):
            projection(feat)
    return module.eval()


def classifier(text, **options):
    options = dict(dict(bias=False, unseen=UNSEEN, clip_scale=7.), **options)
    return settled(BalancedTextClassifier(8, 6, text, **options))


def labeled(seed=1):
    """Data samples without the unseen classes, some of it not labeled."""
    torch.manual_seed(seed)
    out = samples((16, 24), 6)
    for sample in out:
        labels = sample.gt_sem_seg.data
        labels[torch.isin(labels, torch.tensor(UNSEEN))] = 255
        sample.teacher = PixelData(embeddings=torch.randn(16, 4, 5))
    return out


def softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def scalar_scores(module, feat):
    """The formula in Python's floats, of one pixel."""
    logits = []
    for name, scale in (('projection', module.scale().item()),
                        ('image_projection', module.clip_scale)):
        projection = getattr(module, name)
        weight, bn = projection.conv.weight.flatten(1).tolist(), projection.bn
        pixel = [sum(w * f for w, f in zip(row, feat)) for row in weight]
        pixel = [(p - m) / math.sqrt(v + bn.eps) * g + b
                 for p, m, v, g, b in zip(
                     pixel,
                     *(x.tolist() for x in (bn.running_mean, bn.running_var,
                                            bn.weight, bn.bias)))]
        logits.append([
            scale * sum(p * t for p, t in zip(pixel, row))
            for row in module.text().tolist()
        ])
    a, d = map(softmax, logits)
    share = [
        module.balance['beta' if k in UNSEEN else 'alpha'] for k in range(6)
    ]
    return [
        math.log(x**(1 - part) * y**part) for x, y, part in zip(a, d, share)
    ]


@pytest.mark.parametrize('balance', [None, dict(alpha=.1, beta=.6)])
def test_scores_are_those_of_the_formula(text, balance):
    module = classifier(text, balance=balance).double()
    assert module.balance == (balance or dict(alpha=.3, beta=1.))
    feat = torch.randn(1, 8, 2, 3).double()
    with torch.no_grad():
        found = module(feat)
    for y in range(2):
        for x in range(3):
            expected = scalar_scores(module, feat[0, :, y, x].tolist())
            assert found[0, :, y, x].tolist() == pytest.approx(
                expected, rel=1e-9, abs=1e-9)


def test_it_is_ebsegs_balance_without_the_third_embedding():
    a, d = (torch.randn(2, 6, 3, 4).log_softmax(1) for _ in range(2))
    seen = torch.tensor([True, False, True, True, False, True])
    found = balance_log_probabilities(a, d, seen, .3, 1.).exp()
    last = [v.exp().movedim(1, -1) for v in (a, torch.zeros_like(a), d)]
    expected = balance_probabilities(*last, seen, .3, 1., 0.)
    torch.testing.assert_close(found.movedim(1, -1), expected)
    # What float32 has no probability for stays in order, and finite.
    d = torch.tensor([0., -200., -300.])[None, :, None, None]
    a = torch.zeros_like(d)
    scores = balance_log_probabilities(a, d, torch.tensor([False] * 3), .3, 1.)
    assert scores.flatten().tolist() == [0, -200, -300]


def test_without_a_class_that_is_unseen_or_with_zeros_it_is_plain(text):
    feat = torch.randn(2, 8, 5, 4)
    for options in (dict(unseen=None), dict(balance=dict(alpha=0, beta=0))):
        module = classifier(text, **options)
        plain = TextClassifier(8, 6, text, bias=False).eval()
        state = module.state_dict()
        plain.load_state_dict({k: state[k] for k in plain.state_dict()})
        assert torch.equal(module(feat), plain(feat))
        assert not module.balanced
    module = classifier(text)
    assert module.balanced
    assert not torch.allclose(module(feat).softmax(1), plain(feat).softmax(1))


def test_seen_classes_are_those_of_the_config(text):
    """With the class names, or from a checkpoint alone."""
    for source in (text, dict(type='ClassEmbeddings', file='none', dim=16)):
        module = BalancedTextClassifier(
            8, 6, source, bias=False, unseen=UNSEEN)
        assert module.seen_in_training().tolist() == [
            True, False, True, True, False, True
        ]


# -------------------------------------------------------------- training
def gradients(head, feat, data):
    feat = feat.clone().requires_grad_()
    head.zero_grad()
    losses = head.loss([feat], data, {})
    sum(v for k, v in losses.items() if k.startswith('loss')).backward()
    grads = {n: p.grad for n, p in head.named_parameters()}
    return {k: v.detach() for k, v in losses.items()}, dict(grads, x=feat.grad)


def test_the_supervised_part_learns_as_without(text):
    loss = dict(type='ImageEmbeddingDistillationLoss', loss_weight=0.)
    align = dict(type='TextAlignmentLoss')
    head = TextFCNHead(
        text=text, text_branch=BRANCH, text_losses=[align, loss], **ARGS)
    plain = TextFCNHead(
        text=text,
        text_branch=dict(bias=False, unseen=UNSEEN),
        text_losses=[align],
        **ARGS)
    state = head.state_dict()
    assert [k for k in state if k not in plain.state_dict()
            ] == [k for k in state if '.image_projection.' in k]
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    data, feat = labeled(), torch.randn(2, 8, 4, 6)
    losses, grads = gradients(head, feat, data)
    for sample in data:
        del sample.teacher
    expected, expected_grads = gradients(plain, feat, data)
    assert losses.pop('loss_image_embedding') == 0
    assert losses == expected and losses.keys() == expected.keys()
    for name, grad in grads.items():
        if '.image_projection.' in name:
            assert (grad == 0).all()
        else:
            torch.testing.assert_close(grad, expected_grads[name])
    # With a weight it changes the features, and the image projection.
    head.text_losses[1].loss_weight = 1.
    _, grads = gradients(head, feat, labeled())
    assert not torch.allclose(grads['x'], expected_grads['x'])
    assert grads['conv_seg.image_projection.conv.weight'].abs().max() > 0


def test_nothing_depends_on_text_that_is_unseen(text):
    head = TextFCNHead(text=text, text_branch=BRANCH, **ARGS)
    assert [type(m)
            for m in head.text_losses] == [ImageEmbeddingDistillationLoss]
    data, feat = labeled(), torch.randn(2, 8, 4, 6)
    expected = gradients(head, feat, data)
    # Whatever is computed with a NaN becomes one.
    head.text_branch.text.class_embeddings[UNSEEN] = float('nan')
    for got, wanted in zip(gradients(head, feat, data), expected):
        for key, value in wanted.items():
            assert torch.equal(got[key], value), key
            assert key.endswith('.scale') or value.abs().max() > 0, key


def test_a_teacher_of_classes_stays_refused(text):
    """Also where only `distill_losses` look at it."""
    for branch in (BRANCH, dict(bias=False, unseen=UNSEEN)):
        head = TextFCNHead(text=text, text_branch=branch, **ARGS)
        for field in ('logits', 'features'):
            data = labeled()
            setattr(data[1].teacher, field, torch.randn(6, 4, 5))
            with pytest.raises(ValueError, match='teacher .* supervise'):
                head.loss([torch.randn(2, 8, 4, 6)], data, {})


@each_case('options, match', [
    (dict(role='auxiliary', text_branch=BRANCH), "needs role='classifier'"),
    (dict(text_branch=dict(type='TextBranch')), 'must be a TextClassifier'),
    (dict(text_branch=dict(BRANCH, balance=dict(alpha=-.1))), 'exponents'),
    (dict(text_branch=dict(BRANCH, balance=dict(beta=1.1))), 'exponents'),
    (dict(text_branch=dict(BRANCH, clip_scale=0.)), 'must be positive'),
    (dict(
        text_branch=dict(type='BalancedTextClassifier'),
        fusion=dict(type='TwoWayBridge',
                    use='inference')), 'TwoWayBridge that is used'),
    (dict(text_branch=BRANCH, text_losses=[]), 'belong together'),
    (dict(text_losses=[dict(type='ImageEmbeddingDistillationLoss')]),
     'belong together'),
])
def test_bad_options(text, options, match):
    with pytest.raises(ValueError, match=match):
        TextFCNHead(text=text, **options, **ARGS)


# ------------------------------------------------------------------ loss
def test_loss_is_that_of_a_loop_over_all_pixels():
    data, feat = labeled(), torch.randn(2, 16, 4, 5, requires_grad=True)
    teachers = torch.stack([s.teacher.embeddings for s in data])
    teachers.requires_grad_()
    for sample, teacher in zip(data, teachers):
        sample.teacher.embeddings = teacher
    loss = ImageEmbeddingDistillationLoss(loss_weight=3.)
    # Labels and text have no say.
    value = loss(feat, None, None, batch_data_samples=data)
    total = 0.
    for n in range(2):
        for y in range(4):
            for x in range(5):
                v = teachers[n, :, y, x].tolist()
                length = math.sqrt(sum(c * c for c in v))
                total += sum((u - c / length)**2
                             for u, c in zip(feat[n, :, y, x].tolist(), v))
    assert value.item() == pytest.approx(3 * total / 40, rel=1e-5)
    value.backward()
    assert feat.grad.abs().amax(1).min() > 0 and teachers.grad is None
    half = loss(feat.bfloat16(), None, None, batch_data_samples=data)
    assert half.dtype == torch.float32
    # The minimum is the unit vector itself, at another resolution too.
    unit = torch.nn.functional.normalize(teachers.detach(), dim=1)
    assert loss(unit, None, None, batch_data_samples=data) < 1e-10
    constant = labeled()
    for sample in constant:
        sample.teacher = PixelData(embeddings=5 * torch.ones(16, 2, 3))
    flat = torch.full((2, 16, 7, 9), .25)
    assert loss(flat, None, None, batch_data_samples=constant) < 1e-10


def test_what_a_loss_needs(text):
    loss = ImageEmbeddingDistillationLoss()
    data = labeled()
    with pytest.raises(ValueError, match='of width 16, but the text has wi'):
        loss(torch.randn(2, 8, 4, 5), None, None, batch_data_samples=data)
    head = TextFCNHead(text=text, text_branch=BRANCH, **ARGS)
    for sample in data:
        del sample.teacher
    with pytest.raises(ValueError, match='FrozenCLIPTeacher'):
        head.loss([torch.randn(2, 8, 4, 6)], data, {})
    # And the losses that need logits say so.
    head = TextFCNHead(
        text=text,
        text_losses=[dict(type='TextSimilarityDistillationLoss')],
        **ARGS)
    with pytest.raises(ValueError, match='have no logits of a teacher'):
        head.loss([torch.randn(2, 8, 4, 6)], labeled(), {})


# ------------------------------------------------------------------ fold
@pytest.mark.parametrize('norm, dtype, bound', [
    ('bn', torch.float64, 1e-10),
    ('bn', torch.float32, 1e-4),
    ('l2', torch.float32, 1e-4),
])
def test_fold_of_new_classes_is_exact(text, norm, dtype, bound):
    module = classifier(text, norm=norm).to(dtype)
    feat = torch.randn(2, 8, 5, 7).to(dtype)
    if norm == 'bn':
        supervised = module.as_conv()
    else:
        supervised = L2ConvSeg(8, 6, 16).to(dtype)
        supervised.load_state_dict(fuse_l2(module))
    seen = module.seen_in_training().tolist()
    folded = fold_balanced(module, supervised, seen)
    assert type(folded) is BalancedConvSeg
    with torch.no_grad():
        expected, found = module(feat), folded(feat)
    assert found.dtype == expected.dtype == dtype
    assert (found - expected).abs().max() < bound * expected.abs().max()
    # One convolution C -> K more.
    more = sum(p.numel() for p in folded.parameters()) - sum(
        p.numel() for p in supervised.parameters())
    assert more == 6 * 8 + 6
    flops = []
    for conv in (folded, supervised):
        with FlopCounterMode(display=False) as counter:
            conv(feat)
        flops.append(counter.get_total_flops())
    assert flops[0] - flops[1] == 2 * 6 * 8 * feat[:, 0].numel()
    assert fold_balanced(module, supervised, [True] * 6) is supervised
    with pytest.raises(RuntimeError, match='evaluation mode'):
        module.train().image_conv()


def test_parts_of_the_classes_are_those_of_the_whole(text, monkeypatch):
    module = classifier(text)
    whole = fold_balanced(module, module.as_conv(),
                          module.seen_in_training().tolist())
    monkeypatch.setattr(label_maps, 'BLOCK', 4)
    with torch.no_grad():
        for _ in range(2):  # sums of other features are not taken
            feat = torch.randn(1, 8, 5, 7)
            expected = whole(feat)
            for rows in ([0, 4], [5, 5, 1]):
                part = select_classes(whole, torch.tensor(rows))
                torch.testing.assert_close(
                    part(feat), expected[:, rows], rtol=1e-4, atol=1e-4)


def test_release_is_the_supervised_part(text):
    head = TextFCNHead(text=text, text_branch=BRANCH, **ARGS)
    settled(head.conv_seg)
    stock = MODELS.build(dict(ARGS, type='FCNHead')).eval()
    stock.load_state_dict(fold_state_dict(head.eval()), strict=True)
    feat = [torch.randn(2, 8, 5, 4)]
    with torch.no_grad():
        head.conv_seg.balance = dict(alpha=0., beta=0.)
        torch.testing.assert_close(
            stock(feat), head(feat), rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------- teacher
def preprocessor(**options):
    return MODELS.build(
        dict(
            dict(
                type='SegDataPreProcessor',
                mean=[100., 110., 120.],
                std=[50., 60., 70.],
                size=(32, 48)), **options))


def test_teacher_sees_the_pictures_as_clip_does():
    teacher = MODELS.build(dict(TOY, type='FrozenCLIPTeacher', scale=1.))
    assert teacher.tower._holder.network is None, 'loaded too early'
    rgb = torch.randint(0, 256, (2, 3, 32, 48)).float()
    options = {k: v for k, v in TOY.items() if k != 'surgery_blocks'}
    with torch.no_grad():
        dense = FrozenCLIPViT(scale=1., **options)(rgb).dense(1)
    expected = torch.nn.functional.normalize(dense, dim=1)
    # Images come as MMSegmentation loads them, BGR.
    for own in (preprocessor(bgr_to_rgb=True), preprocessor(),
                preprocessor(mean=None, std=None)):
        batch = dict(inputs=[p.byte() for p in rgb.flip(1)], data_samples=None)
        found = teacher(own(batch, False)['inputs'], own)
        assert found.keys() == {'embeddings'}
        torch.testing.assert_close(
            found['embeddings'], expected, rtol=1e-3, atol=1e-4)
    assert expected.shape == (2, 64, 4, 6)
    small = FrozenCLIPTeacher(**TOY, scale=.5)
    assert small(rgb, own)['embeddings'].shape == (2, 64, 2, 3)


def test_teacher_is_frozen():
    teacher = FrozenCLIPTeacher(**TOY)
    inputs = torch.randn(1, 3, 32, 32, requires_grad=True)
    before = teacher.checksum()
    out = teacher(inputs, preprocessor())['embeddings']
    assert not out.requires_grad
    assert not any(p.requires_grad for p in teacher.tower.parameters())
    assert not any(p.requires_grad for p in teacher.tower.network.parameters())
    assert copy.deepcopy(teacher) is teacher
    assert teacher.checksum() == before
    with torch.no_grad():
        teacher.tower.positional_embedding[0, 0] += 1
    assert teacher.checksum() != before
