# Copyright (c) mmseg_textkd contributors. All rights reserved.
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mask_embedder import MaskEmbeddings


class MaskScores(nn.Module):
    r"""Scores of classes at each pixel from masks and their scores.

    :math:`\sum_q p_{qk} \sigma(m_q)`, the last step of the head, with mask
    logits that have been resized before. It has no parameters and is a module
    so that another can be put in its place, as in that of ``conv_seg`` in
    other heads.

    Args:
        rows (Tensor, optional): Long tensor of the numbers of n classes, if
            not all are wanted. Defaults to None.
    """

    def __init__(self, rows: Optional[Tensor] = None) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, found: MaskEmbeddings, classes: Tensor) -> Tensor:
        """Sum the scores over the masks.

        Args:
            found (MaskEmbeddings): The masks.
            classes (Tensor): Balanced scores of each, shape (N, Q, K').

        Returns:
            Tensor: Scores with shape (N, K', H, W) or (N, n, H, W), H and W
            being the size wanted.
        """
        if self.rows is not None:
            classes = classes[..., self.rows]
        masks = fit_masks(found, found.size).sigmoid()
        return torch.einsum('nqk,nqhw->nkhw', classes, masks)


def fit_masks(found: MaskEmbeddings, size: Tuple[int, int]) -> Tensor:
    """Resize mask logits to an image, without its padding.

    Args:
        found (MaskEmbeddings): The masks, of images that have been padded.
        size (tuple[int, int]): Height and width wanted.

    Returns:
        Tensor: Mask logits with shape (N, Q, *size).
    """
    height, width = found.image
    masks = _resized(found.masks.float(), padded_size(found.image))
    return _resized(masks[..., :height, :width], size)


def pixel_embeddings(found: MaskEmbeddings) -> Tensor:
    """Average the embeddings B of all masks, weighted at each pixel.

    Args:
        found (MaskEmbeddings): The masks.

    Returns:
        Tensor: Unit length, shape (N, D, H, W), at the size of the masks
        without padding.
    """
    masks, padded = found.masks.float(), padded_size(found.image)
    if padded != found.image:
        height, width = (math.ceil(
            m * i /
            p) for m, i, p in zip(masks.shape[2:], found.image, padded))
        masks = fit_masks(found, (height, width))
    weights = masks.sigmoid()
    return F.normalize(
        torch.einsum('nqd,nqhw->ndhw', found.attention, weights), dim=1)


def padded_size(image: Tuple[int, int]) -> Tuple[int, int]:
    """Get the size that images are padded to, multiples of 32.

    Args:
        image (tuple[int, int]): Height and width, in pixels.

    Returns:
        tuple[int, int]: Height and width.
    """
    height, width = (32 * math.ceil(int(side) / 32) for side in image)
    return height, width


def _resized(masks: Tensor, size: Tuple[int, int]) -> Tensor:
    """Resize mask logits."""
    return F.interpolate(
        masks, tuple(size), mode='bilinear', align_corners=False)
