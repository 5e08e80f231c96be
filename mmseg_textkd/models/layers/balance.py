# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""EBSeg's balancing of class probabilities from several embeddings."""
import re
from typing import List, Sequence, Set

import torch
from torch import Tensor

from mmseg_textkd.text import Vocabulary


def balance_probabilities(supervised: Tensor,
                          attention: Tensor,
                          frozen: Tensor,
                          seen: Tensor,
                          alpha: float = 0.09,
                          beta: float = 0.3,
                          gamma: float = 0.7) -> Tensor:
    r"""Combine class probabilities by a weighted geometric mean.

    .. math::
        p_k = a_k^{1 - \lambda_k - \gamma} d_k^{\lambda_k} b_k^{\gamma},
        \quad \lambda_k = \alpha \text{ if } k \text{ was seen in training,
        else } \beta

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_, with the exponents of
    its ViT-B/16; those of ViT-L/14 are 0.12, 0.4, 0.6.

    Args:
        supervised (Tensor): Probabilities a by the fully supervised
            embedding, shape (..., K).
        attention (Tensor): Probabilities b by the mask attention embedding,
            same shape.
        frozen (Tensor): Probabilities d by the frozen embedding, same shape.
        seen (Tensor): Bool with shape (K, ): class seen in training.
        alpha (float): Exponent of ``frozen``, seen classes. Defaults to 0.09.
        beta (float): Exponent of ``frozen``, unseen classes. Defaults to
            0.3.
        gamma (float): Exponent of ``attention``. Defaults to 0.7.

    Returns:
        Tensor: Combined scores with shape (..., K); they do not sum to 1.

    Raises:
        ValueError: If an exponent is negative.
    """
    check_exponents(alpha, beta, gamma)
    exponent = _exponents(supervised, seen, alpha, beta)
    # 1 - 0.3 - 0.7 is -5.6e-17: without the bound a zero would become inf.
    rest = (1 - exponent - gamma).clamp(min=0)
    return supervised**rest * frozen**exponent * attention**gamma


def balance_log_probabilities(supervised: Tensor, frozen: Tensor, seen: Tensor,
                              alpha: float, beta: float) -> Tensor:
    r"""Combine log-probabilities of two embeddings at every pixel.

    .. math::
        \log p_k = (1 - \lambda_k) \log a_k + \lambda_k \log d_k

    In logarithms small probabilities do not underflow in float32, and the
    scores that are resized are finite.

    Args:
        supervised (Tensor): Log-probabilities a by the supervised embedding,
            shape (N, K, H, W).
        frozen (Tensor): Log-probabilities d by the frozen or distilled
            embedding, same shape.
        seen (Tensor): Bool with shape (K, ): class seen in training.
        alpha (float): Exponent of ``frozen``, seen classes.
        beta (float): Exponent of ``frozen``, unseen classes.

    Returns:
        Tensor: Combined scores with shape (N, K, H, W).
    """
    exponent = _exponents(supervised, seen, alpha, beta)[:, None, None]
    return (1 - exponent) * supervised + exponent * frozen


def _exponents(like: Tensor, seen: Tensor, alpha: float,
               beta: float) -> Tensor:
    """Exponent of the frozen embedding for each class, shape (K, )."""
    return torch.where(seen, like.new_tensor(alpha), like.new_tensor(beta))


def check_exponents(alpha: float, beta: float, gamma: float) -> None:
    """Require exponents that are weights of a mean.

    Args:
        alpha (float): Exponent of the frozen embedding, seen classes.
        beta (float): Exponent of the frozen embedding, unseen classes.
        gamma (float): Exponent of the mask attention embedding.

    Raises:
        ValueError: If one is negative, or the remaining exponent of the
            supervised embedding is.
    """
    if min(alpha, beta, gamma) < 0 or max(alpha, beta) + gamma > 1 + 1e-6:
        raise ValueError(
            'The exponents must not be negative, nor `gamma` with `alpha` or '
            f'`beta` above 1, but got alpha={alpha}, beta={beta}, '
            f'gamma={gamma}.')


def seen_classes(classes: Vocabulary, trained: Vocabulary) -> List[bool]:
    """Match classes with those of the training by their names.

    A class counts as seen if its name, one of the synonyms in it ("sofa,
    couch") or one of its phrases is that of a class of the training. Case,
    punctuation and the ``-other`` and ``-stuff`` of COCO-Stuff are
    ignored.

    Args:
        classes (Vocabulary): The K classes to match.
        trained (Vocabulary): The classes of the training.

    Returns:
        list[bool]: For each class whether it was seen in training.
    """
    known: Set[str] = set()
    for words in map(_words, trained.names, trained.phrases):
        known |= words
    return [
        bool(_words(name, phrases) & known)
        for name, phrases in zip(classes.names, classes.phrases)
    ]


def _words(name: str, phrases: Sequence[str]) -> Set[str]:
    """Normalized spellings of the name and the phrases of a class."""
    found = set()
    for text in (*re.split(r'[,;/]', name), *phrases):
        text = re.sub(r'-(other|stuff)\b.*', '', text.lower())
        found.add(re.sub(r'[\W_]+', '', text))
    return found - {''}
