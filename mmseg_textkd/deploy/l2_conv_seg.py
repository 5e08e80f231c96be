# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Deployment of classifiers with ``norm='l2'``, which does not fold."""
import copy
from typing import Dict, Iterable, List, Optional

import torch
from mmseg.models import BaseSegmentor
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.models import (PixelProjection, SpatialRegularization,
                                 TextClassifier)

EPS = 1e-12  # as of torch.nn.functional.normalize


class L2ConvSeg(nn.Module):
    r"""Cosine classifier, fused into two 1x1 convolutions.

    .. math::
        z_k = \frac{w_k^T f + v_k}{\lVert R f + r \rVert} + b_k

    with :math:`w_k = s P^T t_k`, :math:`v_k = s p^T t_k`, and :math:`[R\ r]`
    the triangular factor of a QR decomposition of :math:`[P\ p]`. It has at
    most C + 1 rows and leaves all lengths as they are, so that nothing of
    width D is computed if D is larger.

    Args:
        in_channels (int): Channels C of the head's features.
        num_classes (int): Number of classes K.
        dim (int): Width D of the text embeddings.
        regularization (dict, optional): Arguments of
            :class:`SpatialRegularization`, which follows. Defaults to None.
    """

    def __init__(self,
                 in_channels: int,
                 num_classes: int,
                 dim: int,
                 regularization: Optional[dict] = None) -> None:
        super().__init__()
        self.length = nn.Conv2d(in_channels, min(dim, in_channels + 1), 1)
        self.product = nn.Conv2d(in_channels, num_classes, 1)
        self.logit_bias = nn.Parameter(torch.zeros(num_classes, 1, 1))
        self.regularization: nn.Module = nn.Identity()
        if regularization is not None:
            self.regularization = SpatialRegularization(**regularization)

    def forward(self, feat: Tensor) -> Tensor:
        """Classify each pixel.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).

        Returns:
            Tensor: Logits, float32 or wider, with shape (N, K, H, W).
        """
        # float32: the sum of squares overflows in half precision.
        dtype = torch.promote_types(feat.dtype, torch.float32)
        length = self.length(feat).to(dtype).norm(dim=1, keepdim=True)
        product = self.product(feat).to(dtype)
        logits = product / length.clamp(min=EPS) + self.logit_bias
        return self.regularization(logits)


@MODELS.register_module(name='L2ConvSegHead')
def l2_conv_seg_head(head: dict,
                     dim: int,
                     regularization: Optional[dict] = None) -> nn.Module:
    """Build a stock head with :class:`L2ConvSeg` for its ``conv_seg``.

    Args:
        head (dict): Config of the stock head.
        dim (int): Width D of the text embeddings.
        regularization (dict, optional): As of :class:`L2ConvSeg`. Defaults to
            None.

    Returns:
        nn.Module: The head.
    """
    built = MODELS.build(head)
    built.conv_seg = L2ConvSeg(built.conv_seg.in_channels, built.num_classes,
                               dim, regularization)
    return built


@torch.no_grad()
def fuse_cosine(projection: PixelProjection,
                text: Tensor,
                bias: Optional[Tensor] = None) -> Dict[str, Tensor]:
    """Compute the weights of :class:`L2ConvSeg`, in float64, cast once.

    Args:
        projection (PixelProjection): The projection, of whose output the
            cosines are taken.
        text (Tensor): Scale times unit vectors of the classes, (K, D).
        bias (Tensor, optional): Added to the logits, shape (K, ). Defaults
            to None.

    Returns:
        dict[str, Tensor]: Its state dict, without regularization.
    """
    weight, shift = projection.affine(torch.float64)
    joined = torch.cat([weight, shift[:, None]], dim=1)
    factor = torch.linalg.qr(joined, mode='r').R
    product = text.double() @ joined
    if bias is None:
        bias = text.new_zeros(len(text))
    state = {
        'length.weight': factor[:, :-1, None, None],
        'length.bias': factor[:, -1],
        'product.weight': product[:, :-1, None, None],
        'product.bias': product[:, -1],
        'logit_bias': bias[:, None, None],
    }
    return {k: v.to(projection.conv.weight.dtype) for k, v in state.items()}


def fuse_l2(classifier: TextClassifier) -> Dict[str, Tensor]:
    """Compute the weights of :class:`L2ConvSeg` for a text classifier.

    Args:
        classifier (TextClassifier): A classifier with ``norm='l2'``.

    Returns:
        dict[str, Tensor]: Its state dict.
    """
    with torch.no_grad():
        text = classifier.scale().double() * classifier.text().double()
    state = fuse_cosine(classifier.projection, text, classifier.logit_bias)
    if classifier.regularization is not None:
        state.update(
            classifier.regularization.state_dict(prefix='regularization.'))
    return state


@torch.no_grad()
def mean_lengths(model: BaseSegmentor,
                 batches: Iterable[dict]) -> Dict[str, float]:
    """Measure the mean length of the pixel embeddings before their L2 norm.

    Args:
        model (nn.Module): The model, in evaluation mode.
        batches (Iterable[dict]): What its data loader yields.

    Returns:
        dict[str, float]: Means by the name of the classifier.
    """
    lengths: Dict[str, List[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if (isinstance(module, TextClassifier)
                and module.projection.norm == 'l2'):
            values = lengths[name] = []
            handles.append(
                module.projection.conv.register_forward_hook(
                    lambda module, args, output, values=values: values.append(
                        output.float().norm(dim=1).mean())))
    try:
        for batch in batches:
            model.test_step(copy.deepcopy(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: torch.stack(values).mean().item()
        for name, values in lengths.items() if values
    }


def fold_with_length(classifier: TextClassifier, length: float) -> nn.Conv2d:
    """Fold an L2 classifier as if all pixel embeddings had one length.

    Args:
        classifier (TextClassifier): A classifier with ``norm='l2'``.
        length (float): The length.

    Returns:
        nn.Conv2d: C -> K, float64.
    """
    linear = copy.deepcopy(classifier).double()
    linear.projection.norm = 'none'
    for param in linear.projection.conv.parameters():
        param.data /= length
    return linear.as_conv()
