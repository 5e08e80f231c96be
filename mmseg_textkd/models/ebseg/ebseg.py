# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
from typing import Any, Mapping, Optional, Union

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.utils import ConfigType
from torch import Tensor

from mmseg_textkd.compat import swaps_channels
from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.text.vocabulary import VocabularySpec
from ..layers import pixel_text_similarity
from .clip_sam_neck import FusedFeatures
from .frozen_tower import FrozenTower
from .mask_scores import padded_size, pixel_embeddings


@MODELS.register_module()
class EBSeg(EncoderDecoder):
    """Open-vocabulary segmentation with balanced image embeddings.

    Source: `Open-Vocabulary Semantic Segmentation with Image Embedding
    Balancing <https://arxiv.org/abs/2406.09829>`_.

    Images must come as RGB; they are brought back to [0, 255], and each of
    the two towers normalizes them in its own way. Sizes that are no multiples
    of 32 are padded on the right and at the bottom.

    Args:
        image_encoder (dict): Config of the :class:`FrozenCLIPViT`.
        backbone (dict): Config of the :class:`FrozenSAMViT`.
        neck (dict): Config of the :class:`CLIPSAMNeck`.
        decode_head (dict): Config of the :class:`EBSegHead`.
        **kwargs: As for ``EncoderDecoder``.

    Raises:
        ValueError: If the width of the text is not that of the CLIP tower.
    """

    def __init__(self, image_encoder: ConfigType, backbone: ConfigType,
                 neck: ConfigType, decode_head: ConfigType, **kwargs) -> None:
        super().__init__(
            backbone=backbone, neck=neck, decode_head=decode_head, **kwargs)
        self.image_encoder = MODELS.build(image_encoder)
        if self.decode_head.text.dim != self.image_encoder.out_dims:
            raise ValueError(
                f'The text has width {self.decode_head.text.dim}, but the '
                f'image tower {self.image_encoder.out_dims}; both must be of '
                'one CLIP model.')
        if not swaps_channels(self.data_preprocessor):
            print_log(
                'EBSeg needs images as RGB, but `bgr_to_rgb` of its data '
                'preprocessor is off. That is right only if the pipeline '
                'loads them as RGB.', 'current', logging.WARNING)

    def extract_feat(self, inputs: Tensor) -> FusedFeatures:
        """Run both frozen encoders and fuse their features.

        Args:
            inputs (Tensor): Preprocessed images, shape (N, 3, H, W).

        Returns:
            FusedFeatures: What the head needs.
        """
        pixels = inputs
        if getattr(self.data_preprocessor, '_enable_normalize', False):
            pixels = (
                inputs * self.data_preprocessor.std +
                self.data_preprocessor.mean)
        sam, clip = (
            tower(_padded(pixels, tower))
            for tower in (self.backbone, self.image_encoder))
        return self.neck(sam, clip, tuple(map(int, pixels.shape[2:])))

    def set_classes(self,
                    classes: Union[VocabularySpec, TextEmbeddings, None],
                    templates: Any = 'vild',
                    tower: Optional[Mapping] = None) -> None:
        """Set the classes of inference, without training.

        Args:
            classes (VocabularySpec | TextEmbeddings, optional): Class names
                or phrases, or their embeddings, centered where those of the
                training are; None goes back to the classes of the training.
            templates: Prompt templates for names, see
                :func:`get_templates`. Defaults to 'vild'.
            tower (Mapping, optional): ``model``, ``pretrained`` and
                ``cache_dir`` of the text tower for names. Defaults to None:
                that of the image tower.

        Raises:
            TextTowerError: If the text tower cannot be had.
            ValueError: If a name is empty or occurs twice, the embeddings
                are of another width, or the mean that centered those of the
                training is not known.
        """
        if classes is not None and not isinstance(classes, TextEmbeddings):
            encoder = self.image_encoder
            tower = tower or dict(
                model=encoder.model,
                pretrained=encoder.pretrained,
                cache_dir=encoder.cache_dir)
            found = encode_classes(classes, tower, templates)
            classes = TextEmbeddings(
                self.decode_head.text.trained.center(found.vectors),
                found.names, found.phrases)
        self.decode_head.set_classes(classes)
        self.out_channels = self.decode_head.out_channels

    @torch.no_grad()
    def pixel_embeddings(self, inputs: Tensor) -> Tensor:
        """Compute pixel embeddings in the space of the text.

        The embeddings B of all masks, averaged at each pixel by how much it
        is in them.

        Args:
            inputs (Tensor): Preprocessed images, shape (N, 3, H, W).

        Returns:
            Tensor: Unit length, shape (N, D, h, w) at the size of the masks.
        """
        return pixel_embeddings(
            self.decode_head.embed_masks(self.extract_feat(inputs)))

    def pixel_text_similarity(self, inputs: Tensor) -> Tensor:
        """Compute the cosines of each pixel with the text of the classes.

        Args:
            inputs (Tensor): Preprocessed images, shape (N, 3, H, W).

        Returns:
            Tensor: Cosines with shape (N, K', h, w).
        """
        text, _ = self.decode_head.text.vocabulary()
        return pixel_text_similarity(self.pixel_embeddings(inputs), text)


def _padded(pixels: Tensor, tower: FrozenTower) -> Tensor:
    """Pad images with the mean of an encoder, which normalizes to 0."""
    size = pixels.shape[2], pixels.shape[3]
    height, width = (p - s for p, s in zip(padded_size(size), size))
    if not height and not width:
        return pixels
    return F.pad(pixels - tower.mean, (0, width, 0, height)) + tower.mean
