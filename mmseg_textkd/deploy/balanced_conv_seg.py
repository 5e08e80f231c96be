# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Folding of a balanced text classifier into two 1x1 convolutions."""
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmseg_textkd.models import BalancedTextClassifier
from mmseg_textkd.models.layers.balance import balance_log_probabilities


class BalancedConvSeg(nn.Module):
    r"""Folded classifier, balanced with distilled CLIP logits.

    .. math::
        \log p_k = (1 - \lambda_k) \log \mathrm{softmax}(z)_k +
        \lambda_k \log \mathrm{softmax}(v)_k

    with z of the classifier, v of the convolution, and :math:`\lambda_k`
    :math:`\alpha` for classes that were seen in training, else :math:`\beta`.
    See :class:`BalancedTextClassifier`.

    Args:
        supervised (nn.Module): The folded classifier: a 1x1 convolution
            C -> K or, with an L2 norm, a :class:`L2ConvSeg`.
        image (nn.Conv2d): 1x1 convolution C -> K.
        seen (Sequence[bool]): For each class whether it was seen in training.
        alpha (float): Exponent of CLIP, seen classes.
        beta (float): Exponent of CLIP, unseen classes.
    """

    seen: Tensor

    def __init__(self, supervised: nn.Module, image: nn.Conv2d,
                 seen: Sequence[bool], alpha: float, beta: float) -> None:
        super().__init__()
        self.supervised, self.image = supervised, image
        self.alpha, self.beta = alpha, beta
        self.register_buffer('seen',
                             torch.tensor(seen, device=image.weight.device))
        # Sums over all classes, cached for the last features, of inference
        # on some classes at a time.
        self.totals: Optional[Tuple[Any, List[Tensor]]] = None

    def forward(self, feat: Tensor) -> Tensor:
        """Classify each pixel.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).

        Returns:
            Tensor: Scores, float32 or wider, with shape (N, K, H, W).
        """
        dtype = torch.promote_types(feat.dtype, torch.float32)
        supervised, image = (
            conv(feat).to(dtype).log_softmax(dim=1)
            for conv in (self.supervised, self.image))
        return balance_log_probabilities(supervised, image, self.seen,
                                         self.alpha, self.beta)


def fold_balanced(classifier: BalancedTextClassifier,
                  supervised: nn.Module,
                  seen: Sequence[bool],
                  text: Optional[Tensor] = None) -> nn.Module:
    """Fold the image projection beside a folded classifier.

    Args:
        classifier (BalancedTextClassifier): The classifier, in evaluation
            mode.
        supervised (nn.Module): Its supervised part, folded for K classes.
        seen (Sequence[bool]): For each class whether it was seen in training.
        text (Tensor, optional): Embeddings of the K classes, unit rows with
            shape (K, D). Defaults to None: those of the training.

    Returns:
        nn.Module: A :class:`BalancedConvSeg`; ``supervised`` itself where
        all classes were seen, or with both exponents 0.
    """
    if all(seen) or not any(classifier.balance.values()):
        return supervised
    return BalancedConvSeg(supervised, classifier.image_conv(text), seen,
                           **classifier.balance)
