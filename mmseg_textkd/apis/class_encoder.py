# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Encoding of class names for networks trained with text."""
import hashlib
import json
import logging
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import (Any, Callable, Dict, List, Mapping, NamedTuple, Optional,
                    Sequence, Set, Tuple)

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from mmseg_textkd.clip import TextTower, load_tower
from mmseg_textkd.clip.weights import PathLike
from mmseg_textkd.models.text_providers import (ContextPromptLearner,
                                                TextProvider)
from mmseg_textkd.text import TextEmbeddings, Vocabulary, get_templates
from mmseg_textkd.text.encode_classes import encode_classes
from mmseg_textkd.utils.config import as_list, type_name

# Classes at a time: the token ids of 10,000 classes in 14 templates are 350
# MB.
BLOCK = 256
# Mean cosine between the trained vectors and those of a tower, below which
# the tower is hardly theirs: of two towers it is about 0, of one tower with
# other templates above 0.8.
MIN_COSINE = 0.5

Tower = Tuple[Optional[str], Optional[str]]  # model, pretrained


class EncodedClasses(NamedTuple):
    """Class names with their vectors.

    Attributes:
        names (tuple[str]): K names.
        phrases (tuple[tuple[str]]): The phrases of each.
        vectors (Tensor, optional): Their vectors, float32, shape (K, D);
            None for a network without text.
        trained (list[int | None]): For each the index of the class that the
            network was trained with, None for a new one.
        source (str): Where the vectors come from, in words.
    """
    names: Tuple[str, ...]
    phrases: Tuple[Tuple[str, ...], ...]
    vectors: Optional[Tensor]
    trained: List[Optional[int]]
    source: str


def default_cache_dir() -> Path:
    """Get the folder of the cache of vectors.

    Returns:
        Path: ``MMSEG_TEXTKD_CACHE``, or a folder of the user's cache.
    """
    own = os.environ.get('MMSEG_TEXTKD_CACHE')
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(own) if own else Path(home) / 'mmseg_textkd' / 'text'


