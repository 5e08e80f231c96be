# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import NamedTuple

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..layers import LogitScale
from .attention_layers import mlp
from .clip_features import CLIPFeatures
from .mask_decoder import DecodedMasks


class MaskEmbeddings(NamedTuple):
    """Masks and the three embeddings of each.

    Attributes:
        masks (Tensor): Mask logits with shape (N, Q, H, W).
        supervised (Tensor): A, of the learned length, shape (N, Q, D).
        attention (Tensor): B, of unit length, shape (N, Q, D).
        frozen (Tensor): D, of unit length, shape (N, Q, D).
    """

    masks: Tensor
    supervised: Tensor
    attention: Tensor
    frozen: Tensor


class MaskEmbedder(BaseModule):
    """The three embeddings of a mask (EBSeg's AdaB decoder).

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_.

    Args:
        channels (int): Width C of queries and pixel features.
        dims (int): Width D of the text.
        attention_from (int): Number of CLIP's blocks before B begins.
        surgery_blocks (int): See :meth:`CLIPFeatures.dense`.
    """

    def __init__(self, channels: int, dims: int, attention_from: int,
                 surgery_blocks: int) -> None:
        super().__init__()
        self.attention_from = attention_from
        self.surgery_blocks = surgery_blocks
        self.pool = nn.Linear(channels, channels)
        self.embed = mlp(channels, channels, dims, 3)
        self.length = LogitScale(init=1., max_scale=10.)

    def supervised(self, decoded: DecodedMasks, pixels: Tensor) -> Tensor:
        """Compute A: pixel features pooled by the mask, and the query.

        Args:
            decoded (DecodedMasks): Queries and masks of a layer.
            pixels (Tensor): Pixel features with shape (N, C, H, W).

        Returns:
            Tensor: Embeddings of the learned length, shape (N, Q, D).
        """
        pooled = self.pool(pool_by_masks(pixels, decoded.masks))
        embedding = self.embed(pooled + decoded.queries)
        return self.length() * F.normalize(embedding.float(), dim=2)

    def attention(self, masks: Tensor, clip: CLIPFeatures) -> Tensor:
        """Compute B: class tokens of frozen CLIP that attend to the mask.

        Args:
            masks (Tensor): Mask logits with shape (N, Q, H, W).
            clip (CLIPFeatures): The CLIP tower at work on the images.

        Returns:
            Tensor: Embeddings of unit length, shape (N, Q, D).
        """
        embedding = clip.mask_attention(masks, self.attention_from)
        return F.normalize(embedding.float(), dim=2)

    def frozen(self, masks: Tensor, clip: CLIPFeatures) -> Tensor:
        """Compute D: frozen CLIP features pooled by the mask.

        Args:
            masks (Tensor): Mask logits with shape (N, Q, H, W).
            clip (CLIPFeatures): The CLIP tower at work on the images.

        Returns:
            Tensor: Embeddings of unit length, shape (N, Q, D).
        """
        dense = F.normalize(clip.dense(self.surgery_blocks), dim=1)
        masks = F.interpolate(
            masks, dense.shape[2:], mode='bilinear', align_corners=False)
        return F.normalize(pool_by_masks(dense, masks).float(), dim=2)

    def forward(self, decoded: DecodedMasks, pixels: Tensor,
                clip: CLIPFeatures) -> MaskEmbeddings:
        """Compute all three, as inference needs them.

        Args:
            decoded (DecodedMasks): Queries and masks of the last layer.
            pixels (Tensor): Pixel features with shape (N, C, H, W).
            clip (CLIPFeatures): The CLIP tower at work on the images.

        Returns:
            MaskEmbeddings: The masks and their embeddings.
        """
        return MaskEmbeddings(decoded.masks, self.supervised(decoded, pixels),
                              self.attention(decoded.masks, clip),
                              self.frozen(decoded.masks, clip))


def pool_by_masks(features: Tensor, masks: Tensor) -> Tensor:
    """Average features over soft masks.

    Args:
        features (Tensor): Shape (N, C, H, W).
        masks (Tensor): Mask logits with shape (N, Q, H, W).

    Returns:
        Tensor: Averages with shape (N, Q, C).
    """
    weights = masks.float().sigmoid().flatten(2)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-6)
    return weights.to(features) @ features.flatten(2).transpose(1, 2)
