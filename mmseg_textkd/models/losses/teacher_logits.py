# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Sequence

import torch
from mmseg.models.utils import resize
from torch import Tensor


def teacher_logits(batch_data_samples: Sequence, size: Sequence[int],
                   num_classes: int) -> Tensor:
    """Get the logits that a segmentation teacher left in the data samples.

    Args:
        batch_data_samples (Sequence[:obj:`SegDataSample`]): N samples, with
            ``teacher.logits``, as ``DistilledEncoderDecoder`` leaves them.
        size (Sequence[int]): Height h and width w to bring them to.
        num_classes (int): Number of classes K.

    Returns:
        Tensor: Float32 or wider, without gradient, shape (N, K, h, w).

    Raises:
        ValueError: If there are none, or for another number of classes.
    """
    if not batch_data_samples or not all('logits' in s.get('teacher', ())
                                         for s in batch_data_samples):
        raise ValueError(
            'the data samples bring no logits of a teacher. Set '
            "model=dict(type='DistilledEncoderDecoder', teacher=dict("
            'config=..., checkpoint=...)) in the config.')
    logits = torch.stack([s.teacher.logits for s in batch_data_samples])
    if logits.shape[1] != num_classes:
        raise ValueError(f'the teacher has {logits.shape[1]} classes, but the '
                         f'text {num_classes}.')
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return resize(
        logits.detach().to(dtype),
        size=tuple(size),
        mode='bilinear',
        align_corners=False)
