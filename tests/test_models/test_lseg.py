# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""LSeg's head, and what training knows of classes that it may not see."""
import copy

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from mmengine.structures import PixelData
from mmseg.models.decode_heads import DPTHead
from mmseg.registry import MODELS
from network_tester import samples
from torch import nn

from mmseg_textkd.models import TextClassifier, TextFCNHead

pytestmark = pytest.mark.stacks

UNSEEN, SEEN = [1, 4], [0, 2, 3, 5]
NAMES = tuple('abcdef')
LSEG = dict(norm='l2', bias=False, regularization=dict(depth=2))
ARGS = dict(
    in_channels=8,
    channels=8,
    num_classes=6,
    num_convs=1,
    concat_input=False,
    dropout_ratio=0.,
    norm_cfg=dict(type='BN'))


@pytest.fixture
def text(make_embeddings):
    return dict(type='ClassEmbeddings', file=make_embeddings(6, 16, NAMES))


def perturbed(module):
    """Leave nothing at its neutral start value."""
    with torch.no_grad():
        for param in module.parameters():
            param.add_(.3 * torch.randn_like(param))
    return module


def labeled(classes, size=(16, 24)):
    """Data samples with some of six classes; the others are ignored."""
    torch.manual_seed(1)
    out = samples(size, 6)
    for sample in out:
        labels = sample.gt_sem_seg.data
        labels[~torch.isin(labels, torch.tensor(classes))] = 255
    return out


def renumbered(data):
    """The same with the seen classes as 0, 1, 2, ..."""
    data = copy.deepcopy(data)
    for sample in data:
        labels = sample.gt_sem_seg.data
        new = torch.full_like(labels, 255)
        for index, k in enumerate(SEEN):
            new[labels == k] = index
        sample.gt_sem_seg.data = new
    return data


def gradients(head, feat, data):
    """Losses of a head, and the gradients of its parameters and input."""
    feat = feat.clone().requires_grad_()
    head.zero_grad()
    losses = head.loss([feat], data, {})
    sum(v for k, v in losses.items() if k.startswith('loss')).backward()
    grads = {n: p.grad for n, p in head.named_parameters()}
    return {k: v.detach() for k, v in losses.items()}, dict(grads, x=feat.grad)


def test_head_is_cosine_then_blocks(text):
    module = perturbed(TextClassifier(8, 6, text, **LSEG)).eval()
    feat = torch.randn(2, 8, 5, 4)
    conv, blocks = module.projection.conv, module.regularization
    pixels = torch.einsum('dc,nchw->nhwd', conv.weight[:, :, 0, 0].double(),
                          feat.double())
    pixels = (pixels + conv.bias)[..., None, :]
    cosines = F.cosine_similarity(pixels, module.text().double(), dim=-1)
    expected = module.scale() * cosines.permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            module(feat).double(), blocks(expected), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(module(feat).double(), expected, atol=.1)
        with torch.autocast('cpu', torch.bfloat16):
            assert module(feat).dtype == torch.float32
        module.regularization = None
        torch.testing.assert_close(
            module(feat).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_has_blocks_is_not_folded(text):
    for norm in ('bn', 'none'):
        module = TextClassifier(
            8, 6, text, norm, regularization=dict(depth=1)).eval()
        with pytest.raises(ValueError, match='blocks use neighboring'):
            module.as_conv()
        module = TextClassifier(
            8, 6, text, norm, regularization=dict(depth=0)).eval()
        feat = torch.randn(1, 8, 3, 3)
        torch.testing.assert_close(module.as_conv()(feat), module(feat))


def test_labels_permute_and_repeat(text):
    """The blocks treat all labels alike, whatever their number."""
    head = perturbed(TextFCNHead(text=text, text_branch=LSEG, **ARGS)).eval()
    feat = [torch.randn(1, 8, 6, 6)]
    state, key = head.state_dict(), 'conv_seg.text.class_embeddings'

    def logits(rows):
        other = TextFCNHead(
            text=dict(type='ClassEmbeddings', file='none', dim=16),
            text_branch=LSEG,
            **dict(ARGS, num_classes=len(rows))).eval()
        other.load_state_dict(dict(state, **{key: state[key][rows]}))
        with torch.no_grad():
            return other(feat)

    with torch.no_grad():
        expected = head(feat)
    order = [3, 0, 5, 2, 1, 4]
    torch.testing.assert_close(logits(order), expected[:, order])
    twice = logits([1, 1, 4])
    assert torch.equal(twice[:, 0], twice[:, 1])
    torch.testing.assert_close(logits([4, 1]), twice[:, [2, 0]])


@pytest.mark.parametrize('norm', ['l2', 'bn'])
@pytest.mark.parametrize('kind', ['bottleneck', 'depthwise', None])
def test_training_is_that_of_the_seen_classes_alone(text, norm, kind):
    """Losses and gradients, text losses among them."""
    options = dict(norm=norm, bias=False)
    if kind:
        options['regularization'] = dict(kind=kind)
    more = dict(text_losses=[dict(type='TextAlignmentLoss')])
    head = TextFCNHead(
        text=text, text_branch=dict(options, unseen=UNSEEN), **more, **ARGS)
    head = perturbed(head)
    alone = TextFCNHead(
        text=dict(type='ControlEmbeddings', kind='random', dim=16),
        text_branch=options,
        **more,
        **dict(ARGS, num_classes=4))
    state = head.state_dict()
    key = 'conv_seg.text.class_embeddings'
    assert state[key].shape == (6, 16)
    alone.load_state_dict(dict(state, **{key: state[key][SEEN]}))
    data, feat = labeled(SEEN), torch.randn(2, 8, 4, 6)
    losses, grads = gradients(head, feat, data)
    expected, expected_grads = gradients(alone, feat, renumbered(data))
    assert losses.keys() == expected.keys() and len(losses) == 3
    torch.testing.assert_close(losses, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])
        assert name.endswith('.scale') or grad.abs().max() > 0, name


