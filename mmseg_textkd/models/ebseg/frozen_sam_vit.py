# Copyright (c) mmseg_textkd contributors. All rights reserved.
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.clip.weights import PathLike, find_hub_file
from .frozen_tower import FrozenTower

# As SAM has it; timm's default is 1e-5.
NORM = partial(nn.LayerNorm, eps=1e-6)


@MODELS.register_module()
class FrozenSAMViT(FrozenTower):
    """Frozen image encoder of Segment Anything, through timm.

    It gives what its four blocks of global attention do, resized to a
    pyramid; of its weights only the positional embedding learns. Sources:
    `Segment Anything <https://arxiv.org/abs/2304.02643>`_, `EBSeg
    <https://arxiv.org/abs/2406.09829>`_. The sizes must be given, and are
    checked when it is loaded.

    Args:
        model (str | dict): Name in timm, or the arguments of timm's
            ``VisionTransformerSAM``. Defaults to 'samvit_base_patch16.sa1b'.
        pretrained (str, optional): Weights file: timm's (``.safetensors``,
            ``.pth``) or that of the Segment Anything authors. Defaults to
            None: timm's, from the hub or its cache.
        seed (int, optional): For a dict, draw the weights at random, the same
            for the same seed. Of no use but for tests. Defaults to None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None.
        patch_size (int): Side of a patch, in pixels. Defaults to 16.
        embed_dims (int): Width C of the tokens. Defaults to 768.
        grid_size (int): Side of the image that it was trained with, in
            patches. Defaults to 64.
        mean (Sequence[float]): See :class:`FrozenTower`. Defaults to SAM's.
        std (Sequence[float]): See :class:`FrozenTower`. Defaults to SAM's.

    Raises:
        ValueError: If weights and seed are both given, or neither is; on
            loading, if the encoder has other sizes or not four blocks of
            global attention.
        OSError: On loading, if the weights cannot be had.
    """

    position_name = 'pos_embed'

    def __init__(
        self,
        model: Union[str, dict] = 'samvit_base_patch16.sa1b',
        pretrained: Optional[str] = None,
        seed: Optional[int] = None,
        cache_dir: Optional[PathLike] = None,
        patch_size: int = 16,
        embed_dims: int = 768,
        grid_size: int = 64,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375)
    ) -> None:
        super().__init__(mean, std, (1, grid_size, grid_size, embed_dims))
        if isinstance(model, str) == (seed is not None) or (
                not isinstance(model, str) and pretrained):
            raise ValueError(
                'A SAM encoder by name has weights, one of your own sizes '
                f'needs a `seed`, but got {model!r}, pretrained='
                f'{pretrained!r}, seed={seed!r}.')
        self.model, self.pretrained, self.seed = model, pretrained, seed
        self.cache_dir = cache_dir
        self.patch_size, self.embed_dims = patch_size, embed_dims
        self.grid_size = grid_size

    def load_network(self) -> nn.Module:
        """Build the encoder with timm and load its weights.

        Returns:
            nn.Module: The encoder.
        """
        network: Any
        if isinstance(self.model, str):
            network = self._load_by_name()
        else:
            from timm.models.vision_transformer_sam import VisionTransformerSAM

            # Not in the checkpoint, so each process must draw the same.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                network = VisionTransformerSAM(
                    **dict(self.model, norm_layer=NORM))
        network.neck = nn.Identity()
        found = dict(
            patch_size=network.patch_embed.patch_size[0],
            embed_dims=network.embed_dim,
            grid_size=network.patch_embed.grid_size[0])
        wrong = {k: v for k, v in found.items() if v != getattr(self, k)}
        if wrong:
            raise ValueError(f'The SAM encoder {self.model!r} has {found}; '
                             f'set {wrong} in `backbone`.')
        number = sum(not block.window_size for block in network.blocks)
        if number != 4:
            raise ValueError(
                f'The SAM encoder {self.model!r} has {number} blocks of '
                'global attention, but four are needed, for strides 4 to 32.')
        return network

    def _load_by_name(self) -> nn.Module:
        import timm
        names = timm.list_models('samvit_*', pretrained=True)
        if self.model not in names:
            raise ValueError(f'timm {timm.__version__} has no SAM encoder '
                             f'{self.model!r}; it has {names}.')
        file = self.pretrained
        if file is None:
            try:
                file = find_hub_file(f'timm/{self.model}', 'model.safetensors',
                                     self.cache_dir)
            except OSError as error:
                raise OSError(
                    f'The weights of the SAM encoder {self.model!r} cannot be '
                    f"had: {error}. Give a local file as backbone=dict("
                    "pretrained='FILE'), timm's or that of the Segment "
                    'Anything authors.') from error
        elif not Path(file).expanduser().is_file():
            raise FileNotFoundError(
                f'There is no SAM weights file {Path(file).absolute()}.')
        network = timm.create_model(self.model, num_classes=0, norm_layer=NORM)
        network.neck = nn.Identity()
        try:
            timm.models.load_checkpoint(
                network, str(Path(file).expanduser()), filter_fn=_without_neck)
        except Exception as error:
            raise OSError(f'The weights file {file} is damaged or not of '
                          f'{self.model!r}: {error}') from error
        return network

    def forward(self, pixels: Tensor) -> List[Tensor]:
        """Encode images at the full size.

        Args:
            pixels (Tensor): RGB in [0, 255], shape (N, 3, H, W), with sides
                of an even number of patches.

        Returns:
            list[Tensor]: Features at four, two, one and half times the size
            in patches, shape (N, C, ...), of the first to the last block of
            global attention, with gradient to the positional embedding.
        """
        network: Any = self.network_for(pixels)
        x = network.patch_embed(self.normalize(pixels))
        position = F.interpolate(
            self.positional_embedding.permute(0, 3, 1, 2),
            x.shape[1:3],
            mode='bicubic',
            align_corners=False)
        x = x + position.permute(0, 2, 3, 1)
        maps: List[Tensor] = []
        for block in network.blocks:
            x = block(x)
            if not block.window_size:
                maps.append(
                    F.interpolate(
                        x.permute(0, 3, 1, 2),
                        scale_factor=2**(2 - len(maps)),
                        mode='bilinear',
                        align_corners=False))
        return maps


def _without_neck(state: Dict[str, Tensor],
                  network: nn.Module) -> Dict[str, Tensor]:
    """Convert the keys of a checkpoint of SAM to timm's, without the neck."""
    from timm.models.vision_transformer_sam import checkpoint_filter_fn
    return {
        k: v
        for k, v in checkpoint_filter_fn(state, network).items()
        if not k.startswith('neck.')
    }
