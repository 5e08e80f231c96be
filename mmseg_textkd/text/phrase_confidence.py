# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""How sure it is that a phrase stands for its class."""
from pathlib import Path
from typing import Iterable, Tuple

import torch
from torch import Tensor

from ..utils.io import DamagedFileError, read_hashed, write_hashed
from .embedding_file import EmbeddingFileError, TextEmbeddings
from .phrase_bank import phrase_vectors
from .region_embeddings import RegionEmbeddings
from .text_weights import PathLike

KIND = 'mmseg_textkd.phrase_confidence.1'
# What CLIP has learned, rounded.
CLIP_SCALE = 100.


def text_confidence(record: TextEmbeddings) -> Tensor:
    r"""Classify the phrases by the plain names of the classes.

    .. math::
        c_{kr} = \mathrm{softmax}_{j}(100 \cos(t_{kr}, t_{j0}))_{j=k}

    Cosines alone tell little: those of real CLIP are between 0.8 and 0.95 for
    synonyms, and not much less for words of other classes.

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


def image_confidence(
        record: TextEmbeddings,
        regions: Iterable[RegionEmbeddings]) -> Tuple[Tensor, Tensor]:
    r"""Let regions of the classes choose among the phrases.

    .. math::
        c_{kr} = \frac{1}{|V_k|} \sum_{v \in V_k}
        \mathrm{softmax}_{q}(100 \cos(v, t_{kq}))_{q=r}

    over the image embeddings :math:`V_k` of all regions of class k. In the
    source, `Global Knowledge Calibration <https://arxiv.org/abs/2303.09181>`_,
    each region has phrases of its own; the mean makes it one small table.

    Args:
        record (TextEmbeddings): Embeddings with a bank, of the same model.
        regions (Iterable[RegionEmbeddings]): Those of each image.

    Returns:
        tuple[Tensor, Tensor]: Confidences in [0, 1], float32, with shape
        (K, R), by :func:`text_confidence` for a class without a region; and
        the number of regions of each class, int64, with shape (K, ).

    Raises:
        ValueError: If the widths differ.
    """
    vectors, mask = phrase_vectors(record)
    sums = torch.zeros(mask.shape, dtype=torch.float64)
    counts = torch.zeros(len(record), dtype=torch.int64)
    for labels, embeddings in regions:
        if embeddings.shape[1] != record.dim:
            raise ValueError(
                f'the image embeddings have width {embeddings.shape[1]}, the '
                f'text has {record.dim}. Use the image tower of the model '
                'that encoded the text.')
        similarities = torch.einsum('nd,nrd->nr', embeddings, vectors[labels])
        similarities.masked_fill_(~mask[labels], float('-inf'))
        scores = (CLIP_SCALE * similarities).softmax(dim=1)
        sums.index_add_(0, labels, scores.double())
        counts.index_add_(0, labels, torch.ones_like(labels))
    means = (sums / counts.clamp(min=1)[:, None]).float()
    return means.where(counts[:, None] > 0, text_confidence(record)), counts


def confidence_file(file: PathLike) -> Path:
    """Tell where the confidences of an embeddings file lie.

    Args:
        file (str or PathLike): The embeddings file.

    Returns:
        Path: The file beside it.
    """
    return Path(file).with_suffix('.confidence.safetensors')


def save_confidence(file: PathLike, record: TextEmbeddings, scores: Tensor,
                    regions: Tensor, source: str) -> Path:
    """Write confidences beside the embeddings file that they belong to.

    Args:
        file (str or PathLike): The embeddings file.
        record (TextEmbeddings): Its content.
        scores (Tensor): Confidences with shape (K, R).
        regions (Tensor): How many regions of each class they are of, int64,
            with shape (K, ).
        source (str): What they were made with, for people to read.

    Returns:
        Path: The file; readers never see half of it.
    """
    tensors = dict(
        confidence=scores.float().cpu().contiguous(),
        regions=regions.cpu().contiguous())
    path = confidence_file(file)
    write_hashed(path, KIND, tensors,
                 dict(embeddings=record.sha256, source=source))
    return path


def load_confidence(file: PathLike, record: TextEmbeddings) -> Tensor:
    """Read what :func:`save_confidence` wrote.

    Args:
        file (str or PathLike): The embeddings file.
        record (TextEmbeddings): Its content.

    Returns:
        Tensor: Confidences, float32, with shape (K, R).

    Raises:
        FileNotFoundError: If they are not there.
        EmbeddingFileError: If they are damaged, or of other embeddings.
    """
    path = confidence_file(file)
    remedy = f'Make it with `python tools/score_synonyms.py CONFIG {file}`.'
    if not path.is_file():
        raise FileNotFoundError(f'there are no confidences {path}. {remedy}')
    try:
        tensors, texts = read_hashed(path, KIND)
    except DamagedFileError as error:
        raise EmbeddingFileError(
            f'Confidences {path}: {error} {remedy}') from error
    if texts['embeddings'] != record.sha256:
        raise EmbeddingFileError(
            f'Confidences {path}: they belong to other embeddings than those '
            f'that are in {file} now. {remedy}')
    return tensors['confidence']
