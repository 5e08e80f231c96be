# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The loss between learned and fixed text, and its place in a head."""
import pytest
import torch
from each_case import each_case
from heads import ARGS, data
from mmseg.registry import MODELS
from network_tester import samples
from tiny import BACKBONE

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


def check(provider, losses):
    """There is no loss before stage 2, and then it is that of the prompts."""
    assert 'loss_text_to_text' not in losses()
    provider.start_learning()
    provider.offset.data.normal_()
    value = losses()['loss_text_to_text']
    expected = TextToTextContrastiveLoss()(provider(), provider.base)
    assert value == expected > 0.01
    value.backward()
    assert provider.offset.grad.abs().max() > 0


def prompts(embeddings):
    return dict(type='ResidualPromptLearner', embeddings=embeddings)


REFUSED = 'prompts that learn.*ClassEmbedd'


def test_it_is_for_stage_2_of_text_kd(text):
    sites = dict(feature='backbone', convs=['decode_head.convs.0.conv'])
    score_map = dict(sites, in_channels=8, text=prompts(text))
    cfg = dict(
        type='TextKD',
        score_map=dict(score_map, projection=True),
        text_loss=dict(type='TextToTextContrastiveLoss'),
        backbone=BACKBONE,
        decode_head=dict(ARGS, type='FCNHead', in_index=0, num_classes=6))
    model = MODELS.build(cfg).train()
    images, labels = torch.randn(2, 3, 32, 64), samples((32, 64), 6)
    check(model.score_map.text, lambda: model.loss(images, labels))
    cfg['score_map']['text'] = text
    with pytest.raises(ValueError, match=REFUSED):
        MODELS.build(cfg)


def test_it_is_for_stage_2_of_prompts(text):
    args = dict(ARGS, num_classes=6)
    args['text_losses'] = [dict(type='TextToTextContrastiveLoss')]
    head = TextFCNHead(text=prompts(text), **args)
    check(head.text_branch.text, lambda: head.loss(*data(), {}))
    with pytest.raises(ValueError, match=REFUSED):
        TextFCNHead(text=text, **args).loss(*data(), {})
    with pytest.raises(ValueError, match='`temperature` must be positive'):
        TextToTextContrastiveLoss(temperature=0)
