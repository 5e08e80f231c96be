# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_structure_loss(embeddings: Sequence[Tensor],
                        texts: Sequence[Tensor]) -> Tensor:
    r"""Semantic structure consistency over the masks of each image.

    .. math::
        L = \frac{1}{N} \sum_n \frac{1}{G_n^2} \sum_{i,j}
        (\langle e_i, e_j \rangle - \cos(t_i, t_j))^2

    over the :math:`G_n` masks of image n. The embeddings keep their length,
    so the diagonal draws it to 1. An image without masks counts as 0. In
    float32 or wider.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_, the SSC loss.

    Args:
        embeddings (Sequence[Tensor]): For each of N images the embeddings of
            the matched queries, shape (G, D).
        texts (Sequence[Tensor]): For each image the text embeddings of their
            true classes, shape (G, D).

    Returns:
        Tensor: Scalar; 0 with a graph if no image has a mask.
    """
    total: Any = 0.
    for own, text in zip(embeddings, texts):
        dtype = torch.promote_types(own.dtype, torch.float32)
        with torch.autocast(own.device.type, enabled=False):
            own, text = own.to(dtype), F.normalize(text.to(dtype), dim=1)
            error = (own @ own.T - text @ text.T)**2
            # Without masks the sum is an empty one: 0, with a graph.
            total = total + error.sum() / max(len(own), 1)**2
    return total / len(embeddings)
