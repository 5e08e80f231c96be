# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict, Optional, Sequence

import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.clip import ImageTower
from mmseg_textkd.clip.clip_features import CLIPFeatures, encode_image
from mmseg_textkd.clip.weights import PathLike
from .frozen_tower import FrozenTower


@MODELS.register_module()
class FrozenCLIPViT(FrozenTower):
    """Frozen CLIP image encoder with a learnable positional embedding.

    Its input is the image at a fraction of its size, with the positional
    embedding interpolated. The sizes of the tower must be given, and are
    checked when it is loaded.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_.

    Args:
        model (str): ``'toyclip'``, an architecture of open_clip, ``hf-hub:``
            or ``local-dir:`` name, as for the text tower. A ViT is needed.
        pretrained (str, optional): Tag or file of its weights. Defaults to
            None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None.
        embed_dims (int): Width C of the tokens. Defaults to 768 (ViT-B).
        num_layers (int): Number of blocks. Defaults to 12.
        patch_size (int): Side of a patch, in pixels. Defaults to 16.
        grid_size (int): Side of the image that the tower was trained with, in
            patches. Defaults to 14.
        out_dims (int): Width D of the space shared with text. Defaults to
            512.
        scale (float): Size of the tower's image relative to the input.
            Defaults to 0.5.
        mean (Sequence[float]): See :class:`FrozenTower`. Defaults to CLIP's.
        std (Sequence[float]): See :class:`FrozenTower`. Defaults to CLIP's.

    Raises:
        ValueError: If the tower that is loaded has other sizes.
        TypeError: If it is not a plain ViT.
    """

    def __init__(
        self,
        model: str,
        pretrained: Optional[str] = None,
        cache_dir: Optional[PathLike] = None,
        embed_dims: int = 768,
        num_layers: int = 12,
        patch_size: int = 16,
        grid_size: int = 14,
        out_dims: int = 512,
        scale: float = 0.5,
        mean: Sequence[float] = (122.7709383, 116.7460125, 104.09373615),
        std: Sequence[float] = (68.5005327, 66.6321579, 70.32316305)
    ) -> None:
        super().__init__(mean, std, (1 + grid_size**2, embed_dims))
        if scale <= 0:
            raise ValueError(f'`scale` must be positive, but got {scale}.')
        self.model, self.pretrained = model, pretrained
        self.cache_dir = cache_dir
        self.embed_dims, self.num_layers = embed_dims, num_layers
        self.patch_size, self.grid_size = patch_size, grid_size
        self.out_dims, self.scale = out_dims, scale

    def load_network(self) -> nn.Module:
        """Load the image tower with open_clip.

        Returns:
            nn.Module: The tower, with CLIP's factor as ``clip_scale``.
        """
        tower = ImageTower(self.model, self.pretrained, self.cache_dir)
        network: Any = tower.visual
        self._check(network)
        network.clip_scale = tower.logit_scale
        return network

    def _check(self, network: Any) -> None:
        """Require a plain ViT of the configured sizes."""
        blocks = getattr(
            getattr(network, 'transformer', None), 'resblocks', ())
        plain = len(blocks) and all(
            isinstance(getattr(block, 'attn', None), nn.MultiheadAttention)
            and block.attn.batch_first for block in blocks)
        if not plain or getattr(network, 'attn_pool', None) is not None:
            raise TypeError(
                f'The image tower of {self.model!r} '
                f'({type(network).__name__}) is not a plain ViT with a class '
                'token, which EBSeg needs. Use ViT-B-16 or ViT-L-14-336.')
        found = dict(
            embed_dims=network.conv1.out_channels,
            num_layers=len(blocks),
            patch_size=network.conv1.kernel_size[0],
            grid_size=network.grid_size[0],
            out_dims=network.proj.shape[1])
        wrong = {k: v for k, v in found.items() if v != getattr(self, k)}
        if wrong or network.grid_size[0] != network.grid_size[1]:
            raise ValueError(
                f'The image tower of {self.model!r} has {found} (and a grid '
                f'of {network.grid_size}); set {wrong} in `image_encoder`.')

    def forward(self, pixels: Tensor, cover: bool = False) -> CLIPFeatures:
        """Run the tower.

        Args:
            pixels (Tensor): RGB in [0, 255], shape (N, 3, H, W).
            cover (bool): Whether the patches are to cover all of the image,
                which is stretched to whole patches then, with antialiasing.
                EBSeg drops what is less than a patch, and resizes without
                antialiasing. Defaults to False.

        Returns:
            CLIPFeatures: Tokens of all depths, with gradient to the
            positional embedding.
        """
        network: Any = self.network_for(pixels)
        how: Dict[str, Any] = dict(scale_factor=self.scale)
        if cover:
            how = dict(
                size=[
                    self.patch_size *
                    max(1, round(int(side) * self.scale / self.patch_size))
                    for side in pixels.shape[2:]
                ],
                antialias=True)
        images = F.interpolate(
            self.normalize(pixels),
            mode='bilinear',
            align_corners=False,
            **how)
        return encode_image(network, images, self.positional_embedding,
                            network.clip_scale)
