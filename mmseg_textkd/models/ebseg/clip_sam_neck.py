# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import List, NamedTuple, Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from .attention_layers import (AttentionLayer, FeedForward, sine_position,
                               to_tokens)
from .clip_features import CLIPFeatures


class FusedFeatures(NamedTuple):
    """What the head gets to see of a batch.

    Attributes:
        pixels (Tensor): Pixel features with shape (N, C, 4·h, 4·w), h and w
            being the size of the SAM features.
        levels (list[Tensor]): Features at half, once and twice the size of
            the SAM features, each with shape (N, C, ...).
        clip (CLIPFeatures): The CLIP tower at work on the batch.
    """

    pixels: Tensor
    levels: List[Tensor]
    clip: CLIPFeatures


@MODELS.register_module()
class CLIPSAMNeck(BaseModule):
    """Add CLIP to a feature pyramid on SAM, and decode it to pixels.

    The pyramid is that of `ViTDet <https://arxiv.org/abs/2203.16527>`_: the
    one map of SAM at strides 4 to 32. Tokens of CLIP after three depths pass
    a layer norm and a 1x1 convolution and are added at strides 8, 16, 32
    (`EBSeg <https://arxiv.org/abs/2406.09829>`_). Transformer
    layers on the coarsest map and a top-down path follow, in place of EBSeg's
    multi-scale deformable attention, which needs compiled operators; they are
    the pixel decoder of `MaskFormer <https://arxiv.org/abs/2107.06278>`_.

    Args:
        in_channels (int): Channels of the SAM features. Defaults to 256.
        clip_channels (int): Width of the CLIP tokens. Defaults to 768.
        clip_depths (Sequence[int]): After how many blocks the tokens are
            taken, for strides 8, 16, 32. Defaults to (3, 6, 9).
        channels (int): Width C. Defaults to 256.
        num_layers (int): Number of transformer layers. Defaults to 6.
        num_heads (int): Their heads. Defaults to 8.
        feedforward (int): Their inner width. Defaults to 1024.
        norm_cfg (dict): Config of the norms. Defaults to GN of 32 groups.
    """

    def __init__(
        self,
        in_channels: int = 256,
        clip_channels: int = 768,
        clip_depths: Sequence[int] = (3, 6, 9),
        channels: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        feedforward: int = 1024,
        norm_cfg: dict = dict(type='GN', num_groups=32)
    ) -> None:
        super().__init__()
        if len(clip_depths) != 3:
            raise ValueError('`clip_depths` must be three depths, but got '
                             f'{clip_depths}.')
        self.clip_depths = tuple(clip_depths)
        up, norm = nn.ConvTranspose2d, dict(norm_cfg=norm_cfg, act_cfg=None)
        twice = up(in_channels, channels, 2, 2)
        self.resize = nn.ModuleList([
            nn.Sequential(
                up(in_channels, channels, 2, 2), nn.GELU(),
                up(channels, channels, 2, 2)), twice,
            nn.Conv2d(in_channels, channels, 1),
            nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        ])
        self.lateral = nn.ModuleList(
            ConvModule(channels, channels, 1, **norm) for _ in range(4))
        self.clip_norm = nn.ModuleList(
            nn.LayerNorm(clip_channels) for _ in range(3))
        self.clip_conv = nn.ModuleList(
            nn.Conv2d(clip_channels, channels, 1) for _ in range(3))
        self.attention = nn.ModuleList(
            AttentionLayer(channels, num_heads) for _ in range(num_layers))
        self.feedforward = nn.ModuleList(
            FeedForward(channels, feedforward) for _ in range(num_layers))
        self.smooth = nn.ModuleList(
            ConvModule(channels, channels, 3, padding=1, norm_cfg=norm_cfg)
            for _ in range(3))
        self.pixel_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, sam: Tensor, clip: CLIPFeatures) -> FusedFeatures:
        """Fuse and decode.

        Args:
            sam (Tensor): SAM features with shape (N, C', h, w).
            clip (CLIPFeatures): The CLIP tower at work on the same images.

        Returns:
            FusedFeatures: What the head needs.
        """
        maps = [conv(sam) for conv in self.resize]
        for i, depth in enumerate(self.clip_depths):
            tokens = clip.level(depth).permute(0, 2, 3, 1)
            added = self.clip_conv[i](
                self.clip_norm[i](tokens).permute(0, 3, 1, 2))
            maps[i + 1] = maps[i + 1] + _resized(added, maps[i + 1])
        maps = [conv(x) for conv, x in zip(self.lateral, maps)]
        levels = [self._encode(maps[3])]
        for conv, x in zip(self.smooth, maps[2::-1]):
            levels.append(conv(x + _resized(levels[-1], x)))
        return FusedFeatures(self.pixel_conv(levels[3]), levels[:3], clip)

    def _encode(self, x: Tensor) -> Tensor:
        """Let the pixels of the coarsest map attend to each other."""
        size, tokens = x.shape[2:], to_tokens(x)
        position = sine_position(tuple(size), x.shape[1], x)
        for attention, feedforward in zip(self.attention, self.feedforward):
            tokens = feedforward(attention(tokens, position))
        return tokens.transpose(1, 2).unflatten(2, size)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Resize one map to another."""
    return F.interpolate(
        x, like.shape[2:], mode='bilinear', align_corners=False)
