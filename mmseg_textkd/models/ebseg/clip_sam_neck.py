# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmseg.models.utils import nchw_to_nlc
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.clip.clip_features import CLIPFeatures
from .attention_layers import DeformableAttention, FeedForward, sine_position


class FusedFeatures(NamedTuple):
    """Inputs of the head.

    Attributes:
        pixels (Tensor): Pixel features with shape (N, C, 4·h, 4·w), h and w
            being the size of the SAM features.
        levels (list[Tensor]): Features at half, once and twice the size of
            the SAM features, each with shape (N, C, ...).
        clip (CLIPFeatures): The CLIP tower at work on the batch.
        image (tuple[int, int]): Height and width of the images, in pixels,
            without what they were padded by on the right and at the bottom.
    """

    pixels: Tensor
    levels: List[Tensor]
    clip: CLIPFeatures
    image: Tuple[int, int]


@MODELS.register_module()
class CLIPSAMNeck(BaseModule):
    """Neck that fuses features of SAM and CLIP, with a pixel decoder.

    Tokens of CLIP after three depths pass a layer norm and a 1x1 convolution
    and are added to SAM's features at strides 8, 16, 32 (`EBSeg
    <https://arxiv.org/abs/2406.09829>`_). Layers of multi-scale deformable
    attention on these, and a top-down step to stride 4, are the pixel decoder
    of `Mask2Former <https://arxiv.org/abs/2112.01527>`_. In float32 or wider.

    Args:
        in_channels (int): Channels of the SAM features. Defaults to 768.
        clip_channels (int): Width of the CLIP tokens. Defaults to 768.
        clip_depths (Sequence[int]): After how many blocks the tokens are
            taken, for strides 8, 16, 32. Defaults to (3, 6, 9).
        channels (int): Width C. Defaults to 256.
        num_layers (int): Number of layers of attention. Defaults to 6.
        num_heads (int): Their heads. Defaults to 8.
        num_points (int): Sampling points of a head in each level. Defaults
            to 4.
        feedforward (int): Their inner width. Defaults to 1024.
        norm_cfg (dict): Config of the norms. Defaults to GN of 32 groups.

    Raises:
        ValueError: If there are not three depths.
    """

    def __init__(
        self,
        in_channels: int = 768,
        clip_channels: int = 768,
        clip_depths: Sequence[int] = (3, 6, 9),
        channels: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward: int = 1024,
        norm_cfg: dict = dict(type='GN', num_groups=32)
    ) -> None:
        super().__init__()
        if len(clip_depths) != 3:
            raise ValueError('`clip_depths` must be three depths, but got '
                             f'{clip_depths}.')
        self.clip_depths = tuple(clip_depths)
        self.clip_norm = nn.ModuleList(
            nn.LayerNorm(clip_channels, eps=1e-6) for _ in range(3))
        self.clip_conv = nn.ModuleList(
            nn.Conv2d(clip_channels, in_channels, 1) for _ in range(3))
        # Of strides 4 to 32; what is attended to has a bias.
        self.lateral = nn.ModuleList(
            ConvModule(
                in_channels,
                channels,
                1,
                bias=i > 0,
                norm_cfg=norm_cfg,
                act_cfg=None) for i in range(4))
        self.level_embed = nn.Parameter(torch.randn(3, channels))
        self.attention = nn.ModuleList(
            DeformableAttention(channels, num_heads, 3, num_points)
            for _ in range(num_layers))
        self.feedforward = nn.ModuleList(
            FeedForward(channels, feedforward) for _ in range(num_layers))
        self.smooth = ConvModule(
            channels, channels, 3, padding=1, norm_cfg=norm_cfg)
        self.pixel_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, sam: Sequence[Tensor], clip: CLIPFeatures,
                image: Tuple[int, int]) -> FusedFeatures:
        """Fuse and decode.

        Args:
            sam (Sequence[Tensor]): SAM features at strides 4, 8, 16 and 32,
                each with shape (N, C', ...).
            clip (CLIPFeatures): The CLIP tower at work on the same images.
            image (tuple[int, int]): See :class:`FusedFeatures`.

        Returns:
            FusedFeatures: What the head needs.
        """
        maps = list(sam)
        for i, depth in enumerate(self.clip_depths):
            tokens = clip.level(depth).permute(0, 2, 3, 1)
            added = self.clip_conv[i](
                self.clip_norm[i](tokens).permute(0, 3, 1, 2))
            maps[i + 1] = maps[i + 1] + _resized(added, maps[i + 1])
        # Sampling at fractions of a pixel is too coarse in half precision.
        with torch.autocast(maps[0].device.type, enabled=False):
            weight = self.pixel_conv.weight
            maps = [
                conv(x.to(torch.promote_types(x.dtype, weight.dtype)))
                for conv, x in zip(self.lateral, maps)
            ]
            levels = self._encode(maps[:0:-1])
            pixels = self.smooth(maps[0] + _resized(levels[-1], maps[0]))
            return FusedFeatures(
                self.pixel_conv(pixels), levels, clip, (image[0], image[1]))

    def _encode(self, maps: Sequence[Tensor]) -> List[Tensor]:
        """Encode all levels, coarse first, by deformable attention."""
        sizes = [(x.shape[2], x.shape[3]) for x in maps]
        tokens = torch.cat([nchw_to_nlc(x) for x in maps], dim=1)
        position = torch.cat([
            sine_position(size, x.shape[1], x) + shift
            for size, x, shift in zip(sizes, maps, self.level_embed)
        ],
                             dim=1)
        for attention, feedforward in zip(self.attention, self.feedforward):
            tokens = feedforward(attention(tokens, position, sizes))
        return [
            x.transpose(1, 2).unflatten(2, size) for x, size in zip(
                tokens.split([h * w for h, w in sizes], dim=1), sizes)
        ]


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Resize one map to another."""
    return F.interpolate(
        x, like.shape[2:], mode='bilinear', align_corners=False)
