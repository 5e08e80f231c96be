# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The loss between learned and fixed text, and its place in a head."""
import pytest
import torch
from each_case import each_case
from mmseg.registry import MODELS
from network_tester import samples

from mmseg_textkd.models import TextFCNHead
from mmseg_textkd.models.losses import TextToTextContrastiveLoss

LEARNED = [[.9, .2, -.3, .1], [.1, .8, .4, -.2], [-.5, .3, .6, .7]]
FIXED = [[.8, .3, -.1, .2], [.3, .6, .5, .1], [-.1, .2, .9, .4]]


@each_case('temperature, value, gradient', [
    (.07, .0019228137, [5.27434386e-05, -.00471810857, .00090513518]),
    (.5, .43055975, [.0141155273, .00885931402, .0589211807]),
])
def test_published_loss(temperature, value, gradient):
    """Value and gradient of Text2TextContrastiveLoss @ d89be68."""
    learned = torch.tensor(LEARNED, requires_grad=True)
    loss = TextToTextContrastiveLoss(temperature, loss_weight=2.)
    got = loss(learned, torch.tensor(FIXED))
    assert got.item() / 2 == pytest.approx(value, rel=1e-5)
    got.backward()
    torch.testing.assert_close(learned.grad[:, 0] / 2, torch.tensor(gradient))


def test_it_is_for_stage_2_of_text_kd(make_embeddings):
    fixed = dict(type='ClassEmbeddings', file=make_embeddings(4, 16))
    norm_cfg = dict(type='BN')
    cfg = dict(
        type='TextKD',
        score_map=dict(
            in_channels=8,
            projection=True,
            text=dict(type='ResidualPromptLearner', embeddings=fixed)),
        text_loss=dict(type='TextToTextContrastiveLoss'),
        backbone=dict(
            type='BiSeNetV2',
            detail_channels=(4, 4, 8),
            semantic_channels=(4, 4, 8, 8),
            semantic_expansion_ratio=1,
            bga_channels=8,
            norm_cfg=norm_cfg),
        decode_head=dict(
            type='FCNHead',
            in_channels=8,
            in_index=0,
            channels=8,
            num_convs=1,
            num_classes=4,
            norm_cfg=norm_cfg))
    model = MODELS.build(cfg).train()
    provider = model.score_map.text
    images, data = torch.randn(2, 3, 32, 64), samples((32, 64), 4)
    assert 'loss_text_to_text' not in model.loss(images, data)
    provider.start_learning()
    provider.offset.data.normal_()
    value = model.loss(images, data)['loss_text_to_text']
    assert value == TextToTextContrastiveLoss()(provider(), provider.base) > 0
    cfg['score_map']['text'] = fixed
    with pytest.raises(ValueError, match='prompts that learn.*ClassEmbedd'):
        MODELS.build(cfg)


def test_it_is_for_stage_2_of_prompts(make_embeddings):
    fixed = dict(type='ClassEmbeddings', file=make_embeddings(4, 16))
    args = dict(
        in_channels=8,
        channels=8,
        num_classes=4,
        num_convs=1,
        text_losses=[dict(type='TextToTextContrastiveLoss')])
    head = TextFCNHead(
        text=dict(type='ResidualPromptLearner', embeddings=fixed), **args)
    provider, = (m for m in head.modules() if hasattr(m, 'offset'))
    features, data = [torch.randn(2, 8, 4, 8)], samples((32, 64), 4)
    assert 'loss_text_to_text' not in head.loss(features, data, {})
    provider.start_learning()
    provider.offset.data.normal_()
    value = head.loss(features, data, {})['loss_text_to_text']
    expected = TextToTextContrastiveLoss()(provider(), provider.base)
    assert value == expected > 0.01
    value.backward()
    assert provider.offset.grad.abs().max() > 0
    with pytest.raises(ValueError, match='prompts that learn.*ClassEmbedd'):
        TextFCNHead(text=fixed, **args).loss(features, data, {})
    with pytest.raises(ValueError, match='`temperature` must be positive'):
        TextToTextContrastiveLoss(temperature=0)
