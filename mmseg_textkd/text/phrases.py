# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Vectors, confidence and ambiguity of the phrases of each class."""
from typing import Dict, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .embedding_file import TextEmbeddings

# CLIP's own factor on cosines, rounded.
CLIP_SCALE = 100.


def phrase_vectors(record: TextEmbeddings) -> Tuple[Tensor, Tensor]:
    """Average the vectors of each phrase over the templates.

    Args:
        record (TextEmbeddings): Embeddings with a bank.

    Returns:
        tuple[Tensor, Tensor]: Unit vectors, float32, with shape (K, R, D),
        zero where a class has fewer than R phrases; and where it has one,
        bool with shape (K, R).

    Raises:
        ValueError: If there is no bank, or not a vector for each phrase, or
            one in each template.
    """
    if record.bank is None or record.bank_mask is None:
        raise ValueError(
            'the embeddings file has no bank of phrases; make it with `python '
            'tools/encode_text.py ... --keep-bank` (in `build`: '
            'keep_bank=True).')
    num = max(len(record.templates), 1)
    found = record.bank_mask.sum(dim=1).tolist()
    if found == list(map(len, record.phrases)):
        num = 1  # averaged over the templates by whom they come from
    for name, phrases, vectors in zip(record.names, record.phrases, found):
        if vectors != num * len(phrases):
            raise ValueError(
                f'the bank has {vectors} vectors of {name!r}, but there are '
                f'{len(phrases)} phrases and {num} templates.')
    groups = record.bank.unflatten(1, (-1, num))
    mask = record.bank_mask.unflatten(1, (-1, num))[..., 0]
    return F.normalize(groups.mean(dim=2), dim=2), mask


def phrase_confidence(record: TextEmbeddings) -> Tensor:
    r"""Probability that a phrase is of its class, by CLIP's classifier.

    .. math::
        c_{kr} = \mathrm{softmax}_{j}(100 \cos(t_{kr}, t_{j0}))_{j=k}

    The classes of the classifier are the plain names :math:`t_{j0}`. Cosines
    alone tell little: those of CLIP are between 0.8 and 0.95 for synonyms,
    and not much less for words of other classes.

    Args:
        record (TextEmbeddings): Embeddings with a bank.

    Returns:
        Tensor: Confidences in [0, 1], float32, with shape (K, R); 0 where a
        class has fewer than R phrases.
    """
    vectors, mask = phrase_vectors(record)
    similarities = torch.einsum('krd,jd->krj', vectors, vectors[:, 0])
    scores = (CLIP_SCALE * similarities).softmax(dim=2)
    return scores.diagonal(dim1=0, dim2=2).T.where(mask, 0)


def ambiguous_phrases(record: TextEmbeddings) -> Dict[int, Set[str]]:
    """Find phrases that name another class as well.

    The plain name of a class, its first phrase, belongs to it alone.

    Args:
        record (TextEmbeddings): Names and phrases.

    Returns:
        dict[int, set[str]]: By class, the phrases that it must not use.
    """
    owners: Dict[str, Set[int]] = {}
    for k, (name, phrases) in enumerate(zip(record.names, record.phrases)):
        for words in (name, *phrases):
            owners.setdefault(_normalize(words), set()).add(k)
    found: Dict[int, Set[str]] = {}
    for k, phrases in enumerate(record.phrases):
        shared = {p for p in phrases[1:] if len(owners[_normalize(p)]) > 1}
        if shared:
            found[k] = shared
    return found


def _normalize(words: str) -> str:
    """Normalize a phrase to lower case without underscores."""
    return words.strip().lower().replace('_', ' ')
