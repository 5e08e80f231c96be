# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Text heads small enough for a test, and what their tests share."""
import torch
from mmengine.structures import PixelData
from network_tester import samples

ALIGN = dict(type='TextAlignmentLoss')
ARGS = dict(
    in_channels=8, channels=8, num_classes=4, num_convs=1, dropout_ratio=0.)
# Six classes, for the fixture `text`; two of them are never seen in training.
SIX = dict(ARGS, num_classes=6, concat_input=False, norm_cfg=dict(type='BN'))
UNSEEN, SEEN = [1, 4], [0, 2, 3, 5]
BALANCED = dict(type='BalancedTextClassifier', bias=False, unseen=UNSEEN)


def data(height=4, width=8):
    """Inputs of a head, and their labels at eight times the size."""
    torch.manual_seed(3)
    feat = torch.randn(2, 8, height, width)
    return [feat], samples((8 * height, 8 * width), 4)


def labeled(classes=SEEN):
    """Data samples with some of six classes; the others are ignored.

    They bring what an image tower says, and nothing on classes.
    """
    torch.manual_seed(1)
    out = samples((16, 24), 6)
    for sample in out:
        labels = sample.gt_sem_seg.data
        labels[~torch.isin(labels, torch.tensor(classes))] = 255
        sample.teacher = PixelData(embeddings=torch.randn(16, 4, 5))
    return out


def backward(losses):
    """Backpropagate the sum of all losses."""
    sum(v for k, v in losses.items() if 'loss' in k).backward()


def without_gradient(module):
    """Names of the parameters without a gradient."""
    return [n for n, p in module.named_parameters() if p.grad is None]


def gradients(head, feat, data):
    """Losses of a head, and the gradients of its parameters and input."""
    feat = feat.clone().requires_grad_()
    head.zero_grad()
    losses = head.loss([feat], data, {})
    backward(losses)
    grads = {n: p.grad for n, p in head.named_parameters()}
    return {k: v.detach() for k, v in losses.items()}, dict(grads, x=feat.grad)
