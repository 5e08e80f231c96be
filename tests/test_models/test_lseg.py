# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""LSeg's head, and what training knows of classes that it may not see."""
import copy

import pytest
import torch
import torch.nn.functional as F
from each_case import each_case
from heads import ALIGN, BALANCED, SEEN, SIX, UNSEEN, gradients, labeled
from mmengine.structures import PixelData
from tiny import CONTROL, stir

from mmseg_textkd.models import TextClassifier, TextFCNHead

pytestmark = pytest.mark.stacks

LSEG = dict(norm='l2', bias=False, regularization=dict(depth=2))
ZERO_SHOT = dict(LSEG, unseen=UNSEEN)


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


def test_head_is_cosine_then_blocks(text):
    module = stir(TextClassifier(8, 6, text, **LSEG)).eval()
    feat = torch.randn(2, 8, 5, 4)
    conv, blocks = module.projection.conv, module.regularization
    pixels = F.conv2d(feat.double(), conv.weight.double(), conv.bias.double())
    rows = module.text().double()[..., None, None]
    expected = module.scale() * F.cosine_similarity(
        pixels[:, None], rows, dim=2)
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
        blocks, none = (
            TextClassifier(8, 6, text, norm,
                           regularization=dict(depth=depth)).eval()
            for depth in (1, 0))
        with pytest.raises(ValueError, match='blocks use neighboring'):
            blocks.as_conv()
        feat = torch.randn(1, 8, 3, 3)
        torch.testing.assert_close(none.as_conv()(feat), none(feat))


@pytest.mark.parametrize('norm', ['l2', 'bn'])
@pytest.mark.parametrize('kind', ['bottleneck', 'depthwise', None])
def test_training_is_that_of_the_seen_classes_alone(text, norm, kind):
    """Losses and gradients, text losses among them."""
    options = dict(norm=norm, bias=False)
    if kind:
        options['regularization'] = dict(kind=kind)
    branch = dict(options, unseen=UNSEEN)
    weights = [1., 9., 2., 3., 9., .5]
    head = stir(
        TextFCNHead(
            text=text,
            text_branch=branch,
            text_losses=[dict(ALIGN, class_weight=weights)],
            **SIX))
    alone = TextFCNHead(
        text=CONTROL,
        text_branch=options,
        text_losses=[dict(ALIGN, class_weight=[weights[k] for k in SEEN])],
        **dict(SIX, num_classes=4))
    # Weights of the seen classes alone are theirs.
    again = [weights[k] for k in SEEN]
    again = [dict(ALIGN, class_weight=again)]
    again = TextFCNHead(
        text=text, text_branch=branch, text_losses=again, **SIX)
    for module in (head, again):
        kept, = module.text_losses
        assert kept.class_weight == [1., 2., 3., .5]
    state, key = head.state_dict(), 'conv_seg.text.class_embeddings'
    assert state[key].shape == (6, 16)
    alone.load_state_dict(dict(state, **{key: state[key][SEEN]}))
    data, feat = labeled(), torch.randn(2, 8, 4, 6)
    losses, grads = gradients(head, feat, data)
    expected, expected_grads = gradients(alone, feat, renumbered(data))
    assert len(losses) == 3
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(grads, expected_grads)
    for name, grad in grads.items():
        assert name.endswith('.scale') or grad.abs().max() > 0, name


def test_an_ignored_label_is_none_of_the_seen(text):
    """Of those without the unseen ones, 3 has its number."""
    feat, losses, state = [torch.randn(2, 8, 4, 6)], [], None
    for ignored in (2, 255):
        head = TextFCNHead(
            text=text,
            text_branch=dict(bias=False, unseen=[0]),
            text_losses=[ALIGN],
            ignore_index=ignored,
            **SIX)
        state = state or head.state_dict()
        head.load_state_dict(state)
        data = labeled([1, 3, 4, 5])
        for sample in data:
            labels = sample.gt_sem_seg.data
            labels[labels == 255] = ignored
        losses.append(head.loss(feat, data, {}))
    assert losses[0]['loss_text_align'] > 0
    torch.testing.assert_close(*losses)


@each_case('branch, losses', [(ZERO_SHOT, [ALIGN]), (BALANCED, None)])
def test_nothing_depends_on_text_that_is_unseen(text, branch, losses):
    head = TextFCNHead(
        text=text, text_branch=branch, text_losses=losses, **SIX)
    if branch is BALANCED:
        loss, = head.text_losses
        assert type(loss).__name__ == 'ImageEmbeddingDistillationLoss'
    data, feat = labeled(), torch.randn(2, 8, 4, 6)
    expected = gradients(head, feat, data)
    # Whatever is computed with a NaN becomes one.
    head.text_branch.text.class_embeddings[UNSEEN] = float('nan')
    for got, wanted in zip(gradients(head, feat, data), expected):
        for key, value in wanted.items():
            assert torch.equal(got[key], value), key
    assert expected[1]['x'].abs().max() > 0
    # In evaluation all classes compete.
    assert head.eval()([feat])[:, UNSEEN].isnan().all()


def test_text_of_each_image(text):
    module = TextClassifier(8, 6, text, **ZERO_SHOT)
    embeddings = module.projection(torch.randn(2, 8, 3, 3))
    both = torch.randn(2, 6, 16)
    close = dict(rtol=1e-4, atol=1e-5)
    for mode in (True, False):
        module.train(mode)
        out = module.classify(embeddings, both)
        for i in range(2):
            alone = module.classify(embeddings[i:i + 1], both[i])
            torch.testing.assert_close(out[i:i + 1], alone, **close)
        # Synonyms: three times the same.
        same = module.classify(embeddings, both[:1, None].repeat(1, 3, 1, 1))
        expected = module.classify(embeddings, both[0])
        torch.testing.assert_close(same, expected)


@each_case('branch', [ZERO_SHOT, dict(bias=False, unseen=UNSEEN), BALANCED])
@each_case('field', ['logits', 'features'])
def test_who_knows_of_unseen_classes_is_refused(text, branch, field):
    """Labels, and a teacher, also where only `distill_losses` look at it."""
    head = TextFCNHead(text=text, text_branch=branch, **SIX)
    feat = [torch.randn(2, 8, 4, 6)]
    head.loss(feat, labeled(), {})
    match = r'\[4\] are unseen in training .*Hide'
    with pytest.raises(ValueError, match=match):
        head.loss(feat, labeled(SEEN + [4]), {})
    data = labeled()
    data[1].teacher = PixelData(**{field: torch.randn(6, 16, 24)})
    with pytest.raises(ValueError, match='teacher .* supervise'):
        head.loss(feat, data, {})


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
