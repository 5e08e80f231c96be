# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Tuple

import torch.nn.functional as F
from torch import Tensor


def class_means(values: Tensor, labels: Tensor, num_classes: int,
                ignore_index: int) -> Tuple[Tensor, Tensor]:
    """Average over the pixels of each class, image by image.

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
    valid = labels != ignore_index
    # One product of matrices: unlike a scattered sum it is the same in every
    # run on a GPU.
    masks = F.one_hot(labels.where(valid, 0), num_classes)
    masks = masks.to(values) * valid[..., None].to(values)
    masks = masks.flatten(1, 2).transpose(1, 2)
    counts = masks.sum(dim=2)
    sums = masks @ values.flatten(2).transpose(1, 2)
    return sums / counts.clamp(min=1)[..., None], counts
