# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Vectors of words that a network was not trained with."""
import torch
import torch.nn.functional as F
from torch import Tensor

# How the vector of a new word is used; the first is the default of a
# classifier that is linear in it.
NEW_WORDS = ('unit', 'projected', 'ridge', 'raw')


def place_new_words(vectors: Tensor,
                    trained: Tensor,
                    how: str = NEW_WORDS[0],
                    ridge: float = 0.1) -> Tensor:
    r"""Map vectors of new words into the span of the trained ones.

    A loss depends only on what the projected pixels are in the span of the K
    class vectors T. The part of a new vector v outside of it multiplies what
    no training has determined.

    - 'unit': the projection onto the span, brought to unit length;
    - 'projected': the projection :math:`v T^\top (T T^\top)^+ T`;
    - 'ridge': :math:`v T^\top (T T^\top + \lambda I)^{-1} T`;
    - 'raw': v as it is.

    With as many trained classes as dimensions or more all but 'ridge' are v.

    Args:
        vectors (Tensor): Unit rows with shape (n, D).
        trained (Tensor): Vectors of the training, unit rows with shape
            (K, D), see :meth:`TextProvider.trained_vectors`.
        how (str): One of these. Defaults to 'unit'.
        ridge (float): The :math:`\lambda` of 'ridge'. Defaults to 0.1.

    Returns:
        Tensor: Shape (n, D), with the dtype of ``vectors``.

    Raises:
        ValueError: If ``how`` is unknown, or a vector has no part in the
            span and no direction is left.
    """
    if how not in NEW_WORDS:
        raise ValueError(
            f'`new_words` must be one of {NEW_WORDS}, but got {how!r}.')
    if how == 'raw' or not len(vectors):
        return vectors
    basis, rows = trained.double(), vectors.double()
    gram, products = basis @ basis.T, rows @ basis.T
    if how == 'ridge':
        gram = gram + ridge * torch.eye(len(gram)).to(gram)
        placed = torch.linalg.solve(gram, products.T).T @ basis
    else:
        placed = products @ torch.linalg.pinv(gram, hermitian=True) @ basis
    if how == 'unit':
        lengths = placed.norm(dim=1)
        lost = (lengths < 1e-4).nonzero().flatten().tolist()
        if lost:
            raise ValueError(
                f'the vectors of the new words number {lost} have nothing in '
                'common with those of the training; with new_words="raw" '
                'they are used as they are.')
        placed = F.normalize(placed, dim=1)
    return placed.to(vectors)
