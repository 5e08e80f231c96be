# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Vectors for words that a text network was not trained with."""
import logging
import os
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from mmseg_textkd.models.text_providers import (ContextPromptLearner,
                                                TextProvider)
from mmseg_textkd.text import TextEmbeddings, Vocabulary, get_templates
from .open_classifier import NewClasses
from .word_tower import WordTower

# Below it the vectors are hardly those of the same tower: of two towers it is
# about 0, of one with other templates above 0.8.
ALIKE = 0.5


class WordEncoder:
    """Put words into the space in which a network was trained.

    The name of a trained class keeps the vector that was learned for it.
    Other names are encoded by the tower that made the embeddings file: with
    the learned context of ``ContextPromptLearner`` where that is one for all
    classes, else in the templates of the file. What was learned for each
    class (context of its own, offsets, mixtures) does not exist for a new
    one.

    Args:
        provider (TextProvider): The text of the network, as trained.
        text (Mapping): Its config.
        names (Sequence[str]): The classes that it was trained with.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.text_cache.default_cache_dir`.
        tower (Mapping, optional): ``model``, ``pretrained`` and ``cache_dir``
            of the tower, where the network itself tells them. Defaults to
            None.
    """

    def __init__(self,
                 provider: TextProvider,
                 text: Mapping[str, Any],
                 names: Sequence[str],
                 cache_dir: Optional[Union[str, os.PathLike]] = None,
                 tower: Optional[Mapping[str, Any]] = None) -> None:
        self.provider = provider
        self.names, self.known = tuple(names), tower
        self.learner = text['type'].split('.')[-1]
        self.embeddings = text.get('embeddings') or text
        self.record: Optional[TextEmbeddings] = getattr(
            self.provider, 'record', None)
        build = tower or self.embeddings.get('build') or {}
        self.tower = WordTower(provider.dim, cache_dir, build.get('cache_dir'))

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
        trained = [
            self._trained(*pair)
            for pair in zip(vocabulary.names, vocabulary.phrases)
        ]
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
        return NewClasses(vocabulary.names, vocabulary.phrases, vectors,
                          trained, source)

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
            vectors = self.tower.from_file(record, words, spec)
            return self._centred(vectors), f'{count} from the embeddings file'
        if spec['model'] is None:
            raise ValueError(
                'it is not known which text tower made the vectors that this '
                'network was trained with. Name it (`tower`, `pretrained`; '
                '--tower, --pretrained), or give a file with vectors of the '
                'same tower (`embeddings`; --embeddings).')
        learned = self._unified_context()
        if learned is not None and templates is None:
            vectors = self.tower.in_context(learned, self._shift(), words,
                                            spec)
            return vectors, f'{count} in the learned context'
        if templates is None:
            templates = self._templates()
        vectors = self.tower.in_templates(words, spec, templates)
        self._check_space(spec, templates)
        source = f'{count} in {len(get_templates(templates))} template(s)'
        if getattr(self.provider, 'started', False) and learned is None:
            source += (f', as what {self.learner} has learned belongs to the '
                       'trained classes alone')
        return self._centred(vectors), source

    def _spec(self, tower: Optional[str],
              pretrained: Optional[str]) -> Dict[str, Optional[str]]:
        """Name the tower: the caller's, else the network's, prompts', file's,
        config's."""
        build = self.embeddings.get('build') or {}
        if tower is not None:
            return dict(model=tower, pretrained=pretrained)
        known: Any = build.get('model'), build.get('pretrained')
        if self.record is not None and self.record.model:
            known = self.record.model, self.record.pretrained or None
        if isinstance(self.provider, ContextPromptLearner):
            known = self.provider.model, self.provider.pretrained
        if self.known is not None:
            known = self.known['model'], self.known.get('pretrained')
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
        vectors = self._centred(
            self.tower.in_templates(words, spec, templates))
        own = self.provider.class_embeddings.cpu()
        alike = F.cosine_similarity(vectors, own).mean().item()
        if not alike >= ALIKE:
            print_log(
                f'The tower {spec} gives for the classes that this network '
                'was trained with other vectors than those it learned with '
                f'(mean cosine {alike:.2f}). Unless prompts have moved them '
                'that far, it is another tower, and new names mean nothing.',
                'current', logging.WARNING)
