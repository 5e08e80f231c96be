# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmseg_textkd.clip.clip_features import CLIPFeatures
from .attention_layers import mlp
from .mask_decoder import DecodedMasks


class MaskEmbeddings(NamedTuple):
    """Masks and the three embeddings of each.

    Attributes:
        masks (Tensor): Mask logits with shape (N, Q, H, W).
        supervised (Tensor): A, of the learned length, shape (N, Q, D).
        attention (Tensor): B, of unit length, shape (N, Q, D).
        frozen (Tensor): D, an average over the mask and so no longer than 1,
            0 for an empty mask, shape (N, Q, D).
        image (tuple[int, int]): See :class:`FusedFeatures`.
        size (tuple[int, int]): Height and width at which scores are wanted.
    """

    masks: Tensor
    supervised: Tensor
    attention: Tensor
    frozen: Tensor
    image: Tuple[int, int]
    size: Tuple[int, int]


class MaskEmbedder(BaseModule):
    """Three embeddings of each mask (AdaB decoder of EBSeg).

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_.

    Args:
        channels (int): Width C of queries and pixel features.
        dims (int): Width D of the text.
        attention_from (int): Number of CLIP's blocks before B begins.
        attention_heads (int): Number of heads of CLIP's image tower.
        surgery_blocks (int): See :meth:`CLIPFeatures.dense`.
    """

    def __init__(self, channels: int, dims: int, attention_from: int,
                 attention_heads: int, surgery_blocks: int) -> None:
        super().__init__()
        self.attention_from = attention_from
        self.attention_heads = attention_heads
        self.surgery_blocks = surgery_blocks
        self.pool = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels))
        self.embed = mlp(channels, channels, dims, 3)
        self.length = nn.Parameter(torch.ones([]))
        self.bias = mlp(channels, channels, channels * attention_heads, 3)
        self.bias_scale = nn.Linear(1, 1)

    def supervised(self, decoded: DecodedMasks, pixels: Tensor) -> Tensor:
        """Compute A: pixel features pooled by the mask, and the query.

        Args:
            decoded (DecodedMasks): Queries and masks of a layer.
            pixels (Tensor): Pixel features with shape (N, C, H, W).

        Returns:
            Tensor: Embeddings of the learned length, shape (N, Q, D).
        """
        pooled = self.pool(pool_by_masks(pixels, decoded.masks).to(pixels))
        embedding = self.embed(pooled + decoded.queries)
        return self.length.clamp(max=10) * F.normalize(
            embedding.float(), dim=2)

    def attention(self, decoded: Sequence[DecodedMasks], pixels: Tensor,
                  clip: CLIPFeatures) -> List[Tensor]:
        """Compute B: class tokens of frozen CLIP that attend to the mask.

        Args:
            decoded (Sequence[DecodedMasks]): Queries and masks of layers.
            pixels (Tensor): Pixel features with shape (N, C, H, W).
            clip (CLIPFeatures): The CLIP tower at work on the images.

        Returns:
            list[Tensor]: For each layer embeddings of unit length, shape
            (N, Q, D).
        """
        hidden = self.bias[:-1](pixels.flatten(2).transpose(1, 2))
        return [
            F.normalize(
                clip.mask_attention(
                    self._attention_bias(layer.kernels, hidden).unflatten(
                        3, pixels.shape[2:]), self.attention_from).float(),
                dim=2) for layer in decoded
        ]

    def _attention_bias(self, kernels: Tensor, hidden: Tensor) -> Tensor:
        """Compute the bias of CLIP's attention logits, (N, heads, Q, pixels).

        Masks of other pixel features, those of a perceptron, for each head.
        Its last layer is multiplied by the kernels first: the features of all
        heads, (N, heads, C, pixels), need not be there then.
        """
        heads = self.attention_heads
        last: Any = self.bias[-1]
        kernels = (kernels * self.bias_scale.weight)[:, None]
        weight = last.weight.unflatten(0, (heads, -1))
        shift = kernels @ last.bias.view(heads, -1, 1) + self.bias_scale.bias
        return kernels @ weight @ hidden.transpose(1, 2)[:, None] + shift

    def frozen(self, masks: Tensor, clip: CLIPFeatures) -> Tensor:
        """Compute D: frozen CLIP features pooled by the mask.

        Args:
            masks (Tensor): Mask logits with shape (N, Q, H, W).
            clip (CLIPFeatures): The CLIP tower at work on the images.

        Returns:
            Tensor: Averages of vectors of unit length, shape (N, Q, D).
        """
        dense = F.normalize(clip.dense(self.surgery_blocks).float(), dim=1)
        masks = F.interpolate(
            masks, dense.shape[2:], mode='bilinear', align_corners=False)
        return pool_by_masks(dense, masks)

    def forward(self, decoded: DecodedMasks, pixels: Tensor,
                clip: CLIPFeatures, image: Tuple[int, int],
                size: Tuple[int, int]) -> MaskEmbeddings:
        """Compute all three, as inference needs them.

        Args:
            decoded (DecodedMasks): Queries and masks of the last layer.
            pixels (Tensor): Pixel features with shape (N, C, H, W).
            clip (CLIPFeatures): The CLIP tower at work on the images.
            image (tuple[int, int]): See :class:`FusedFeatures`.
            size (tuple[int, int]): See :class:`MaskEmbeddings`.

        Returns:
            MaskEmbeddings: The masks and their embeddings.
        """
        attention, = self.attention([decoded], pixels, clip)
        return MaskEmbeddings(decoded.masks,
                              self.supervised(decoded, pixels), attention,
                              self.frozen(decoded.masks, clip), image, size)


def pool_by_masks(features: Tensor, masks: Tensor) -> Tensor:
    """Average features over the pixels whose mask logit is positive.

    Masks get no gradient. In float32 or wider.

    Args:
        features (Tensor): Shape (N, C, H, W).
        masks (Tensor): Mask logits with shape (N, Q, H, W).

    Returns:
        Tensor: Averages with shape (N, Q, C), 0 for an empty mask.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    inside = (masks > 0).flatten(2).to(features)
    with torch.autocast(features.device.type, enabled=False):
        inside = inside / inside.sum(dim=2, keepdim=True).clamp(min=1)
        return inside @ features.flatten(2).transpose(1, 2)
