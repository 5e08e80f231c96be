# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Statistics of the similarities between class embeddings."""

from typing import Dict, List, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

Statistics = Dict[str, Union[float, Tuple[int, int]]]


def center(vectors: Tensor) -> Tensor:
    """Subtract the mean over the classes and renormalize.

    The text vectors of CLIP share one large direction (off-diagonal cosines
    of 0.7 to 0.95 for the names of street scenes), which no classifier over
    these classes can use.

    Args:
        vectors (Tensor): Rows with shape (K, D), K at least 2.

    Returns:
        Tensor: Unit rows with shape (K, D).

    Raises:
        ValueError: If there are fewer than two rows, or rows are zero after
            centering.
    """
    _require_rows(vectors)
    centered = vectors - vectors.mean(dim=0, keepdim=True)
    zero = (centered.norm(dim=1) < 1e-6).nonzero().flatten().tolist()
    if zero:
        raise ValueError(f'the class embeddings of the rows {zero} are all '
                         'zero after centering: they equal the mean.')
    return F.normalize(centered, dim=1)


def closest_pairs(vectors: Tensor, num: int) -> List[Tuple[int, int, float]]:
    """Find the pairs of classes with the highest cosine.

    Args:
        vectors (Tensor): Rows with shape (K, D).
        num (int): Number of pairs at most.

    Returns:
        list[tuple[int, int, float]]: Row numbers i < j and their cosine, the
        most similar pair first.
    """
    _require_rows(vectors)
    rows = F.normalize(vectors.detach().double(), dim=1)
    i, j = torch.triu_indices(
        len(rows), len(rows), offset=1, device=rows.device)
    cosine = (rows @ rows.T)[i, j]
    order = cosine.argsort(descending=True, stable=True)[:num]
    return list(
        zip(i[order].tolist(), j[order].tolist(), cosine[order].tolist()))


def geometry(vectors: Tensor) -> Statistics:
    """Summarize the off-diagonal cosines of class embeddings.

    Args:
        vectors (Tensor): Rows with shape (K, D), K at least 2.

    Returns:
        dict: ``mean``, ``closest`` and ``min`` cosine (float) and the row
        numbers ``closest_pair`` and ``farthest_pair`` (tuple[int, int]).
    """
    pairs = closest_pairs(vectors, num=len(vectors)**2)
    return dict(
        mean=sum(pair[2] for pair in pairs) / len(pairs),
        closest=pairs[0][2],
        min=pairs[-1][2],
        closest_pair=pairs[0][:2],
        farthest_pair=pairs[-1][:2])


@torch.no_grad()
def ce_floor(vectors: Tensor, scale: float, steps: int = 200) -> float:
    r"""Lowest cross entropy that cosine logits against these vectors allow.

    With logits :math:`s \cos(e, t_k)` a pixel of class k can do no better
    than the unit vector :math:`e` that minimizes its cross entropy, found by
    projected gradient descent on the sphere in float64. A floor well above
    zero means that the scale is too low for such similar classes. For K
    orthonormal vectors it is :math:`\log(1 + (K-1)
    e^{-s\sqrt{K/(K-1)}})`.

    Args:
        vectors (Tensor): Rows with shape (K, D); normalized here.
        scale (float): Logit scale s.
        steps (int): Descent steps. Defaults to 200.

    Returns:
        float: Mean over the classes, in nats.
    """
    _require_rows(vectors)
    text = F.normalize(vectors.detach().double().cpu(), dim=1)
    num, dim = text.shape
    if dim > num:
        # Only coordinates in the span matter, and one direction out of it.
        left, values, _ = torch.linalg.svd(text, full_matrices=False)
        text = F.pad(left * values, (0, 1))
    labels = torch.arange(num)

    def loss(points: Tensor) -> Tensor:
        return F.cross_entropy(
            scale * points @ text.T, labels, reduction='none')

    points = text.clone()
    best = loss(points)
    step = torch.full((num, 1), 1. / scale, dtype=torch.float64)
    for _ in range(steps):
        probability = (scale * points @ text.T).softmax(dim=1)
        gradient = scale * (probability @ text - text)
        trial = F.normalize(points - step * gradient, dim=1)
        value = loss(trial)
        better = value < best
        points = torch.where(better[:, None], trial, points)
        best = torch.where(better, value, best)
        step = torch.where(better[:, None], step * 1.5, step * .5)
    return best.mean().item()


def _require_rows(vectors: Tensor) -> None:
    """Require a matrix of at least two rows."""
    if vectors.dim() != 2 or len(vectors) < 2:
        raise ValueError('At least two class embeddings (K×D) are needed, but '
                         f'got a tensor of shape {tuple(vectors.shape)}.')
