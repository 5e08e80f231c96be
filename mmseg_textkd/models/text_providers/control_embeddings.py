# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Optional

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor

from .phrase_bank import PhraseBank
from .text_provider import FixedProvider

KINDS = ('random', 'shuffled', 'onehot', 'noise')


@MODELS.register_module()
class ControlEmbeddings(FixedProvider):
    """Control class embeddings without the meaning of the class names.

    A gain that these reach too does not come from language. They take the
    place of ``ClassEmbeddings`` in a config, with everything else unchanged.

    Args:
        kind (str): 'random': orthonormal rows from a seeded normal matrix.
            'shuffled': the rows of ``embeddings`` permuted so that no class
            keeps its own, which leaves the geometry and takes the names
            away. 'onehot': row k is the k-th unit vector. 'noise': the rows
            of ``embeddings`` as they are, for ``phrases`` around them.
        num_classes (int): Number of classes K. The head passes its own.
        dim (int, optional): Width D. Defaults to None: 512 for 'random', K
            for 'onehot', and that of ``embeddings`` for the others.
        seed (int): Seed of the draw. Defaults to 0.
        embeddings (dict, optional): Config of the provider whose rows are
            taken for 'shuffled' and 'noise'. Defaults to None. Phrases of a
            ``SynonymSampler`` are shuffled with the rows.
        phrases (int): With more than one, training draws one of so many
            vectors for each image and class, as with ``SynonymSampler``: the
            row and random ones around it. A gain that these reach too comes
            from the noise and not from the synonyms. Defaults to 1.
        cosine (float): Cosine of those to the row. Defaults to 0.9, about
            that of synonyms by CLIP.

    Raises:
        ValueError: If the kind is unknown or its arguments do not fit.
    """

    def __init__(self,
                 kind: str,
                 num_classes: int,
                 dim: Optional[int] = None,
                 seed: int = 0,
                 embeddings: Optional[dict] = None,
                 phrases: int = 1,
                 cosine: float = 0.9) -> None:
        if kind not in KINDS:
            raise ValueError(
                f'unknown kind of control embeddings {kind!r}; choose one of '
                f'{KINDS}.')
        if (kind in ('shuffled', 'noise')) != (embeddings is not None):
            raise ValueError(
                "`embeddings` belongs to kind='shuffled' and 'noise' and to "
                f'no other; got kind={kind!r} with embeddings={embeddings}.')
        least = 2 if kind == 'noise' else 1
        if phrases < least or (phrases > 1 and kind == 'shuffled'):
            raise ValueError("`phrases` must be at least 1, at least 2 for "
                             "kind='noise' and 1 for kind='shuffled', but "
                             f'got {phrases} for {kind!r}.')
        if not 0 <= cosine < 1:
            raise ValueError(f'`cosine` must be in [0, 1), got {cosine}.')
        source: Any = None
        if embeddings is not None:
            source = MODELS.build(
                embeddings, default_args=dict(num_classes=num_classes))
            dim = source.dim
        elif dim is None:
            dim = 512 if kind == 'random' else num_classes
        if kind in ('random', 'onehot') and dim < num_classes:
            raise ValueError(
                f'{num_classes} orthogonal rows do not fit into dim={dim}; '
                'give a `dim` of at least the number of classes.')
        super().__init__(
            num_classes, dim, names=None if source is None else source.names)
        self.kind = kind
        self.centered = getattr(source, 'centered', False)
        generator = torch.Generator().manual_seed(seed)
        if kind == 'random':
            self._source = torch.linalg.qr(
                torch.randn(dim, num_classes, generator=generator))[0].T
        elif kind == 'onehot':
            self._source = torch.eye(num_classes, dim)
        elif source.filled:
            rows = torch.arange(num_classes)
            if kind == 'shuffled':
                rows = derangement(num_classes, generator)
            self._source = source.class_embeddings[rows]
            if source.phrase_bank is not None:
                self.phrase_bank = source.phrase_bank.select(rows)
        else:
            self._missing_hint = source._missing_hint
            if kind == 'noise':
                self._bank_hint = self._missing_hint
        if self._source is not None:
            self.fill(self._source)
        if phrases > 1 and self._source is not None:
            vectors = around(self.class_embeddings, phrases, cosine, generator)
            self.phrase_bank = PhraseBank(
                vectors, torch.full((num_classes, phrases), 1 / phrases))


def around(rows: Tensor, number: int, cosine: float,
           generator: torch.Generator) -> Tensor:
    """Sample unit vectors at a given cosine to others.

    Args:
        rows (Tensor): Unit rows with shape (K, D).
        number (int): Number R of vectors for each, the row itself included.
        cosine (float): Cosine of the others to their row.
        generator (torch.Generator): Source of randomness.

    Returns:
        Tensor: Unit vectors with shape (K, R, D), the rows first.
    """
    rows = rows[:, None]
    noise = torch.randn(
        len(rows), number - 1, rows.shape[-1], generator=generator)
    noise = noise - (noise * rows).sum(dim=2, keepdim=True) * rows
    others = cosine * rows + (1 - cosine**2)**0.5 * F.normalize(noise, dim=2)
    return torch.cat([rows, others], dim=1)


def derangement(num: int, generator: torch.Generator) -> Tensor:
    """Sample a permutation without a fixed point.

    Args:
        num (int): Number of elements, at least 2.
        generator (torch.Generator): Source of randomness.

    Returns:
        Tensor: Long tensor with shape (num, ).

    Raises:
        ValueError: If there are fewer than two elements.
    """
    if num < 2:
        raise ValueError(f'{num} class cannot be shuffled; give at least 2.')
    identity = torch.arange(num)
    while True:  # succeeds with probability of about 1/e each time
        order = torch.randperm(num, generator=generator)
        if not (order == identity).any():
            return order
