# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Conversion of images between the normalizations of two networks."""
from typing import Tuple

import torch
from mmseg.models.data_preprocessor import SegDataPreProcessor
from torch import Tensor

from mmseg_textkd.compat import swaps_channels


def to_rgb(inputs: Tensor, preprocessor: SegDataPreProcessor) -> Tensor:
    """Undo the normalization of a data preprocessor.

    Its inputs are assumed to be BGR, as MMSegmentation loads them.

    Args:
        inputs (Tensor): Normalized images, shape (N, 3, H, W).
        preprocessor (SegDataPreProcessor): The preprocessor.

    Returns:
        Tensor: RGB in [0, 255], of the same shape.
    """
    mean, std = _statistics(preprocessor, inputs)
    pixels = inputs * std + mean
    return pixels if swaps_channels(preprocessor) else pixels.flip(1)


def renormalize(inputs: Tensor, own: SegDataPreProcessor,
                other: SegDataPreProcessor) -> Tensor:
    """Convert images from one preprocessor's normalization to another's.

    Images are returned unchanged if both are the same.

    Args:
        inputs (Tensor): Images normalized by ``own``, shape (N, 3, H, W).
        own (SegDataPreProcessor): The preprocessor of the images.
        other (SegDataPreProcessor): The preprocessor to convert to.

    Returns:
        Tensor: Images normalized by ``other``, of the same shape.
    """
    mean, std = _statistics(own, inputs)
    new_mean, new_std = _statistics(other, inputs)
    if swaps_channels(own) != swaps_channels(other):
        inputs, mean, std = inputs.flip(1), mean.flip(0), std.flip(0)
    if torch.equal(mean, new_mean) and torch.equal(std, new_std):
        return inputs
    return (inputs * std + (mean - new_mean)) / new_std


def _statistics(preprocessor: SegDataPreProcessor,
                like: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, shape (3, 1, 1)."""
    if not preprocessor._enable_normalize:
        zero = like.new_zeros(3, 1, 1)
        return zero, zero + 1
    return preprocessor.mean.to(like), preprocessor.std.to(like)