def test_nothing_depends_on_text_that_is_unseen(text):
    head = TextFCNHead(
        text=text,
        text_branch=dict(LSEG, unseen=UNSEEN),
        text_losses=[dict(type='TextAlignmentLoss')],
        **ARGS)
    data, feat = labeled(SEEN), torch.randn(2, 8, 4, 6)
    expected = gradients(head, feat, data)
    # Whatever is computed with a NaN becomes one.
    head.text_branch.text.class_embeddings[UNSEEN] = float('nan')
    losses, grads = gradients(head, feat, data)
    for got, wanted in zip((losses, grads), expected):
        for key, value in wanted.items():
            assert torch.equal(got[key], value), key
    head.eval()
    with torch.no_grad():
        logits = head([feat])
    assert logits[:, UNSEEN].isnan().all()


def test_learned_prompts_of_unseen_classes_stay(text):
    head = TextFCNHead(
        text=dict(type='ResidualPromptLearner', embeddings=text),
        text_branch=dict(LSEG, unseen=UNSEEN),
        **ARGS)
    head.text_branch.text.start_learning()
    _, grads = gradients(head, torch.randn(2, 8, 4, 6), labeled(SEEN))
    (grad, ) = (g for n, g in grads.items() if '.text.' in n)
    assert (grad[UNSEEN] == 0).all()
    assert (grad[SEEN].abs().amax(1) > 0).all()


def test_hidden_logits_have_no_probability(text):
    head = TextFCNHead(
        text=text, text_branch=dict(LSEG, unseen=UNSEEN), **ARGS)
    logits = head([torch.randn(1, 8, 4, 6)])
    assert logits.shape == (1, 6, 4, 6)
    resized = F.interpolate(logits, scale_factor=3.7, mode='bilinear')
    share = resized.softmax(1)
    assert resized.isfinite().all()
    assert (share[:, UNSEEN] == 0).all() and (share[:, SEEN] > 0).all()
    # In evaluation all classes compete.
    head.eval()
    assert (head([torch.randn(1, 8, 4, 6)])[:, UNSEEN] > -100).all()
    assert not [k for k in head.state_dict() if 'seen' in k]


def test_text_of_each_image(text):
    module = TextClassifier(8, 6, text, **LSEG, unseen=UNSEEN)
    feat = torch.randn(2, 8, 3, 3)
    embeddings = module.projection(feat)
    both = torch.randn(2, 6, 16)
    for mode in (True, False):
        module.train(mode)
        out = module.classify(embeddings, both)
        for i in range(2):
            torch.testing.assert_close(
                out[i:i + 1],
                module.classify(embeddings[i:i + 1], both[i]),
                rtol=1e-4,
                atol=1e-5)
        # Synonyms: three times the same.
        torch.testing.assert_close(
            module.classify(embeddings, both[:1, None].repeat(1, 3, 1, 1)),
            module.classify(embeddings, both[0]))


def test_labels_that_ought_to_be_hidden_are_an_error(text):
    head = TextFCNHead(
        text=text, text_branch=dict(LSEG, unseen=UNSEEN), **ARGS)
    feat = [torch.randn(2, 8, 4, 6)]
    head.loss(feat, labeled(SEEN), {})
    with pytest.raises(
            ValueError, match=r"\[4\] are unseen in training .*Hide"):
        head.loss(feat, labeled(SEEN + [4]), {})


def test_a_teacher_of_all_classes_is_refused(text):
    head = TextFCNHead(
        text=text,
        text_branch=dict(LSEG, unseen=UNSEEN),
        text_losses=[dict(type='TextAlignmentLoss')],
        **ARGS)
    data = labeled(SEEN)
    data[1].teacher = PixelData(logits=torch.randn(6, 16, 24))
    with pytest.raises(ValueError, match='teacher .* supervise'):
        head.loss([torch.randn(2, 8, 4, 6)], data, {})


@each_case('options, match', [
    (dict(unseen=[6]), '0 to 5, and not all, but got'),
    (dict(unseen=[-1]), '0 to 5, and not all'),
    (dict(unseen=range(6)), 'and not all'),
    (dict(unseen=[1], bias=True), 'set bias=False'),
    (dict(regularization=dict(kind='x')), "but got 'x'"),
])
def test_bad_options(text, options, match):
    with pytest.raises(ValueError, match=match):
        TextClassifier(8, 6, text, **dict(dict(bias=False), **options))


DPT = dict(
    in_channels=(16, ) * 4,
    channels=8,
    embed_dims=16,
    post_process_channels=[4, 8, 8, 16],
    num_classes=6,
    readout_type='project',
    input_transform='multiple_select',
    in_index=(0, 1, 2, 3),
    dropout_ratio=0.,
    norm_cfg=dict(type='BN'))


def test_dpt_head_is_the_stock_one_up_to_its_classifier(text):
    head = MODELS.build(
        dict(type='TextDPTHead', text=text, text_branch=LSEG, **DPT)).eval()
    stock = DPTHead(**DPT).eval()
    left = [k for k in head.state_dict() if not k.startswith('conv_seg.')]
    assert left == [k for k in stock.state_dict() if k[:8] != 'conv_seg']
    stock.load_state_dict(head.state_dict(), strict=False)
    stock.conv_seg = nn.Identity()
    tokens = [[torch.randn(2, 16, 4, 6), torch.randn(2, 16)] for _ in range(4)]
    with torch.no_grad():
        out = head(tokens)
        torch.testing.assert_close(out, head.conv_seg(stock(tokens)))
    assert out.shape == (2, 6, 32, 48)
