# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Optional, Sequence

from mmseg.registry import MODELS
from torch import nn

from .text_dpt_head import TextDPTHead

# Strides of the four maps that the decoder joins.
STRIDES = (4, 8, 16, 32)


@MODELS.register_module()
class LSegDPTHead(TextDPTHead):
    """DPT head of LSeg, whose features are projected without a fusion conv.

    It is ``TextDPTHead`` (readout projection, four fusion blocks) with three
    differences, which the weights of LSeg's authors need:

    - the text classifier, whose projection is their ``head1``, follows the
      last fusion block directly; DPT's own 3x3 convolution is left out;
    - a ViT of any patch size is brought to the strides 4, 8, 16 and 32; the
      stock head does that for patches of 16 alone;
    - a CNN, which has these strides, is taken as it is.

    The logits, at half the resolution of the image, are resized with
    ``align_corners=True``.

    Source: `LSeg <https://arxiv.org/abs/2201.03546>`_, section 4; for the
    layers its `code <https://github.com/isl-org/lang-seg>`_.

    Args:
        post_process_channels (Sequence[int]): Channels of the four maps.
        patch_size (int, optional): Side of the ViT's patches, 16 or 32
            pixels; None for a CNN, whose ``in_channels`` these are.
            Defaults to 16.
        align_corners (bool): How logits are resized. Defaults to True.
        **kwargs: Other arguments of :class:`TextDPTHead`.

    Raises:
        ValueError: If there is no such patch size, there are not four maps,
            or those of a CNN have other channels.
    """

    def __init__(self,
                 *,
                 post_process_channels: Sequence[int] = (96, 192, 384, 768),
                 patch_size: Optional[int] = 16,
                 align_corners: bool = True,
                 **kwargs: Any) -> None:
        channels = list(post_process_channels)
        if patch_size not in (16, 32, None):
            raise ValueError('`patch_size` of LSegDPTHead must be 16, 32 or '
                             f'None (a CNN), but got {patch_size!r}.')
        if len(channels) != len(STRIDES):
            raise ValueError('LSegDPTHead joins four maps, but got '
                             f'post_process_channels={channels}.')
        if patch_size is None and list(kwargs['in_channels']) != channels:
            raise ValueError(
                'of a CNN, `post_process_channels` of LSegDPTHead are its '
                f'`in_channels` {list(kwargs["in_channels"])}, but got '
                f'{channels}.')
        super().__init__(
            post_process_channels=channels,
            align_corners=align_corners,
            **kwargs)
        self.project = nn.Identity()
        if patch_size is None:
            self.reassemble_blocks = nn.Identity()
        elif patch_size != 16:
            self.reassemble_blocks.resize_layers = nn.ModuleList(
                nn.Identity() if patch_size ==
                stride else nn.ConvTranspose2d(c, c, patch_size //
                                               stride, patch_size // stride)
                for c, stride in zip(channels, STRIDES))
