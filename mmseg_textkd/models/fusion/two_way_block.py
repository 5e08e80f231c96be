# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Tuple

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models.utils import InvertedResidual
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention without projections.

    Args:
        query (Tensor): Shape (N, Q, d).
        key (Tensor): Shape (N, L, d).
        value (Tensor): Shape (N, L, d).
        heads (int): Number of heads, which divides d.

    Returns:
        Tensor: Shape (N, Q, d).
    """
    split = (
        x.unflatten(2, (heads, -1)).transpose(1, 2)
        for x in (query, key, value))
    found = F.scaled_dot_product_attention(*split)
    return found.transpose(1, 2).flatten(2)


class TwoWayBlock(BaseModule):
    """Block of convolutions and a transformer with bridges both ways.

    The tokens attend to the map, then to each other; the map goes through a
    convolution, then attends to the tokens. Everything is residual. Of
    either attention over the bridge only the side of the tokens is
    projected, as in `Mobile-Former <https://arxiv.org/abs/2108.05895>`_: a
    projection of K tokens costs nothing, one of all pixels as much as a
    convolution.

    Args:
        width (int): Width d of map and tokens.
        num_heads (int): Number of heads, which divides d.
        ffn_ratio (int): Hidden width of the tokens' FFN over d.
        norm_cfg (dict, optional): Norm of the convolutions.
    """

    def __init__(self, width: int, num_heads: int, ffn_ratio: int,
                 norm_cfg: Optional[dict]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_query = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.gathered = nn.Linear(width, width)
        self.norm_self = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, ffn_ratio * width),
            nn.GELU(), nn.Linear(ffn_ratio * width, width))
        # Depthwise 3x3 and pointwise; it adds its input itself.
        self.conv = InvertedResidual(
            width,
            width,
            stride=1,
            expand_ratio=1,
            norm_cfg=norm_cfg or dict(type='BN'),
            act_cfg=dict(type='ReLU'))
        self.norm_told = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tuple[Tensor, Tensor]:
        """Update map and tokens.

        Args:
            pixels (Tensor): Map with shape (N, d, h, w).
            tokens (Tensor): One token a class, shape (N, K, d).

        Returns:
            tuple[Tensor, Tensor]: The same, changed.
        """
        heads, flat = self.num_heads, pixels.flatten(2).transpose(1, 2)
        query = self.query(self.norm_query(tokens))
        tokens = tokens + self.gathered(attend(query, flat, flat, heads))
        query, key, value = self.qkv(self.norm_self(tokens)).chunk(3, dim=2)
        tokens = tokens + self.mixed(attend(query, key, value, heads))
        tokens = tokens + self.ffn(tokens)

        pixels = self.conv(pixels)
        key, value = self.key_value(self.norm_told(tokens)).chunk(2, dim=2)
        flat = pixels.flatten(2).transpose(1, 2)
        update = attend(flat, key, value, heads)
        return pixels + update.transpose(1, 2).reshape(pixels.shape), tokens
