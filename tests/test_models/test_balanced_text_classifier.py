# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The balance of supervised and distilled embeddings at every pixel."""
import copy

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from heads import ALIGN, BALANCED, SIX, UNSEEN, gradients, labeled
from mmseg.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

from mmseg_textkd.apis import label_maps
from mmseg_textkd.apis.label_maps import select_classes
from mmseg_textkd.deploy import BalancedConvSeg, L2ConvSeg
from mmseg_textkd.deploy.balanced_conv_seg import fold_balanced
from mmseg_textkd.deploy.l2_conv_seg import fuse_l2
from mmseg_textkd.models import (BalancedTextClassifier, FrozenCLIPTeacher,
                                 FrozenCLIPViT, ImageEmbeddingDistillationLoss,
                                 TextClassifier, TextFCNHead)

pytestmark = pytest.mark.stacks

DISTILL = dict(type='ImageEmbeddingDistillationLoss')
TOY = dict(
    model='toyclip',
    embed_dims=64,
    num_layers=3,
    patch_size=8,
    grid_size=4,
    out_dims=64)


def settled(module):
    """Nothing at its neutral start value, statistics included."""
    with torch.no_grad():
        for param in module.parameters():
            param.add_(.3 * torch.randn_like(param))
    for _ in range(3):
        feat = 1 + 2 * torch.randn(2, 8, 6, 6)
        for projection in (module.projection, module.image_projection):
            projection.train()(feat)
    return module.eval()


def classifier(text, **options):
    options = dict(dict(bias=False, unseen=UNSEEN, clip_scale=7.), **options)
    return settled(BalancedTextClassifier(8, 6, text, **options))


# Of the last one, floats have probabilities of 0; scores are finite.
@each_case('options, alpha, beta', [
    (dict(), .3, 1.),
    (dict(balance=dict(alpha=.1, beta=.6)), .1, .6),
    (dict(clip_scale=1e4), .3, 1.),
])
def test_scores_are_those_of_the_formula(text, options, alpha, beta):
    """log a^(1 - lambda) d^lambda; lambda says whether a class was seen."""
    module = classifier(text, **options).double()
    feat, scores = torch.randn(1, 8, 2, 3).double(), []
    for part, scale in ((module.projection, module.scale()),
                        (module.image_projection, module.clip_scale)):
        bn, pixels = part.bn, F.conv2d(feat, part.conv.weight)
        pixels = F.batch_norm(pixels, bn.running_mean, bn.running_var,
                              bn.weight, bn.bias)
        cosines = torch.einsum('ndhw,kd->nkhw', pixels, module.text().double())
        scores.append((scale * cosines).log_softmax(1))
    share = torch.full((6, 1, 1), alpha, dtype=torch.float64)
    share[UNSEEN] = beta
    expected = (1 - share) * scores[0] + share * scores[1]
    torch.testing.assert_close(module(feat), expected, rtol=1e-9, atol=1e-9)


def test_without_a_class_that_is_unseen_or_with_zeros_it_is_plain(text):
    feat = torch.randn(2, 8, 5, 4)
    for options in (dict(unseen=None), dict(balance=dict(alpha=0, beta=0))):
        module = classifier(text, **options)
        plain = TextClassifier(8, 6, text, bias=False).eval()
        state = module.state_dict()
        plain.load_state_dict({k: state[k] for k in plain.state_dict()})
        assert torch.equal(module(feat), plain(feat))
        assert not module.balanced
    assert classifier(text).balanced


def test_seen_classes_are_those_of_the_config(text):
    """With the class names, or from a checkpoint alone."""
    for source in (text, dict(type='ClassEmbeddings', file='none', dim=16)):
        module = BalancedTextClassifier(
            8, 6, source, bias=False, unseen=UNSEEN)
        assert module.seen_in_training().tolist() == [1, 0, 1, 1, 0, 1]


def test_the_supervised_part_learns_as_without(text):
    losses = [ALIGN, dict(DISTILL, loss_weight=0.)]
    head = TextFCNHead(
        text=text, text_branch=BALANCED, text_losses=losses, **SIX)
    branch = dict(bias=False, unseen=UNSEEN)
    plain = TextFCNHead(
        text=text, text_branch=branch, text_losses=[ALIGN], **SIX)
    state, own = head.state_dict(), plain.state_dict()
    assert [k for k in state if k not in own
            ] == [k for k in state if '.image_projection.' in k]
    plain.load_state_dict({k: state[k] for k in own})
    data, feat = labeled(), torch.randn(2, 8, 4, 6)
    losses, grads = gradients(head, feat, data)
    for sample in data:
        del sample.teacher
    expected, expected_grads = gradients(plain, feat, data)
    assert losses.pop('loss_image_embedding') == 0
    assert losses == expected
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


BRIDGE = dict(type='TwoWayBridge', use='inference')
KIND = dict(type='BalancedTextClassifier')


