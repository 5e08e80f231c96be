# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Vectors for words that a text network was not trained with."""
import hashlib
import logging
import os
from typing import (Any, Dict, List, Mapping, NamedTuple, Optional, Sequence,
                    Tuple, Union)

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from mmseg_textkd.models import TextHeadMixin
from mmseg_textkd.text import (ContextPromptLearner, TextEmbeddings, TextTower,
                               Vocabulary, get_templates)
from mmseg_textkd.text.build import encode_classes
from mmseg_textkd.text.text_tower import load_tower
from .text_cache import cached

# Classes at a time: token ids of all sentences of 10,000 would take 350 MB.
BLOCK = 256
# Below it the vectors are hardly those of the same tower: of two towers it is
# about 0, of one with other templates above 0.8.
ALIKE = 0.5


class NewClasses(NamedTuple):
    """Classes that a network is to be asked for.

    Attributes:
        names (tuple[str]): K names.
        vectors (Tensor): Their vectors, float32, shape (K, D).
        trained (list[int | None]): For each the number of the class that the
            network was trained with, None for a new one.
        source (str): Where the vectors come from, in words.
    """
    names: Tuple[str, ...]
    vectors: Tensor
    trained: List[Optional[int]]
    source: str


class WordEncoder:
    """Put words into the space in which a network was trained.

    The name of a trained class keeps the vector that was learned for it.
    Other names are encoded by the tower that made the embeddings file: with
    the learned context of ``ContextPromptLearner`` where that is one for all
    classes, else in the templates of the file. What was learned for each
    class (context of its own, offsets, mixtures) does not exist for a new
    one.

    Args:
        head (TextHeadMixin): The head, with its weights.
        text (Mapping): The config of its text provider.
        names (Sequence[str]): The classes that it was trained with.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.text_cache.default_cache_dir`.
    """

    def __init__(self,
                 head: TextHeadMixin,
                 text: Mapping[str, Any],
                 names: Sequence[str],
                 cache_dir: Optional[Union[str, os.PathLike]] = None) -> None:
        self.provider = head.text.text
        self.names, self.cache_dir = tuple(names), cache_dir
        self.learner = text['type'].split('.')[-1]
        self.embeddings = text.get('embeddings') or text
        self.record: Optional[TextEmbeddings] = getattr(
            self.provider, 'record', None)
        # Kept so that the next words need not load it again.
        self._tower: Optional[TextTower] = None

    def encode(
            self,
            classes: Any,
            tower: Optional[str] = None,
            pretrained: Optional[str] = None,
            templates: Any = None,
            embeddings: Optional[Union[str,
                                       os.PathLike]] = None) -> NewClasses:
        """Find vectors for classes.

        Args:
            classes: See :meth:`Vocabulary.from_spec`.
            tower (str, optional): Name of the text tower, see
                :class:`TextTower`. Defaults to None: what the embeddings
                file or the config names.
            pretrained (str, optional): Tag or file of its weights. Defaults
                to None.
            templates: See :func:`get_templates`. Defaults to None: those of
                the embeddings file or the config, else 'vild'.
            embeddings (str or PathLike, optional): An embeddings file to take
                the vectors of new names from, instead of a tower. Defaults to
                None.

        Returns:
            NewClasses: The classes.

        Raises:
            FileNotFoundError: If there is no such file.
            TextTowerError: If the tower cannot be had.
            ValueError: If there is no class, one occurs twice, a sentence is
                longer than the tower's context, or there can be no vectors.
        """
        record = None
        if embeddings is not None:
            record = TextEmbeddings.load(embeddings)
        vocabulary = Vocabulary.from_spec(classes)
        trained = [self._trained(*pair) for pair in zip(*_fields(vocabulary))]
        new = [k for k, number in enumerate(trained) if number is None]
        vectors = self.provider.class_embeddings.new_zeros(
            len(vocabulary), self.provider.dim)
        for k, number in enumerate(trained):
            if number is not None:
                vectors[k] = self.provider.class_embeddings[number]
        source = 'as trained'
        if new:
            words = Vocabulary(
                tuple(vocabulary.names[k] for k in new),
                tuple(vocabulary.phrases[k] for k in new))
            found, source = self._new(words, record, tower, pretrained,
                                      templates)
            vectors[new] = found.to(vectors)
            if len(new) < len(vocabulary):
                source += f'; {len(vocabulary) - len(new)} as trained'
        return NewClasses(vocabulary.names, vectors, trained, source)

    def _trained(self, name: str, phrases: Tuple[str, ...]) -> Optional[int]:
        """Number of the trained class of this name and no other phrase."""
        if name in self.names and phrases == (name.replace('_', ' '), ):
            return self.names.index(name)
        return None

    def _new(self, words: Vocabulary, record: Optional[TextEmbeddings],
             tower: Optional[str], pretrained: Optional[str],
             templates: Any) -> Tuple[Tensor, str]:
        """Vectors of names that the network has not been trained with."""
        kind = self.embeddings['type'].split('.')[-1]
        if kind == 'ControlEmbeddings':
            raise ValueError(
                'this network was trained with ControlEmbeddings, vectors '
                'that know nothing of language: only the names of its own '
                f'classes mean something to it, {list(self.names)}.')
        spec = self._spec(tower, pretrained)
        count = f'{len(words)} new class(es)'
        if record is not None:
            vectors = self._from_file(record, words, spec)
            return self._centred(vectors), f'{count} from the embeddings file'
        if spec['model'] is None:
            raise ValueError(
                'it is not known which text tower made the vectors that this '
                'network was trained with. Name it (`tower`, `pretrained`; '
                '--tower, --pretrained), or give a file with vectors of the '
                'same tower (`embeddings`; --embeddings).')
        learned = self._unified_context()
        if learned is not None and templates is None:
            return (self._in_context(learned, words,
                                     spec), f'{count} in the learned context')
        if templates is None:
            templates = self._templates()
        vectors = self._in_templates(words, spec, templates)
        self._check_space(spec, templates)
        source = f'{count} in {len(get_templates(templates))} template(s)'
        if getattr(self.provider, 'started', False) and learned is None:
            source += (f', as what {self.learner} has learned belongs to the '
                       'trained classes alone')
        return self._centred(vectors), source

    def _spec(self, tower: Optional[str],
              pretrained: Optional[str]) -> Dict[str, Optional[str]]:
        """Name the tower: the caller's, else the prompts', file's, config's.
        """
        build = self.embeddings.get('build') or {}
        if tower is not None:
            return dict(model=tower, pretrained=pretrained)
        known: Any = build.get('model'), build.get('pretrained')
        if self.record is not None and self.record.model:
            known = self.record.model, self.record.pretrained or None
        if isinstance(self.provider, ContextPromptLearner):
            known = self.provider.model, self.provider.pretrained
        return dict(model=known[0], pretrained=pretrained or known[1])

    def _templates(self) -> Any:
        """The templates of the trained classes, as far as is known."""
        if self.record is not None and self.record.templates:
            return list(self.record.templates)
        build = self.embeddings.get('build') or {}
        return build.get('templates') or 'vild'

    def _unified_context(self) -> Optional[ContextPromptLearner]:
        """The learned prompts, if they are the same for all classes."""
        provider = self.provider
        if (isinstance(provider, ContextPromptLearner) and provider.started
                and provider.context.dim() == 2):
            return provider
        return None

    def _hold(self, spec: Mapping[str, Optional[str]]) -> TextTower:
        """Load the tower, once."""
        self._tower = load_tower(spec['model'], spec['pretrained'])
        if self._tower.dim != self.provider.dim:
            raise ValueError(
                f'the tower {spec["model"]!r} gives vectors of width '
                f'{self._tower.dim}, but this network was trained with width '
                f'{self.provider.dim}: it is another tower.')
        return self._tower

    def _in_templates(self, words: Vocabulary, spec: Dict,
                      templates: Any) -> Tensor:
        """Encode phrases in templates."""
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

    def _in_context(self, learned: ContextPromptLearner, words: Vocabulary,
                    spec: Dict) -> Tensor:
        """Encode the first phrase of each class in the learned context."""
        context = learned.context.detach().cpu().float()
        shift = self._shift()
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
                    position=learned.position,
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
            position=learned.position,
            words=_fields(words))
        with torch.no_grad():
            return cached(made_of, make, self.cache_dir).vectors

    def _from_file(self, record: TextEmbeddings, words: Vocabulary,
                   spec: Dict) -> Tensor:
        """Take vectors from an embeddings file."""
        place = {name: row for row, name in enumerate(record.names)}
        missing = [name for name in words.names if name not in place]
        if missing:
            raise ValueError(
                f'the embeddings file has no vectors for {missing[:10]}'
                f'{" and more" if len(missing) > 10 else ""}; it has '
                f'{list(record.names[:10])}'
                f'{" and more" if len(record) > 10 else ""}.')
        if record.dim != self.provider.dim:
            raise ValueError(
                f'the embeddings file has vectors of width {record.dim}, but '
                f'this network was trained with width {self.provider.dim}.')
        known = spec['model'], spec['pretrained'] or ''
        made_by = record.model, record.pretrained
        if spec['model'] and record.model and known != made_by:
            raise ValueError(
                f'the vectors in the embeddings file are of the tower '
                f'{made_by}, but this network was trained with those of '
                f'{known}. They do not lie in the same space.')
        return record.vectors[[place[name] for name in words.names]]

    def _shift(self) -> Optional[Tensor]:
        """The mean that was taken from the vectors of the trained classes."""
        shift = getattr(self.provider, 'shift', None)
        if shift is None and self.embeddings.get('centre'):
            raise ValueError(
                'this network was trained with centred vectors, and the mean '
                'that is taken from new ones too is that of its embeddings '
                f'file {self.embeddings.get("file")!r}, which is missing. '
                'Put it there.')
        return None if shift is None else shift.detach().cpu()

    def _centred(self, vectors: Tensor) -> Tensor:
        """Treat new vectors as those of the trained classes."""
        shift = self._shift()
        if shift is None:
            return vectors
        return F.normalize(vectors - shift, dim=1)

    def _check_space(self, spec: Dict, templates: Any) -> None:
        """Warn if the tower does not give what the network learned with."""
        phrases: Any = self.names
        if self.record is not None:
            phrases = dict(zip(self.record.names, self.record.phrases))
        elif (self.embeddings.get('build') or {}).get('vocabulary'):
            phrases = self.embeddings['build']['vocabulary']
        words = Vocabulary.from_spec(phrases)
        if words.names != self.names:
            return
        vectors = self._centred(self._in_templates(words, spec, templates))
        own = self.provider.class_embeddings.cpu()
        alike = F.cosine_similarity(vectors, own).mean().item()
        if not alike >= ALIKE:
            print_log(
                f'The tower {spec} gives for the classes that this network '
                'was trained with other vectors than those it learned with '
                f'(mean cosine {alike:.2f}). Unless prompts have moved them '
                'that far, it is another tower, and new names mean nothing.',
                'current', logging.WARNING)


def _fields(words: Vocabulary) -> Tuple[Tuple, Tuple]:
    """Names and phrases, as they are written."""
    return words.names, words.phrases


def _blocks(words: Vocabulary) -> List[Vocabulary]:
    """Parts of a vocabulary."""
    return [
        Vocabulary(words.names[i:i + BLOCK], words.phrases[i:i + BLOCK])
        for i in range(0, len(words), BLOCK)
    ]
