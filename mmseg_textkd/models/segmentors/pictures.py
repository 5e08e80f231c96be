# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The same pictures as another network wants them."""
from typing import Tuple

import torch
from mmseg.models.data_preprocessor import SegDataPreProcessor
from torch import Tensor

from mmseg_textkd.compat import swaps_channels


def to_rgb(inputs: Tensor, preprocessor: SegDataPreProcessor) -> Tensor:
    """Undo what a data preprocessor has done to the values of pictures.

    They are taken for BGR before it, as MMSegmentation loads them.

    Args:
        inputs (Tensor): Its pictures, shape (N, 3, H, W).
        preprocessor (SegDataPreProcessor): The preprocessor.

    Returns:
        Tensor: RGB in [0, 255], of the same shape.
    """
    mean, std = _statistics(preprocessor, inputs)
    pixels = inputs * std + mean
    return pixels if swaps_channels(preprocessor) else pixels.flip(1)


def renormalise(inputs: Tensor, own: SegDataPreProcessor,
                other: SegDataPreProcessor) -> Tensor:
    """Bring pictures from one preprocessor's mean and deviation to another's.

    Nothing is done where they are the same.

    Args:
        inputs (Tensor): Pictures of the first, shape (N, 3, H, W).
        own (SegDataPreProcessor): The first.
        other (SegDataPreProcessor): The second.

    Returns:
        Tensor: Pictures as the second makes them, of the same shape.
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
