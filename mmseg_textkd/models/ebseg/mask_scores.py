# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mask_embedder import MaskEmbeddings


class MaskScores(nn.Module):
    r"""Scores of classes at each pixel, from those of the masks.

    :math:`\sum_q p_{qk} \sigma(m_q)`, the last step of the head. It has no
    parameters and is a module so that another can be put in its place, as in
    that of ``conv_seg`` in other heads.

    Args:
        rows (Tensor, optional): Long tensor of the numbers of n classes, if
            not all are wanted. Defaults to None.
    """

    def __init__(self, rows: Optional[Tensor] = None) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, found: MaskEmbeddings, classes: Tensor) -> Tensor:
        """Sum up over the masks.

        Args:
            found (MaskEmbeddings): The masks.
            classes (Tensor): Balanced scores of each, shape (N, Q, K').

        Returns:
            Tensor: Scores with shape (N, K', H, W) or (N, n, H, W).
        """
        if self.rows is not None:
            classes = classes[..., self.rows]
        return torch.einsum('nqk,nqhw->nkhw', classes,
                            found.masks.float().sigmoid())


def pixel_embeddings(found: MaskEmbeddings) -> Tensor:
    """Average the embeddings B of all masks by how much a pixel is in them.

    Args:
        found (MaskEmbeddings): The masks.

    Returns:
        Tensor: Unit length, shape (N, D, H, W).
    """
    weights = found.masks.float().sigmoid()
    return F.normalize(
        torch.einsum('nqd,nqhw->ndhw', found.attention, weights), dim=1)
