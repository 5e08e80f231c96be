# Copyright (c) mmseg_textkd contributors. All rights reserved.
import hashlib
import os
from typing import Any, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor

from mmseg_textkd.text import (ContextPromptLearner, TextEmbeddings, TextTower,
                               Vocabulary, get_templates)
from mmseg_textkd.text.build import encode_classes
from mmseg_textkd.text.text_tower import load_tower
from .text_cache import cached

# Classes at a time: token ids of all sentences of 10,000 would take 350 MB.
BLOCK = 256
Spec = Mapping[str, Optional[str]]


class WordTower:
    """Encode words by a text tower, or take them from the cache.

    Args:
        dim (int): Width that the vectors must have.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.text_cache.default_cache_dir`.
        weights_dir (str or PathLike, optional): Where the tower's weights are
            looked for, see :class:`TextTower`. Defaults to None.
    """

    def __init__(
            self,
            dim: int,
            cache_dir: Optional[Union[str, os.PathLike]] = None,
            weights_dir: Optional[Union[str, os.PathLike]] = None) -> None:
        self.dim, self.cache_dir = dim, cache_dir
        self.weights_dir = weights_dir
        # Kept so that the next words need not load it again.
        self._tower: Optional[TextTower] = None

    def in_templates(self, words: Vocabulary, spec: Spec,
                     templates: Any) -> Tensor:
        """Encode phrases in templates.

        Args:
            words (Vocabulary): K classes.
            spec (Mapping): ``model`` and ``pretrained`` of the tower.
            templates: See :func:`get_templates`.

        Returns:
            Tensor: Unit rows with shape (K, D).

        Raises:
            TextTowerError: If the tower cannot be had.
            ValueError: If it is of another width, or a sentence longer than
                its context.
        """
        templates = get_templates(templates)

        def make() -> TextEmbeddings:
            tower = self._hold(spec)
            blocks = [
                encode_classes(block, tower, templates).vectors
                for block in _blocks(words)
            ]
            return TextEmbeddings(
                torch.cat(blocks), words.names, words.phrases,
                tuple(templates), spec['model'], spec['pretrained'] or '',
                tower.library)

        made_of = dict(tower=spec, templates=templates, words=_fields(words))
        return cached(made_of, make, self.cache_dir).vectors

    @torch.no_grad()
    def in_context(self, learned: ContextPromptLearner,
                   shift: Optional[Tensor], words: Vocabulary,
                   spec: Spec) -> Tensor:
        """Encode the first phrase of each class in the learned context.

        Args:
            learned (ContextPromptLearner): The prompts, one context for all.
            shift (Tensor, optional): What is taken from all vectors.
            words (Vocabulary): K classes.
            spec (Mapping): ``model`` and ``pretrained`` of the tower.

        Returns:
            Tensor: Unit rows with shape (K, D).

        Raises:
            TextTowerError: If the tower cannot be had.
            ValueError: If it is of another width, or a sentence longer than
                its context.
        """
        context = learned.context.detach().cpu().float()
        digest = hashlib.sha256(context.numpy().tobytes())
        if shift is not None:
            digest.update(shift.numpy().tobytes())

        def make() -> TextEmbeddings:
            tower = self._hold(spec)
            blocks = []
            for block in _blocks(words):
                learner = ContextPromptLearner(
                    dict(type='ClassEmbeddings', file='', dim=learned.dim),
                    len(block),
                    spec['model'],
                    spec['pretrained'],
                    token_dim=learned.token_dim,
                    n_ctx=learned.n_ctx,
                    suffix=learned.suffix,
                    vocabulary=block)
                learner.context.data.copy_(context)
                learner.shift = shift
                learner.started.fill_(True)
                learner.prepare()
                blocks.append(learner.compute().detach().cpu())
            return TextEmbeddings(
                torch.cat(blocks), words.names, words.phrases, (),
                spec['model'], spec['pretrained'] or '', tower.library)

        made_of = dict(
            tower=spec,
            context=digest.hexdigest(),
            suffix=learned.suffix,
            words=_fields(words))
        return cached(made_of, make, self.cache_dir).vectors

    def from_file(self, record: TextEmbeddings, words: Vocabulary,
                  spec: Spec) -> Tensor:
        """Take vectors from an embeddings file.

        Args:
            record (TextEmbeddings): The file.
            words (Vocabulary): K classes.
            spec (Mapping): ``model`` and ``pretrained`` of the tower.

        Returns:
            Tensor: Unit rows with shape (K, D).

        Raises:
            ValueError: If a name is missing, or the file is of another tower
                or width.
        """
        place = {name: row for row, name in enumerate(record.names)}
        missing = [name for name in words.names if name not in place]
        if missing:
            raise ValueError(
                f'the embeddings file has no vectors for {missing[:10]}'
                f'{" and more" if len(missing) > 10 else ""}; it has '
                f'{list(record.names[:10])}'
                f'{" and more" if len(record) > 10 else ""}.')
        if record.dim != self.dim:
            raise ValueError(
                f'the embeddings file has vectors of width {record.dim}, but '
                f'this network was trained with width {self.dim}.')
        known = spec['model'], spec['pretrained'] or ''
        made_by = record.model, record.pretrained
        if spec['model'] and record.model and known != made_by:
            raise ValueError(
                f'the vectors in the embeddings file are of the tower '
                f'{made_by}, but this network was trained with those of '
                f'{known}. They do not lie in the same space.')
        return record.vectors[[place[name] for name in words.names]]

    def _hold(self, spec: Spec) -> TextTower:
        """Load the tower, once."""
        self._tower = load_tower(spec['model'], spec['pretrained'],
                                 self.weights_dir)
        if self._tower.dim != self.dim:
            raise ValueError(
                f'the tower {spec["model"]!r} gives vectors of width '
                f'{self._tower.dim}, but this network was trained with width '
                f'{self.dim}: it is another tower.')
        return self._tower


def _fields(words: Vocabulary) -> Tuple[Tuple, Tuple]:
    """Names and phrases, as they are written."""
    return words.names, words.phrases


def _blocks(words: Vocabulary) -> List[Vocabulary]:
    """Parts of a vocabulary."""
    return [
        Vocabulary(words.names[i:i + BLOCK], words.phrases[i:i + BLOCK])
        for i in range(0, len(words), BLOCK)
    ]
