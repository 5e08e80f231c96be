# Copyright (c) mmseg_textkd contributors. All rights reserved.
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.io import DamagedFileError, digest, read_hashed, write_hashed
from .vector_import import EmbeddingFileError, read_names, read_vectors, sniff

__all__ = ['EmbeddingFileError', 'TextEmbeddings']

PathLike = Union[str, os.PathLike]
KIND = 'mmseg_textkd.class_embeddings.1'
TEXTS = ('names', 'phrases', 'templates', 'model', 'pretrained', 'library')


# Compared by identity: tensors have no truth value.
@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Class embeddings with their names, phrases and sources, and their file.

    Args:
        vectors (Tensor): Float32 unit rows with shape (K, D).
        names (tuple[str]): K class names in label order.
        phrases (tuple[tuple[str]]): The phrases of each class. Defaults to
            (), the names themselves.
        templates (tuple[str]): Prompt templates. Defaults to (), unknown.
        model (str): Name of the text tower. Defaults to ''.
        pretrained (str): Tag or file of its weights. Defaults to ''.
        library (str): Library and version that encoded. Defaults to ''.
        bank (Tensor, optional): Float32 with shape (K, R, D): a unit vector
            for each phrase in each template (number p·T+t for phrase p and
            template t of T), zero where padded. Defaults to None.
        bank_mask (Tensor, optional): Bool with shape (K, R), false where
            padded. Defaults to None.

    Raises:
        EmbeddingFileError: If shapes, types or names do not fit, or vectors
            are not finite or not of unit length.
    """

    vectors: Tensor
    names: Tuple[str, ...]
    phrases: Tuple[Tuple[str, ...], ...] = ()
    templates: Tuple[str, ...] = ()
    model: str = ''
    pretrained: str = ''
    library: str = ''
    bank: Optional[Tensor] = None
    bank_mask: Optional[Tensor] = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, 'names', tuple(self.names))
        phrases = self.phrases or ((name, ) for name in self.names)
        set_field(self, 'phrases', tuple(map(tuple, phrases)))
        set_field(self, 'templates', tuple(self.templates))
        set_field(self, 'pretrained', self.pretrained or '')
        self._check_vectors()
        self._check_names()
        if (self.bank is None) != (self.bank_mask is None):
            raise EmbeddingFileError('A bank needs a bank_mask and only it.')
        if self.bank is not None:
            self._check_bank()

    def _check_vectors(self) -> None:
        """Require float32, K×D, finite, unit rows."""
        vectors = self.vectors
        if (vectors.dtype != torch.float32 or vectors.dim() != 2
                or 0 in vectors.shape):
            raise EmbeddingFileError(
                'The vectors must be float32 with shape (K, D), but are '
                f'{vectors.dtype} with shape {tuple(vectors.shape)}.')
        finite = vectors.isfinite().all(dim=1)
        if not finite.all():
            rows = (~finite).nonzero().flatten().tolist()
            raise EmbeddingFileError(
                f'NaN or infinity in the vectors of the rows {rows[:10]} '
                f'({len(rows)} of {len(vectors)}).')
        norms = vectors.norm(dim=1)
        worst = int((norms - 1).abs().argmax())
        if abs(norms[worst] - 1) > 1e-3:
            raise EmbeddingFileError(
                f'The vectors must have unit length, but row {worst} has '
                f'length {norms[worst]:.4g}.')

    def _check_names(self) -> None:
        """Require a unique name and phrases for each row."""
        empty = [k for k, n in enumerate(self.names) if not str(n).strip()]
        twice = sorted(n for n, c in Counter(self.names).items() if c > 1)
        if empty or twice:
            raise EmbeddingFileError(
                f'Class names must be there and differ, but the rows {empty} '
                f'have none and {twice} occur more than once.')
        for what in ('names', 'phrases'):
            if len(getattr(self, what)) != len(self.vectors):
                raise EmbeddingFileError(f'{len(self.vectors)} vectors for '
                                         f'{len(getattr(self, what))} {what}.')

    def _check_bank(self) -> None:
        """Require a phrase bank of the shapes of the vectors and its mask."""
        bank, mask = self.bank, self.bank_mask
        assert bank is not None and mask is not None
        if (bank.dtype != torch.float32 or bank.dim() != 3
                or bank.shape[::2] != self.vectors.shape
                or mask.dtype != torch.bool or mask.shape != bank.shape[:2]):
            raise EmbeddingFileError(
                'The bank must be float32 with shape (K, R, D) and its mask '
                f'bool with shape (K, R), but they are {bank.dtype} '
                f'{tuple(bank.shape)} and {mask.dtype} {tuple(mask.shape)} '
                f'for vectors of shape {tuple(self.vectors.shape)}.')
        # A norm that is NaN compares as too far from 1, as it should.
        close = (bank.norm(dim=2) - mask.float()).abs() <= 1e-3
        if not (close.all() and mask.any(dim=1).all()):
            raise EmbeddingFileError(
                'The bank must have at least one vector for each class, of '
                'unit length where its mask is true and zero elsewhere.')

    def __len__(self) -> int:
        return len(self.names)

    @property
    def dim(self) -> int:
        """Int: Width D of the vectors."""
        return self.vectors.shape[1]

    @property
    def sha256(self) -> str:
        """Str: Hash over all texts and tensors."""
        return digest(self._texts(), self._tensors())

    def _texts(self) -> Dict[str, str]:
        """Get all metadata as JSON."""
        return {
            name: json.dumps(getattr(self, name), ensure_ascii=False)
            for name in TEXTS
        }

    def _tensors(self) -> Dict[str, Tensor]:
        """Get the tensors to write."""
        tensors = dict(
            vectors=self.vectors, bank=self.bank, bank_mask=self.bank_mask)
        return {
            name: value.detach().cpu().contiguous()
            for name, value in tensors.items() if value is not None
        }

    def save(self, path: PathLike) -> None:
        """Write the safetensors file atomically.

        Args:
            path (str or PathLike): The file. Folders are made.
        """
        write_hashed(path, KIND, self._tensors(), self._texts())

    @classmethod
    def load(cls, path: PathLike) -> 'TextEmbeddings':
        """Read and verify a file that :meth:`save` wrote.

        Args:
            path (str or PathLike): The file.

        Returns:
            TextEmbeddings: Its content.

        Raises:
            FileNotFoundError: If there is no such file.
            EmbeddingFileError: If it is of another kind, damaged or changed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f'There is no embeddings file {path}. Make it with `python '
                f'tools/encode_text.py DATASET --model MODEL --out {path}`.')
        try:
            tensors, texts = _read_file(path)
            fields: Dict[str, Any] = {n: json.loads(texts[n]) for n in TEXTS}
            return cls(**dict(fields, **tensors))
        except EmbeddingFileError as error:
            raise EmbeddingFileError(
                f'Embeddings file {path}: {error}') from error.__cause__

    def check_names(self, names: Sequence[str], where: str) -> None:
        """Require class names that are equal to these, in this order.

        Args:
            names (Sequence[str]): The names to compare with.
            where (str): Where they come from, for the message.

        Raises:
            EmbeddingFileError: If they differ, with the differences.
        """
        names = tuple(names)
        if names == self.names:
            return
        lines: List[str] = []
        missing = [n for n in names if n not in self.names]
        unexpected = [n for n in self.names if n not in names]
        if missing:
            lines.append(f'missing here: {missing}')
        if unexpected:
            lines.append(f'unexpected here: {unexpected}')
        if len(names) != len(self.names):
            lines.append(f'number: {len(self.names)} instead of {len(names)}')
        if not missing and not unexpected:
            lines.append('the names are the same, but in another order or '
                         'number')
        first = [(k, mine, theirs)
                 for k, (mine, theirs) in enumerate(zip(self.names, names))
                 if mine != theirs][:3]
        lines += [
            f'position {k}: {mine!r} instead of {theirs!r}'
            for k, mine, theirs in first
        ]
        raise EmbeddingFileError(
            'The text embeddings are for other classes than '
            f'{where}:\n  ' + '\n  '.join(lines))

    def renamed(self, names: Sequence[str]) -> 'TextEmbeddings':
        """Adopt another spelling and order of the same classes.

        Imported vectors often say "sign symbol" where a dataset says
        "signsymbol". Case, spaces and punctuation are passed over.

        Args:
            names (Sequence[str]): The names as they should be.

        Returns:
            TextEmbeddings: The same classes under these names.

        Raises:
            EmbeddingFileError: If they are not the same classes.
        """
        if tuple(names) == self.names:
            return self
        mine = [_normalize_name(name) for name in self.names]
        bare = [_normalize_name(name) for name in names]
        if sorted(mine) != sorted(bare) or len(set(mine)) < len(mine):
            self.check_names(names, 'the wanted names')
        rows = [mine.index(name) for name in bare]
        bank = None if self.bank is None else self.bank[rows]
        mask = None if self.bank_mask is None else self.bank_mask[rows]
        return replace(
            self,
            vectors=self.vectors[rows],
            names=tuple(names),
            phrases=tuple(self.phrases[row] for row in rows),
            bank=bank,
            bank_mask=mask)

    @classmethod
    def from_vectors(
            cls, path: PathLike, names: Union[PathLike, Sequence[str],
                                              Mapping]) -> 'TextEmbeddings':
        """Import plain K×D vectors, without unpickling anything.

        Rows are brought to unit length.

        Args:
            path (str or PathLike): ``.npy``, ``.pt``, ``.pth`` (a tensor or a
                dict with one) or ``.safetensors`` with one tensor.
            names (str or PathLike or Sequence[str]): The class names in row
                order; or a ``.txt`` file with one per line; or a ``.json``
                file with a list, or with a dict with ``names`` and, if
                known, ``phrases``, ``template`` or ``templates``, ``model``,
                ``pretrained`` and ``library``.

        Returns:
            TextEmbeddings: The imported vectors.

        Raises:
            FileNotFoundError: If a file is missing.
            EmbeddingFileError: If a file is not as described, or there are
                not as many names as vectors.
        """
        known = read_names(names)
        known.setdefault('library', f'imported from {Path(path).name}')
        known['phrases'] = tuple(
            (phrase, ) if isinstance(phrase, str) else tuple(phrase)
            for phrase in known.get('phrases', ()))
        try:
            vectors = read_vectors(path)
            if len(vectors) != len(known['names']):
                raise EmbeddingFileError(
                    f'it has {len(vectors)} vectors, but there are '
                    f'{len(known["names"])} names: {known["names"]}')
            return cls(vectors=F.normalize(vectors, dim=1), **known)
        except EmbeddingFileError as error:
            raise EmbeddingFileError(
                f'Vectors {path}: {error}') from error.__cause__


