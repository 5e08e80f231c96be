# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""EBSeg's balance of several embeddings at inference."""
import re
from typing import List, Set

import torch
from torch import Tensor

from mmseg_textkd.text import Vocabulary


def balance_probabilities(a: Tensor,
                          b: Tensor,
                          d: Tensor,
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
        a (Tensor): Probabilities by the fully supervised embedding, shape
            (..., K).
        b (Tensor): Probabilities by the mask attention embedding, same shape.
        d (Tensor): Probabilities by the frozen embedding, same shape.
        seen (Tensor): Bool with shape (K, ): class seen in training.
        alpha (float): Exponent of ``d`` for seen classes. Defaults to 0.09.
        beta (float): Exponent of ``d`` for new classes. Defaults to 0.3.
        gamma (float): Exponent of ``b``. Defaults to 0.7.

    Returns:
        Tensor: Combined scores with shape (..., K); they do not sum to 1.

    Raises:
        ValueError: If an exponent is negative.
    """
    check_exponents(alpha, beta, gamma)
    share = _exponents(a, seen, alpha, beta)
    # 1 - 0.3 - 0.7 is -5.6e-17: without the bound a zero would become inf.
    rest = (1 - share - gamma).clamp(min=0)
    return a**rest * d**share * b**gamma


def balance_logarithms(a: Tensor, d: Tensor, seen: Tensor, alpha: float,
                       beta: float) -> Tensor:
    r"""The same of two embeddings, at every pixel, in logarithms.

    .. math::
        \log p_k = (1 - \lambda_k) \log a_k + \lambda_k \log d_k

    Small probabilities do not vanish in float32, and what is resized is
    finite.

    Args:
        a (Tensor): Logarithms of the probabilities by the supervised
            embedding, shape (N, K, H, W).
        d (Tensor): Those by the frozen or distilled embedding, same shape.
        seen (Tensor): Bool with shape (K, ): class seen in training.
        alpha (float): Exponent of ``d`` for seen classes.
        beta (float): Exponent of ``d`` for new classes.

    Returns:
        Tensor: Combined scores with shape (N, K, H, W).
    """
    share = _exponents(a, seen, alpha, beta)[:, None, None]
    return (1 - share) * a + share * d


def _exponents(like: Tensor, seen: Tensor, alpha: float,
               beta: float) -> Tensor:
    """The exponent of ``d`` for each class, shape (K, )."""
    return torch.where(seen, like.new_tensor(alpha), like.new_tensor(beta))


def check_exponents(alpha: float, beta: float, gamma: float) -> None:
    """Refuse exponents that are no weights of a mean.

    Args:
        alpha (float): Exponent of the frozen embedding, seen classes.
        beta (float): Exponent of the frozen embedding, new classes.
        gamma (float): Exponent of the mask attention embedding.

    Raises:
        ValueError: If one is negative or what is left for the supervised
            embedding is.
    """
    if min(alpha, beta, gamma) < 0 or max(alpha, beta) + gamma > 1 + 1e-6:
        raise ValueError(
            'The exponents must not be negative, nor `gamma` with `alpha` or '
            f'`beta` above 1, but got alpha={alpha}, beta={beta}, '
            f'gamma={gamma}.')


def seen_classes(classes: Vocabulary, trained: Vocabulary) -> List[bool]:
    """Tell which classes were seen in training, by their names.

    A class counts as seen if its name, one of the synonyms in it ("sofa,
    couch") or one of its phrases is that of a class of the training. Case,
    punctuation and the ``-other`` and ``-stuff`` of COCO-Stuff are passed
    over.

    Args:
        classes (Vocabulary): The K classes in question.
        trained (Vocabulary): The classes of the training.

    Returns:
        list[bool]: K values.
    """
    known: Set[str] = set()
    for words in map(_words, trained.names, trained.phrases):
        known |= words
    return [
        bool(_words(name, phrases) & known)
        for name, phrases in zip(classes.names, classes.phrases)
    ]


def _words(name: str, phrases: List[str]) -> Set[str]:
    """All that a class is called, in plain spelling."""
    found = set()
    for text in (*re.split(r'[,;/]', name), *phrases):
        text = re.sub(r'-(other|stuff)\b.*', '', text.lower())
        found.add(re.sub(r'[\W_]+', '', text))
    return found - {''}
