# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .frozen_clip import FrozenCLIP
from .loading import load_visual
from .weights import PathLike, TextTowerError


class ImageTower(FrozenCLIP):
    """Frozen image encoder of a CLIP model, through open_clip.

    It embeds images in the space of the text embeddings of the same model,
    for region embeddings; :class:`FrozenCLIPViT` takes the features of its
    patches. All arithmetic is in float32.

    Args:
        model (str): See :class:`TextTower`.
        pretrained (str, optional): See :class:`TextTower`. Defaults to None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None, the cache of the hub.

    Raises:
        TextTowerError: If open_clip or the weights are missing or damaged, or
            the model gives no single vector for an image.

    Attributes:
        visual (nn.Module): open_clip's image encoder.
        logit_scale (float): Factor of the model on cosines.
        size (tuple[int, int]): Height and width of the images.
        dim (int): Width D of the image embeddings.
    """

    def __init__(self,
                 model: str,
                 pretrained: Optional[str] = None,
                 cache_dir: Optional[PathLike] = None) -> None:
        super().__init__(model, pretrained)
        self.visual, self.logit_scale = load_visual(model, pretrained,
                                                    cache_dir)
        self.visual.eval()
        prepared = self.visual.preprocess_cfg
        size = prepared['size']
        self.size: Tuple[int, int] = ((size, size) if isinstance(size, int)
                                      else tuple(size))
        for name in ('mean', 'std'):
            value = 255 * torch.tensor(prepared[name]).view(3, 1, 1)
            self.register_buffer(name, value)
        self.dim = self._freeze(
            self.encode_image(torch.zeros(1, 3, *self.size)))

    @property
    def device(self) -> torch.device:
        """torch.device: Device of the weights."""
        return self.mean.device

    def resize(self, image: Tensor) -> Tensor:
        """Resize an image to the size of the tower, ignoring its aspect ratio.

        Args:
            image (Tensor): Values in [0, 255], with shape (3, H, W).

        Returns:
            Tensor: Float32, values in [0, 255], with shape (3, ``*size``).
        """
        resized = F.interpolate(
            image[None].float(),
            size=self.size,
            mode='bicubic',
            align_corners=False,
            antialias=True)
        return resized[0].clamp(0, 255)

    @torch.no_grad()
    def encode_image(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Encode images.

        Args:
            images (Tensor): RGB, values in [0, 255], with shape (N, 3,
                ``*size``), on any device.
            batch_size (int): Images at a time. Defaults to 64.

        Returns:
            Tensor: Float32, not normalized, with shape (N, D), on the tower's
            device.

        Raises:
            TextTowerError: If the model gives more than a vector an image.
        """
        parts = []
        for part in images.split(batch_size):
            part = (part.to(self.device).float() - self.mean) / self.std
            with torch.autocast(self.device.type, enabled=False):
                vectors = self.visual(part)
            if isinstance(vectors, tuple):  # CoCa: pooled, all tokens
                vectors = vectors[0]
            if vectors.dim() != 2:
                raise TextTowerError(
                    f'{self.model!r} gives a tensor of shape '
                    f'{tuple(vectors.shape)} for {len(part)} images; an '
                    'image tower must pool them to one vector each.')
            parts.append(vectors.float())
        return torch.cat(parts)

    def extra_repr(self) -> str:
        """Describe the tower in one line of ``repr``."""
        return f'{self.model}, pretrained={self.pretrained}, size={self.size}'
