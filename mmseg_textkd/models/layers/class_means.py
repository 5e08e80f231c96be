# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Tuple

import torch.nn.functional as F
from torch import Tensor


def class_masks(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Compute one-hot masks of the classes.

    A product with these masks sums over classes. Unlike a scattered sum it is
    the same in every run on a GPU.

    Args:
        labels (Tensor): Long tensor with shape (N, H, W), of values in
            [0, num_classes) or ``ignore_index``.
        num_classes (int): Number of classes K.
        ignore_index (int): Label of the pixels that are left out.

    Returns:
        Tensor: Long tensor with shape (N, H * W, K), of 0 and 1.
    """
    valid = labels != ignore_index
    masks = F.one_hot(labels.where(valid, 0), num_classes) * valid[..., None]
    return masks.flatten(1, 2)


def class_means(values: Tensor, labels: Tensor, num_classes: int,
                ignore_index: int) -> Tuple[Tensor, Tensor]:
    """Average over the pixels of each class in each image.

    Args:
        values (Tensor): Float tensor with shape (N, C, H, W).
        labels (Tensor): Long tensor with shape (N, H, W), of values in
            [0, num_classes) or ``ignore_index``.
        num_classes (int): Number of classes K.
        ignore_index (int): Label of the pixels that are left out.

    Returns:
        tuple[Tensor, Tensor]: Means with shape (N, K, C), zero for a class
        that is absent, and numbers of pixels with shape (N, K).
    """
    masks = class_masks(labels, num_classes, ignore_index)
    masks = masks.to(values).transpose(1, 2)
    counts = masks.sum(dim=2)
    sums = masks @ values.flatten(2).transpose(1, 2)
    return sums / counts.clamp(min=1)[..., None], counts
