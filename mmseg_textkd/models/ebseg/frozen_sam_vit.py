# Copyright (c) mmseg_textkd contributors. All rights reserved.
from pathlib import Path
from typing import Optional, Sequence, Union

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_textkd.clip.weights import PathLike, find_hub_file
from .frozen_tower import FrozenTower


@MODELS.register_module()
class FrozenSAMViT(FrozenTower):
    """The image encoder of Segment Anything, frozen, through timm.

    Source: `Segment Anything <https://arxiv.org/abs/2304.02643>`_.

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
        out_channels (int): Channels of the encoder's neck. Defaults to 256.
        mean (Sequence[float]): See :class:`FrozenTower`. Defaults to SAM's.
        std (Sequence[float]): See :class:`FrozenTower`. Defaults to SAM's.

    Raises:
        ValueError: If weights and seed are both given, or neither is.
        OSError: On loading, if the weights cannot be had.
    """

    def __init__(
        self,
        model: Union[str, dict] = 'samvit_base_patch16.sa1b',
        pretrained: Optional[str] = None,
        seed: Optional[int] = None,
        cache_dir: Optional[PathLike] = None,
        patch_size: int = 16,
        out_channels: int = 256,
        mean: Sequence[float] = (123.675, 116.28, 103.53),
        std: Sequence[float] = (58.395, 57.12, 57.375)
    ) -> None:
        super().__init__(mean, std)
        if isinstance(model, str) == (seed is not None) or (
                not isinstance(model, str) and pretrained):
            raise ValueError(
                'A SAM encoder by name has weights, one of your own sizes '
                f'needs a `seed`, but got {model!r}, pretrained='
                f'{pretrained!r}, seed={seed!r}.')
        self.model, self.pretrained, self.seed = model, pretrained, seed
        self.cache_dir = cache_dir
        self.patch_size, self.out_channels = patch_size, out_channels

    def load_network(self) -> nn.Module:
        """Build the encoder with timm and load its weights.

        Returns:
            nn.Module: The encoder.
        """
        if isinstance(self.model, str):
            network = self._load_by_name()
        else:
            from timm.models.vision_transformer_sam import VisionTransformerSAM

            # Not in the checkpoint, so each process must draw the same.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                network = VisionTransformerSAM(**self.model)
        found = dict(
            patch_size=network.patch_embed.patch_size[0],
            out_channels=network.num_features)
        wrong = {k: v for k, v in found.items() if v != getattr(self, k)}
        if wrong:
            raise ValueError(f'The SAM encoder {self.model!r} has {found}; '
                             f'set {wrong} in `backbone`.')
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
        network = timm.create_model(self.model, num_classes=0)
        from timm.models.vision_transformer_sam import checkpoint_filter_fn
        try:
            timm.models.load_checkpoint(
                network,
                str(Path(file).expanduser()),
                filter_fn=checkpoint_filter_fn)
        except Exception as error:
            raise OSError(f'The weights file {file} is damaged or not of '
                          f'{self.model!r}: {error}') from error
        return network

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images at the full size.

        Args:
            pixels (Tensor): RGB in [0, 255], shape (N, 3, H, W).

        Returns:
            Tensor: Features with shape (N, C, h, w), h and w being H and W in
            patches, rounded.
        """
        network = self.network_for(pixels)
        size = [
            self.patch_size * max(1, round(int(side) / self.patch_size))
            for side in pixels.shape[2:]
        ]
        images = self.normalise(pixels)
        if size != [int(side) for side in images.shape[2:]]:
            images = F.interpolate(
                images, size, mode='bilinear', align_corners=False)
        return network.forward_features(images)
