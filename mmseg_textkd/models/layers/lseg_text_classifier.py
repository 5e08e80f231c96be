# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict, Optional

import torch
from mmseg.registry import MODELS
from torch import Tensor

from .similarity import pixel_text_similarity
from .text_classifier import TextClassifier


@MODELS.register_module()
class LSegTextClassifier(TextClassifier):
    """``TextClassifier`` with the precision of the code of LSeg's authors.

    In evaluation mode pixel embeddings, text and products are rounded to half
    precision, as in their code. With 150 classes many products are then
    equal, and which one is the largest depends on it. Training is in full
    precision, which theirs is not.

    For episodes (:class:`LSegEpisodeHead`) each image has two classes of its
    own: row 0 of the text, the others, and the row in question.

    Args:
        *args: Arguments of :class:`TextClassifier`. The norm is 'l2', there
            is no bias, and the scale is 1 / 0.07, not learned.
        half_precision (bool): Whether to round. Defaults to True.
        **kwargs: Further ones.
    """

    def __init__(self,
                 *args: Any,
                 half_precision: bool = True,
                 **kwargs: Any) -> None:
        fixed: Dict[str, Any] = dict(
            norm='l2', bias=False, scale=dict(init=1 / 0.07, learnable=False))
        # Not merged before: what is given twice is an error.
        super().__init__(*args, **dict(**fixed, **kwargs))
        self.half_precision = half_precision
        # Numbers of the classes of a batch, while an episode lasts.
        self.episode: Optional[Tensor] = None

    @property
    def left_out(self) -> Dict[str, Any]:
        """dict: No rounding, which no stock model does."""
        return dict(half_precision=False) if self.half_precision else {}

    def forward(self, feat: Tensor) -> Tensor:
        """Classify each pixel.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).

        Returns:
            Tensor: Logits with shape (N, K, H, W), or (N, 2, H, W) in an
            episode.
        """
        if self.episode is None:
            return super().forward(feat)
        mine = self.episode.to(feat.device) + 1
        rows = torch.stack([torch.zeros_like(mine), mine], dim=1)
        return self.classify(
            self.projection(feat),
            self.text(feat.shape[0])[rows])

    def classify(self,
                 embeddings: Tensor,
                 text: Tensor,
                 products: Optional[Tensor] = None) -> Tensor:
        """Compare pixel embeddings with class embeddings.

        Args:
            embeddings (Tensor): Pixel embeddings, shape (N, D, H, W).
            text (Tensor): Class embeddings with unit rows, shape (K, D) or,
                for each image its own, (N, K, D).
            products (Tensor, optional): See :class:`TextClassifier`. Defaults
                to None.

        Returns:
            Tensor: Logits, float32, with shape (N, K, H, W).
        """
        if self.training or not self.half_precision:
            return super().classify(embeddings, text, products)
        with torch.autocast(embeddings.device.type, enabled=False):
            # The products are summed in float32, as a GPU does it.
            pixels = (self.scale() * embeddings.half()).float()
            logits = pixel_text_similarity(pixels, text.half().float())
            if products is not None:
                logits = logits + (self.scale() * products).float()
            logits = logits.half().float()
            if self.regularization is not None:
                logits = self.regularization(logits)
        return logits
