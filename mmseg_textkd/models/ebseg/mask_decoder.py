# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import List, NamedTuple, Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models.utils import nchw_to_nlc
from mmseg.registry import MODELS
from torch import Tensor, nn

from .attention_layers import AttentionLayer, FeedForward, mlp, sine_position


class DecodedMasks(NamedTuple):
    """Queries and masks after one decoder layer.

    Attributes:
        queries (Tensor): Normed queries with shape (N, Q, C).
        kernels (Tensor): What the pixel features are multiplied by to get
            the masks, shape (N, Q, C).
        masks (Tensor): Mask logits with shape (N, Q, H, W).
    """

    queries: Tensor
    kernels: Tensor
    masks: Tensor


@MODELS.register_module()
class MaskDecoder(BaseModule):
    """Transformer decoder of mask queries with masked attention.

    Source: `Mask2Former <https://arxiv.org/abs/2112.01527>`_, section 3.2.

    Args:
        channels (int): Width C of features and queries. Defaults to 256.
        num_queries (int): Number of queries Q. Defaults to 100.
        num_layers (int): Number of layers. Defaults to 9.
        num_heads (int): Heads of attention. Defaults to 8.
        feedforward (int): Inner width of feed-forward networks. Defaults to
            2048.
        num_levels (int): Number of feature levels, which the layers take in
            turn. Defaults to 3.
    """

    def __init__(self,
                 channels: int = 256,
                 num_queries: int = 100,
                 num_layers: int = 9,
                 num_heads: int = 8,
                 feedforward: int = 2048,
                 num_levels: int = 3) -> None:
        super().__init__()
        self.num_heads, self.num_levels = num_heads, num_levels
        self.query = nn.Embedding(num_queries, channels)
        self.query_position = nn.Embedding(num_queries, channels)
        self.level_embed = nn.Embedding(num_levels, channels)
        self.cross_attention, self.self_attention = (
            nn.ModuleList(
                AttentionLayer(channels, num_heads) for _ in range(num_layers))
            for _ in range(2))
        self.feedforward = nn.ModuleList(
            FeedForward(channels, feedforward) for _ in range(num_layers))
        self.norm = nn.LayerNorm(channels)
        self.mask_embed = mlp(channels, channels, channels, 3)

    def forward(self, levels: Sequence[Tensor],
                pixels: Tensor) -> List[DecodedMasks]:
        """Decode masks.

        Args:
            levels (Sequence[Tensor]): Features, each with shape (N, C, ...).
            pixels (Tensor): Pixel features with shape (N, C, H, W).

        Returns:
            list[DecodedMasks]: Those of the bare queries, then of each layer.
        """
        tokens, positions = [], []
        for level, shift in zip(levels, self.level_embed.weight):
            tokens.append(nchw_to_nlc(level) + shift)
            positions.append(
                sine_position((level.shape[2], level.shape[3]), level.shape[1],
                              level))
        num = len(pixels)
        query = self.query.weight.expand(num, -1, -1)
        place = self.query_position.weight.expand(num, -1, -1)
        decoded = [self._predict(query, pixels)]
        for i, feedforward in enumerate(self.feedforward):
            at = i % self.num_levels
            query = self.cross_attention[i](query, place, tokens[at],
                                            positions[at],
                                            self._outside(
                                                decoded[-1].masks, levels[at]))
            query = feedforward(self.self_attention[i](query, place))
            decoded.append(self._predict(query, pixels))
        return decoded

    def _predict(self, query: Tensor, pixels: Tensor) -> DecodedMasks:
        """Predict masks from queries."""
        query = self.norm(query)
        kernels = self.mask_embed(query)
        masks = kernels @ pixels.flatten(2)
        return DecodedMasks(query, kernels,
                            masks.unflatten(2, pixels.shape[2:]))

    def _outside(self, masks: Tensor, level: Tensor) -> Tensor:
        """Get the attention mask of each query, True outside its mask."""
        masks = F.interpolate(
            masks.detach(),
            level.shape[2:],
            mode='bilinear',
            align_corners=False)
        outside = (masks < 0).flatten(2)
        # An empty mask looks everywhere: a softmax over nothing is NaN.
        outside = outside & ~outside.all(dim=2, keepdim=True)
        return outside.repeat_interleave(self.num_heads, dim=0)
