# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Similarity matrices, and how far they are from each other."""
from typing import Optional

import torch
from torch import Tensor


def structure_loss(similarities_a: Tensor,
                   similarities_b: Tensor,
                   off_diagonal: bool = True,
                   pairs: Optional[Tensor] = None) -> Tensor:
    """Mean squared difference of two similarity matrices.

    Args:
        similarities_a (Tensor): Float tensor with shape (P, P).
        similarities_b (Tensor): Float tensor with shape (P, P).
        off_diagonal (bool): Whether to leave out the similarity of each
            thing with itself. Defaults to True.
        pairs (Tensor, optional): Bool tensor with shape (P, P), the pairs
            that count. Defaults to None: all.

    Returns:
        Tensor: Scalar; 0 with a graph if no pair counts.
    """
    if pairs is None:
        pairs = torch.ones_like(similarities_a, dtype=torch.bool)
    if off_diagonal:
        pairs = pairs.clone().fill_diagonal_(False)
    squares = (similarities_a - similarities_b).square()
    return squares.where(pairs, 0).sum() / pairs.sum().clamp(min=1)


def standardize(matrix: Tensor, pairs: Tensor) -> Tensor:
    """Bring what counts of a matrix to mean 0 and deviation 1.

    Args:
        matrix (Tensor): Float tensor with shape (P, P).
        pairs (Tensor): Bool tensor with shape (P, P), the pairs that count.

    Returns:
        Tensor: The matrix, shape (P, P). Of one pair there is no deviation;
        it becomes 0.
    """
    number = pairs.sum().clamp(min=1)
    matrix = matrix - matrix.where(pairs, 0).sum() / number
    variance = matrix.square().where(pairs, 0).sum() / number
    # Of one pair there is no deviation; its difference to the mean is 0.
    return matrix * (variance + 1e-8).rsqrt()