def _normalize_name(name: str) -> str:
    """Normalize a name to lower case without spaces and punctuation."""
    return re.sub(r'[\W_]+', '', name.lower())


def _read_file(path: Path) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Read and verify a file of class embeddings.

    Args:
        path (Path): The file.

    Returns:
        tuple[dict[str, Tensor], dict[str, str]]: Tensors and texts.

    Raises:
        EmbeddingFileError: If it is of another kind, damaged or changed.
    """
    remedy = (f'`python tools/encode_text.py --import {path} --names-file '
              'NAMES.json --out FILE.safetensors`.')
    try:
        tensors, texts = read_hashed(path, KIND)
    except DamagedFileError as error:
        kind = sniff(path)
        if kind != 'safetensors':
            raise EmbeddingFileError(
                f'It is no embeddings file but {kind}. If it holds plain '
                f'vectors, import it: {remedy}') from error
        raise EmbeddingFileError(
            f'{error} Make it anew. Plain vectors are imported with {remedy}'
        ) from error
    allowed = {'vectors', 'bank', 'bank_mask'}
    if ('vectors' not in tensors or set(tensors) - allowed
            or set(TEXTS) - set(texts)):
        raise EmbeddingFileError(
            'It is a safetensors file, but none of class embeddings: it has '
            f'the tensors {sorted(tensors)} and the texts {sorted(texts)}.')
    return tensors, {name: texts[name] for name in TEXTS}