class ClassEncoder:
    """Encoder of class names for a network that was trained with text.

    The name of a trained class, alone or with the phrases that it was trained
    with, keeps the vector that was learned for it. Other names are encoded by
    the tower that made the embeddings file: in the learned context of a
    ``ContextPromptLearner`` where that is one for all classes, else in the
    templates of the file. What was learned for each class (context of its
    own, offsets, mixtures) does not exist for a new one.

    Args:
        provider (TextProvider): The text of the network, as trained.
        text (Mapping): Its config.
        names (Sequence[str]): The classes that it was trained with.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`default_cache_dir`.
        tower (Mapping, optional): ``model``, ``pretrained`` and ``cache_dir``
            of the tower, where the network defines them. Defaults to
            None.
    """

    def __init__(self,
                 provider: TextProvider,
                 text: Mapping[str, Any],
                 names: Sequence[str],
                 cache_dir: Optional[PathLike] = None,
                 tower: Optional[Mapping[str, Any]] = None) -> None:
        self.provider, self.names = provider, tuple(names)
        self.cache_dir = cache_dir
        self.learner = type_name(text)
        self.embeddings = text.get('embeddings') or text
        # Of several files, which are of one tower, the first.
        builds = as_list(self.embeddings.get('build'))
        self.build = next(iter(builds), {})
        self.record: Optional[TextEmbeddings] = getattr(
            provider, 'record', None)
        self._trained_by: Dict[str, Set[Tuple[str, ...]]] = {}
        for vocabulary in _vocabularies(provider, self.record, builds):
            for name, phrases in zip(vocabulary.names, vocabulary.phrases):
                self._trained_by.setdefault(name.strip(), set()).add(phrases)
        known: Any = self.build
        if self.record is not None and self.record.model:
            known = vars(self.record)
        if isinstance(provider, ContextPromptLearner):
            known = vars(provider)
        known = tower or known
        self.weights_dir = known.get('cache_dir') or self.build.get(
            'cache_dir')
        self.tower = known.get('model'), known.get('pretrained') or None
        # Held so that the next names need not load it again.
        self._loaded: Optional[TextTower] = None

    def encode(self,
               classes: Any,
               tower: Optional[str] = None,
               pretrained: Optional[str] = None,
               templates: Any = None,
               embeddings: Optional[PathLike] = None) -> EncodedClasses:
        """Encode classes.

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
            EncodedClasses: The classes.

        Raises:
            FileNotFoundError: If there is no such file.
            TextTowerError: If the tower cannot be had.
            ValueError: If there is no class, one occurs twice, a sentence is
                longer than the tower's context, or there can be no vectors.
        """
        record = None
        if embeddings is not None:
            record = TextEmbeddings.load(embeddings)
        words = Vocabulary.from_spec(classes)
        # Stock data sets have names such as 'bed '.
        rows = {
            name.strip(): k
            for k, name in reversed(list(enumerate(self.names)))
        }
        trained = [
            rows.get(name.strip())
            if self._is_trained(name.strip(), phrases) else None
            for name, phrases in zip(words.names, words.phrases)
        ]
        own = self.provider.class_embeddings.detach()
        vectors, source = own[[k or 0 for k in trained]], 'as trained'
        new = [k for k, index in enumerate(trained) if index is None]
        if new:
            known = self.tower if tower is None else (tower, None)
            found, how = self._encode_new(
                Vocabulary([words.names[k] for k in new],
                           [words.phrases[k] for k in new]),
                (known[0], pretrained or known[1]), templates, record)
            vectors[new] = found.to(vectors)
            source = f'{len(new)} new class(es) {how}'
            if len(new) < len(words):
                source += f'; {len(words) - len(new)} as trained'
        return EncodedClasses(words.names, words.phrases, vectors, trained,
                              source)

    def _is_trained(self, name: str, phrases: Tuple[str, ...]) -> bool:
        """Whether phrases are those of the training, or the name itself."""
        return (not self._has_language()
                or phrases == (name.replace('_', ' '), )
                or phrases in self._trained_by.get(name, ()))

    def _has_language(self) -> bool:
        """Whether vectors of other words could be had."""
        return type_name(self.embeddings) not in ('ControlEmbeddings',
                                                  'LearnedEmbeddings')

    def _encode_new(self, words: Vocabulary, tower: Tower, templates: Any,
                    record: Optional[TextEmbeddings]) -> Tuple[Tensor, str]:
        """Get the vectors of new classes and describe their source."""
        if not self._has_language():
            raise ValueError(
                'this network was trained with '
                f'{type_name(self.embeddings)}, vectors without language: it '
                f'can only predict its own classes, {list(self.names)}.')
        if record is not None:
            vectors = self._from_file(record, words, tower)
            return self.provider.center(vectors), 'from the embeddings file'
        if tower[0] is None:
            raise ValueError(
                'it is not known which text tower made the vectors that this '
                'network was trained with. Name it (`tower`, `pretrained`; '
                '--model, --pretrained), or give a file with vectors of the '
                'same tower (`embeddings`; --embeddings).')
        provider = self.provider
        one_context = isinstance(provider, ContextPromptLearner) and (
            provider.started and provider.context.dim() == 2)
        if one_context and templates is None:
            return self._in_context(words, tower), 'in the learned context'
        if templates is None:
            templates = self.build.get('templates') or 'vild'
            if self.record is not None and self.record.templates:
                templates = self.record.templates
        templates = get_templates(templates)
        vectors = self._in_templates(words, tower, templates)
        self._check_tower(tower, templates)
        source = f'in {len(templates)} template(s)'
        if getattr(provider, 'started', False) and not one_context:
            source += (f', as what {self.learner} has learned belongs to the '
                       'trained classes alone')
        return vectors, source

    def _in_templates(self, words: Vocabulary, tower: Tower,
                      templates: List[str]) -> Tensor:
        """Encode the phrases of each class in prompt templates."""
        return self.provider.center(
            self._cached(
                words, tower, templates, lambda block: encode_classes(
                    block, self._load(tower), templates).vectors))

    def _in_context(self, words: Vocabulary, tower: Tower) -> Tensor:
        """Encode the first phrase of each class in the learned context."""
        shift = self.provider.shift
        learned = dict(
            context=self.provider.context.tolist(),
            shift=shift if shift is None else shift.tolist(),
            suffix=getattr(self.provider, 'suffix', None))
        return self._cached(
            words, tower, learned, lambda block: self.provider.encode_phrases(
                self._load(tower), [phrases[0] for phrases in block.phrases]))

    def _from_file(self, record: TextEmbeddings, words: Vocabulary,
                   tower: Tower) -> Tensor:
        """Look up vectors in an embeddings file."""
        row = {name: k for k, name in enumerate(record.names)}
        missing = [name for name in words.names if name not in row]
        if missing:
            raise ValueError(
                f'the embeddings file has no vectors for {missing[:10]} '
                f'({len(missing)} in all); it has {list(record.names[:10])} '
                f'({len(record)} in all, which `python tools/encode_text.py '
                'FILE` lists).')
        if record.dim != self.provider.dim:
            raise ValueError(
                f'the embeddings file has vectors of width {record.dim}, but '
                f'this network was trained with width {self.provider.dim}.')
        known, made_by = (tower[0], tower[1]
                          or ''), (record.model, record.pretrained)
        if tower[0] and record.model and known != made_by:
            raise ValueError(
                f'the vectors in the embeddings file are of the tower '
                f'{made_by}, but this network was trained with those of '
                f'{known}. They are not in the same space.')
        return record.vectors[[row[name] for name in words.names]]

    def _load(self, tower: Tower) -> TextTower:
        """Load the text tower once and check its width."""
        self._loaded = load_tower(*tower, self.weights_dir)
        if self._loaded.dim != self.provider.dim:
            raise ValueError(
                f'the tower {tower[0]!r} gives vectors of width '
                f'{self._loaded.dim}, but this network was trained with width '
                f'{self.provider.dim}: it is another tower.')
        return self._loaded

    def _cached(self, words: Vocabulary, tower: Tower, made_of: Any,
                encode: Callable[[Vocabulary], Tensor]) -> Tensor:
        """Load vectors from the cache, or encode and cache them.

        Entries are embeddings files: written whole or not at all, and
        verified when they are read. A damaged one is made anew; a folder that
        cannot be written to costs nothing but the time.
        """
        key = json.dumps(
            [made_of, tower, words.names, words.phrases,
             _versions(tower)])
        name = f'{hashlib.sha256(key.encode()).hexdigest()}.safetensors'
        path = Path(self.cache_dir or default_cache_dir(), name)
        if path.is_file():
            try:
                return TextEmbeddings.load(path).vectors
            except (OSError, ValueError) as error:
                print_log(f'A damaged cache entry is made anew: {error}',
                          'current')
        vectors = torch.cat([
            encode(
                Vocabulary(words.names[i:i + BLOCK],
                           words.phrases[i:i + BLOCK])).cpu()
            for i in range(0, len(words), BLOCK)
        ])
        try:
            TextEmbeddings(vectors, words.names, words.phrases).save(path)
        except OSError as error:
            print_log(f'The vectors cannot be kept in the cache: {error}',
                      'current')
        return vectors

    def _check_tower(self, tower: Tower, templates: List[str]) -> None:
        """Warn if the tower is not the one of the training."""
        phrases: Any = self.build.get('vocabulary') or self.names
        if self.record is not None:
            phrases = dict(zip(self.record.names, self.record.phrases))
        words = Vocabulary.from_spec(phrases)
        if words.names != self.names:
            return
        cosine = F.cosine_similarity(
            self._in_templates(words, tower, templates),
            self.provider.class_embeddings.cpu()).mean().item()
        if not cosine >= MIN_COSINE:
            print_log(
                f'The tower {tower} gives for the classes that this network '
                'was trained with other vectors than those it learned with '
                f'(mean cosine {cosine:.2f}). Unless prompts have moved them '
                'that far, it is another tower, unfit for new classes.',
                'current', logging.WARNING)


def _vocabularies(provider: TextProvider, record: Optional[TextEmbeddings],
                  builds: Sequence[Mapping]) -> List[Any]:
    """What names and phrases the vectors of a network were made of."""
    specs = [getattr(provider, 'vocabulary', None)]
    if record is None:
        specs += [build.get('vocabulary') for build in builds]
    found: List[Any] = [] if record is None else [record]
    for spec in filter(None, specs):
        try:
            found.append(Vocabulary.from_spec(spec))
        except OSError:
            pass  # a file of the training that is not here
    return found


def _versions(tower: Tower) -> List:
    """Version of open_clip, size and time of local weights."""
    try:
        found: List[Any] = [version('open_clip_torch')]
    except PackageNotFoundError:
        found = ['']
    folder = tower[0].removeprefix('local-dir:')
    files = []
    if folder != tower[0]:
        files = sorted(Path(folder).expanduser().glob('*'))
    for file in (*files, Path(tower[1] or '').expanduser()):
        if file.is_file():
            stat = file.stat()
            found.append((file.name, stat.st_size, stat.st_mtime_ns))
    return found
