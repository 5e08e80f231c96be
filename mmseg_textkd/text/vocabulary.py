# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Vocabularies: class names and the phrases that describe them."""
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from .vector_import import has_control, read_text_file

VOCABULARY_DIR = Path(__file__).resolve().parent / 'vocabularies'
# BDD100K has the classes of Cityscapes, labeled alike: one file for both.
ALIASES = {'bdd100k': 'cityscapes'}
SYNONYMS = '+synonyms'

VocabularySpec = Union[str, Path, Mapping[str, Union[str, Sequence[str]]],
                       Sequence[str], 'Vocabulary']


@dataclass(frozen=True)
class Vocabulary:
    """Class names in label order, each with the phrases that describe it.

    Args:
        names (tuple[str]): K class names, as the dataset's
            ``metainfo['classes']`` spells them.
        phrases (tuple[tuple[str]]): For each class one or more phrases, the
            best single one first.

    Raises:
        ValueError: If there is no class, a name is empty or occurs twice, or
            a class has no phrase, an empty one or the same one twice.
    """
    names: Tuple[str, ...]
    phrases: Tuple[Tuple[str, ...], ...]

    def __post_init__(self) -> None:
        # Lists are taken too, but kept as tuples: a vocabulary is hashable
        # and nobody can change it behind a file that was made from it. A lone
        # text is one phrase, not a sequence of letters.
        object.__setattr__(self, 'names', tuple(self.names))
        object.__setattr__(
            self, 'phrases',
            tuple((p, ) if isinstance(p, str) else tuple(p)
                  for p in self.phrases))
        if not self.names:
            raise ValueError('The vocabulary is empty: it names no class')
        if len(self.names) != len(self.phrases):
            raise ValueError(f'The vocabulary has {len(self.names)} names but '
                             f'phrases for {len(self.phrases)} classes')
        self._check_names()
        self._check_phrases()

    def _check_names(self) -> None:
        """Require unique class names that are not empty."""
        seen: Dict[str, int] = {}
        for i, name in enumerate(self.names):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f'Class {i} of the vocabulary has an empty '
                                 f'name or one that is no text: {name!r}')
            if has_control(name):
                raise ValueError(f'Class name {name!r} has a line break or '
                                 'another control character')
            if name.strip() in seen:
                raise ValueError(
                    f'Class name {name!r} occurs twice in the vocabulary, as '
                    f'class {seen[name.strip()]} and as class {i}')
            seen[name.strip()] = i

    def _check_phrases(self) -> None:
        """Require phrases that are not empty; warn of shared ones."""
        owner: Dict[str, str] = {}
        for name, phrases in zip(self.names, self.phrases):
            if not phrases:
                raise ValueError(f'Class {name!r} has no phrase')
            for phrase in phrases:
                if not isinstance(phrase, str) or not phrase.strip():
                    raise ValueError(
                        f'Class {name!r} has an empty phrase or one that is '
                        f'no text: {phrase!r} in {list(phrases)}')
                if has_control(phrase):
                    raise ValueError(f'Phrase {phrase!r} of class {name!r} '
                                     'has a line break or another control '
                                     'character')
                other = owner.setdefault(phrase.strip().lower(), name)
                if other != name:
                    warnings.warn(
                        f'Phrase {phrase!r} stands for both {other!r} and '
                        f'{name!r}: their text vectors are drawn together')
            if len({p.strip().lower() for p in phrases}) < len(phrases):
                raise ValueError(f'Class {name!r} has a phrase twice: '
                                 f'{list(phrases)}')

    def __len__(self) -> int:
        return len(self.names)

    @staticmethod
    def keys() -> List[str]:
        """List the vocabularies of the package.

        Returns:
            list[str]: What :meth:`from_spec` knows by name, sorted.
        """
        files = (file.stem for file in VOCABULARY_DIR.glob('*.json'))
        return sorted([*files, *ALIASES])

    @classmethod
    def from_spec(cls,
                  spec: VocabularySpec,
                  names: Optional[Sequence[str]] = None) -> 'Vocabulary':
        """Make a vocabulary from a value of a config or a command line.

        Args:
            spec (str | Path | dict | list | Vocabulary): One of

                - a dataset key, see :meth:`keys`, such as ``'cityscapes'``;
                - such a key with ``'+synonyms'`` behind it, for further
                  phrases of each class, see :meth:`with_synonyms`;
                - the path of a ``.json`` file that holds a dict or a list
                  as below;
                - the path of a ``.txt`` file with one class per line, either
                  ``name`` or ``name: phrase, phrase``. Empty lines and lines
                  that start with ``#`` are skipped;
                - a dict of class name to phrase or list of phrases;
                - a list of class names.

                A class without phrases of its own is described by its name,
                with ``_`` read as a space.
            names (Sequence[str], optional): The order of the classes for a
                dict, see :func:`in_order`. Defaults to None: that of the
                dict.

        Returns:
            Vocabulary: The checked vocabulary.

        Raises:
            FileNotFoundError: If the file does not exist.
            TypeError: If ``spec`` is of another type.
            ValueError: If the key is unknown, the file is of another kind or
                broken, or the classes or phrases do not pass the checks.
        """
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, Mapping):
            return cls._from_pairs(in_order(spec, names).items())
        if isinstance(spec, (list, tuple)):
            return cls._from_pairs((name, None) for name in spec)
        if not isinstance(spec, (str, Path)):
            raise TypeError('A vocabulary is a dataset key, a file, a dict or '
                            f'a list of names, but got {type(spec).__name__}')
        if str(spec) in cls.keys():
            key = ALIASES.get(str(spec), str(spec))
            return cls._from_file(VOCABULARY_DIR / f'{key}.json')
        if str(spec).endswith(SYNONYMS):
            return cls._with_own_synonyms(str(spec)[:-len(SYNONYMS)])
        if Path(spec).suffix not in ('.json', '.txt'):
            raise ValueError(
                f'Unknown vocabulary {str(spec)!r}: neither one of the keys '
                f'{cls.keys()} nor the path of a .json or .txt file')
        return cls._from_file(Path(spec))

    def with_synonyms(self, synonyms: Mapping[str,
                                              Sequence[str]]) -> 'Vocabulary':
        """Append phrases to those of the classes.

        Args:
            synonyms (Mapping[str, Sequence[str]]): Phrases by the name of the
                class, for some classes or all.

        Returns:
            Vocabulary: The same classes with more phrases.

        Raises:
            ValueError: If a class is unknown, or has a phrase twice.
        """
        unknown = [name for name in synonyms if name not in self.names]
        if unknown:
            raise ValueError(f'There are synonyms for unknown classes: '
                             f'{unknown}')
        return type(self)(
            self.names,
            tuple((*phrases, *synonyms.get(name, ()))
                  for name, phrases in zip(self.names, self.phrases)))

    @classmethod
    def _with_own_synonyms(cls, key: str) -> 'Vocabulary':
        """Read a vocabulary and the synonyms that come with the package."""
        folder = VOCABULARY_DIR / 'synonyms'
        path = folder / f'{ALIASES.get(key, key)}.json'
        if key not in cls.keys() or not path.is_file():
            known = [
                k for k in cls.keys()
                if (folder / f'{ALIASES.get(k, k)}.json').is_file()
            ]
            raise ValueError(f'No synonyms come with the package for {key!r}; '
                             f'there are some for {known}')
        more = cls._from_file(path)
        return cls.from_spec(key).with_synonyms(
            dict(zip(more.names, more.phrases)))

    @classmethod
    def _from_file(cls, path: Path) -> 'Vocabulary':
        """Read a .json or .txt file; name it in every error."""
        if not path.is_file():
            raise FileNotFoundError(f'Vocabulary file {path} does not exist')
        try:
            text = read_text_file(path)
            if path.suffix == '.txt':
                return cls._from_pairs(_parse_lines(text))
            # The pairs are kept as pairs, or json would let the second of two
            # equal names silently replace the first.
            content = json.loads(text, object_pairs_hook=_Pairs)
            if isinstance(content, _Pairs):
                return cls._from_pairs(content)
            if isinstance(content, list):
                return cls._from_pairs((name, None) for name in content)
            raise ValueError('expected a dict of name to phrases or a list of '
                             f'names, found {type(content).__name__}')
        except ValueError as err:
            raise ValueError(f'Vocabulary file {path}: {err}') from err

    @classmethod
    def _from_pairs(cls, pairs: Any) -> 'Vocabulary':
        """Make it from (name, phrase, phrases or None) pairs."""
        names, phrases = [], []
        for name, words in pairs:
            if words is None:
                words = str(name).replace('_', ' ')
            if isinstance(words, str):
                words = [words]
            nested = isinstance(words, _Pairs)
            if nested or not isinstance(words, (list, tuple)):
                raise ValueError(f'Class {name!r}: expected a phrase or a '
                                 f'list of phrases, found {words!r}')
            names.append(name)
            phrases.append(
                tuple(w.strip() if isinstance(w, str) else w for w in words))
        return cls(tuple(names), tuple(phrases))


class _Pairs(list):
    """The (key, value) pairs of a JSON object, repeated keys included."""


def _parse_lines(text: str) -> List[Tuple[str, Any]]:
    """Read ``name`` or ``name: phrase, phrase`` lines."""
    pairs: List[Tuple[str, Any]] = []
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith('#'):
            continue
        name, colon, words = line.partition(':')
        pairs.append((name.strip(), words.split(',') if colon else None))
    return pairs


def in_order(spec: Any, names: Optional[Sequence[str]]) -> Any:
    """Bring a dict into the order of the classes.

    MMEngine sorts the keys of a config that it writes.

    Args:
        spec (VocabularySpec): See :meth:`Vocabulary.from_spec`.
        names (Sequence[str], optional): The classes in label order.

    Returns:
        dict | VocabularySpec: The ordered dict if it is one of just these
        classes; else the argument itself.
    """
    if isinstance(spec, Mapping) and names and set(names) == set(spec):
        return {name: spec[name] for name in names}
    return spec