@each_case('options, match', [
    (dict(role='auxiliary', text_branch=BALANCED), "needs role='classifier'"),
    (dict(text_branch=dict(type='TextBranch')), 'must be a TextClassifier'),
    (dict(text_branch=dict(BALANCED, balance=dict(alpha=-.1))), 'exponents'),
    (dict(text_branch=dict(BALANCED, balance=dict(beta=1.1))), 'exponents'),
    (dict(text_branch=dict(BALANCED, clip_scale=0.)), 'must be positive'),
    (dict(text_branch=KIND, fusion=BRIDGE), 'TwoWayBridge that is used'),
    (dict(text_branch=BALANCED, text_losses=[]), 'belong together'),
    (dict(text_losses=[DISTILL]), 'belong together'),
])
def test_bad_options(text, options, match):
    with pytest.raises(ValueError, match=match):
        TextFCNHead(text=text, **options, **SIX)


def test_loss_is_the_squared_distance_to_the_unit_teacher():
    """At any resolution; labels and text have no say."""
    loss, data = ImageEmbeddingDistillationLoss(loss_weight=3.), labeled()
    leaves = [s.teacher.embeddings.requires_grad_() for s in data]
    unit = F.normalize(torch.stack(leaves).detach(), dim=1)
    for size in ((4, 5), (7, 9)):
        feat = torch.randn(2, 16, *size, requires_grad=True)
        value = loss(feat, None, None, batch_data_samples=data)
        target = F.interpolate(unit, size, mode='bilinear')
        target = target / target.norm(dim=1, keepdim=True)
        expected = 3 * (feat - target).square().sum(1).mean()
        torch.testing.assert_close(value, expected)
    value.backward()
    assert feat.grad.abs().amax(1).min() > 0
    assert all(leaf.grad is None for leaf in leaves)
    half = loss(feat.bfloat16(), None, None, batch_data_samples=data)
    assert half.dtype == torch.float32


def test_what_a_loss_needs(text):
    data, feat = labeled(), [torch.randn(2, 8, 4, 6)]
    with pytest.raises(ValueError, match='of width 16, but the text has wi'):
        MODELS.build(DISTILL)(feat[0], None, None, batch_data_samples=data)
    # The losses that need logits say so.
    losses = [dict(type='TextSimilarityDistillationLoss')]
    head = TextFCNHead(text=text, text_losses=losses, **SIX)
    with pytest.raises(ValueError, match='have no logits of a teacher'):
        head.loss(feat, data, {})
    for sample in data:
        del sample.teacher
    head = TextFCNHead(text=text, text_branch=BALANCED, **SIX)
    with pytest.raises(ValueError, match='FrozenCLIPTeacher'):
        head.loss(feat, data, {})


@each_case('norm, dtype, bound', [
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
    flops, params = [], []
    with torch.no_grad():
        expected, found = module(feat), folded(feat)
        for conv in (folded, supervised):
            with FlopCounterMode(display=False) as counter:
                conv(feat)
            flops.append(counter.get_total_flops())
            params.append(sum(p.numel() for p in conv.parameters()))
    assert found.dtype == expected.dtype == dtype
    assert (found - expected).abs().max() < bound * expected.abs().max()
    # One convolution C -> K more.
    assert params[0] - params[1] == 6 * 8 + 6
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
                part = select_classes(whole, torch.tensor(rows))(feat)
                torch.testing.assert_close(
                    part, expected[:, rows], rtol=1e-4, atol=1e-4)


def preprocessor(**options):
    kind = dict(type='SegDataPreProcessor', size=(32, 48))
    stats = dict(mean=[100., 110., 120.], std=[50., 60., 70.])
    return MODELS.build({**kind, **stats, **options})


def test_teacher_sees_the_pictures_as_clip_does():
    teacher = FrozenCLIPTeacher(**TOY, surgery_blocks=1, scale=1.)
    assert teacher.tower._holder.network is None, 'loaded too early'
    rgb = torch.randint(0, 256, (2, 3, 32, 48)).float()
    with torch.no_grad():
        dense = FrozenCLIPViT(scale=1., **TOY)(rgb).dense(1)
    expected = F.normalize(dense, dim=1)
    # Images come as MMSegmentation loads them, BGR.
    for own in (preprocessor(bgr_to_rgb=True), preprocessor(),
                preprocessor(mean=None, std=None)):
        batch = dict(inputs=[p.byte() for p in rgb.flip(1)], data_samples=None)
        found = teacher(own(batch, False)['inputs'], own)
        assert found.keys() == {'embeddings'}
        torch.testing.assert_close(
            found['embeddings'], expected, rtol=1e-3, atol=1e-4)
        assert not found['embeddings'].requires_grad
    assert expected.shape == (2, 64, 4, 6)
    small = FrozenCLIPTeacher(**TOY, surgery_blocks=1, scale=.5)
    assert small(rgb, own)['embeddings'].shape == (2, 64, 2, 3)
    assert copy.deepcopy(teacher) is teacher
    before = teacher.checksum()
    with torch.no_grad():
        teacher.tower.positional_embedding[0, 0] += 1
    assert teacher.checksum() != before
