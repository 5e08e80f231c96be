# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
from itertools import chain
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmseg_textkd.clip import TextTower, load_tower
from ..utils.config import as_list, dicts, type_name
from .embedding_file import TextEmbeddings
from .templates import get_templates
from .vocabulary import Vocabulary, VocabularySpec, in_order

BUILD_KEYS = ('model', 'pretrained', 'templates', 'vocabulary', 'keep_bank',
              'cache_dir')
# Providers that take their vectors from a file.
FILE_PROVIDERS = ('ClassEmbeddings', 'SynonymSampler')
# Encoding a thousand phrases with a large tower on a CPU takes minutes.
LOCK_TIMEOUT = 3600.


@torch.no_grad()
def encode_classes(vocabulary: VocabularySpec,
                   tower: Union[TextTower, str, Mapping],
                   templates: Any = 'vild',
                   keep_bank: bool = False,
                   progress: bool = False) -> TextEmbeddings:
    """Encode the classes of a vocabulary.

    A class vector is the renormalized mean of the unit vectors of all its
    phrases in all templates, as ``open_clip.build_zero_shot_classifier``
    makes it.

    Args:
        vocabulary (VocabularySpec): See :meth:`Vocabulary.from_spec`.
        tower (TextTower | str | Mapping): The tower, its name, or a dict with
            ``model``, ``pretrained`` and ``cache_dir``.
        templates: See :func:`get_templates`. Defaults to 'vild'.
        keep_bank (bool): Whether to keep a vector for each phrase in each
            template, as ``MixturePromptLearner`` needs. Defaults to False.
        progress (bool): Whether to show a progress bar. Defaults to False.

    Returns:
        TextEmbeddings: One vector per class.

    Raises:
        TextTowerError: If the tower cannot be had.
        ValueError: If a sentence is longer than the tower's context.
    """
    vocabulary = Vocabulary.from_spec(vocabulary)
    templates = get_templates(templates)
    if not isinstance(tower, TextTower):
        tower = load_tower(**(dict(
            model=tower) if isinstance(tower, str) else tower))
    rows = [[t.format(phrase) for phrase in phrases for t in templates]
            for phrases in vocabulary.phrases]
    # Classes may share phrases, and a template may ignore case and the like.
    place = {
        sentence: number
        for number, sentence in enumerate(
            dict.fromkeys(chain.from_iterable(rows)))
    }
    vectors = F.normalize(
        tower.encode_text(list(place), progress=progress).cpu(), dim=1)
    groups = [vectors[[place[s] for s in row]] for row in rows]
    return _assemble(
        vocabulary.names,
        vocabulary.phrases,
        groups,
        keep_bank,
        templates=tuple(templates),
        model=tower.model,
        pretrained=tower.pretrained or '',
        library=tower.library)


def look_up_phrases(vocabulary: VocabularySpec,
                    found: TextEmbeddings,
                    keep_bank: bool = False) -> TextEmbeddings:
    """Make class embeddings from the vectors of single phrases.

    For vectors that were made elsewhere, without a tower. Phrases
    that have no vector are left out.

    Args:
        vocabulary (VocabularySpec): See :meth:`Vocabulary.from_spec`.
        found (TextEmbeddings): A vector for each phrase, under its words as
            name.
        keep_bank (bool): Whether to keep a vector for each phrase. Defaults
            to False.

    Returns:
        TextEmbeddings: One vector per class, as :func:`encode_classes` makes
        them.

    Raises:
        ValueError: If the first phrase of a class has no vector.
    """
    vocabulary = Vocabulary.from_spec(vocabulary)
    # In its own case if it is there so: Polish is not polish.
    rows = {name: row for row, name in enumerate(found.names)}
    for name, row in list(rows.items()):
        rows.setdefault(name.lower(), row)
    place = {
        p: rows.get(p, rows.get(p.lower()))
        for phrases in vocabulary.phrases
        for p in phrases
    }
    groups = [[p for p in phrases if place[p] is not None]
              for phrases in vocabulary.phrases]
    lost = [
        phrases[0] for phrases in vocabulary.phrases
        if place[phrases[0]] is None
    ]
    if lost:
        raise ValueError(f'no vectors of {lost}, which are the plain names of '
                         'classes. Import vectors that include them.')
    number = sum(map(len, vocabulary.phrases))
    print_log(
        f'{sum(map(len, groups))} of {number} phrases have a vector; the '
        'others are left out.', 'current')
    vectors = [found.vectors[[place[p] for p in g]] for g in groups]
    return _assemble(
        vocabulary.names,
        groups,
        vectors,
        keep_bank,
        templates=found.templates,
        model=found.model,
        pretrained=found.pretrained,
        library=found.library)


def _assemble(names: Sequence[str], phrases: Sequence[Sequence[str]],
              groups: Sequence[Tensor], keep_bank: bool,
              **origin: Any) -> TextEmbeddings:
    """Average the vectors of each class, with or without a phrase bank."""
    bank = mask = None
    if keep_bank:
        bank = pad_sequence(list(groups), batch_first=True)
        mask = torch.arange(bank.shape[1]) < torch.tensor(
            [len(group) for group in groups])[:, None]
    return TextEmbeddings(
        vectors=F.normalize(
            torch.stack([group.mean(dim=0) for group in groups]), dim=1),
        names=tuple(names),
        phrases=tuple(map(tuple, phrases)),
        bank=bank,
        bank_mask=mask,
        **origin)


def ensure_embeddings(cfg: Mapping, progress: bool = False) -> List[Path]:
    """Encode the missing embeddings files of a config.

    Of several processes that want the same file one makes it, and the others
    wait and use it. A file that is there is verified and never overwritten.

    Args:
        cfg (Mapping): An ``mmengine.Config``, of whose ``model`` all
            ``dict(type='ClassEmbeddings', file=..., build=dict(...))`` and
            those of ``SynonymSampler`` are looked at; or any nested dict
            without a ``model``. ``build`` takes the keys ``model``,
            ``pretrained``, ``cache_dir``, ``templates``, ``vocabulary`` and
            ``keep_bank``.
        progress (bool): Whether to show a progress bar. Defaults to False.

    Returns:
        list[Path]: The files that this call has made.

    Raises:
        TextTowerError: If the tower cannot be had.
        ValueError: If ``build`` is wrong, or an existing file is damaged or
            for other classes.
    """
    made: List[Path] = []
    nodes: Dict[str, Dict[str, Any]] = {}
    # Variables of a config are copied to where they are used, if they are.
    model = cfg.get('model') or cfg
    # Config and ConfigDict resolve their lazy objects here.
    for node in dicts(model.to_dict() if hasattr(model, 'to_dict') else model):
        if (type_name(node) not in FILE_PROVIDERS or not node.get('build')
                or not node.get('file')):
            continue
        files, builds = as_list(node['file']), as_list(node['build'])
        if len(files) != len(builds):
            raise ValueError(f'The config has {len(builds)} `build` for the '
                             f'{len(files)} files {files}: give each its own.')
        for file, build in zip(map(str, files), map(dict, builds)):
            if build.get('vocabulary') and node.get('classes'):
                build['vocabulary'] = in_order(
                    build['vocabulary'],
                    Vocabulary.from_spec(node['classes']).names)
            if nodes.setdefault(file, build) != build:
                raise ValueError(f'The config has two ways to build {file}: '
                                 f'{nodes[file]} and {build}.')
    for file, build in nodes.items():
        _check_build(file, build)
        if not Path(file).is_file() and _make(Path(file), build, progress):
            made.append(Path(file))
        else:
            _check_fit(file, build)
    return made


def check_files(cfg: Mapping) -> None:
    """Require the embeddings files without which a network is not built.

    Args:
        cfg (Mapping): As of :func:`ensure_embeddings`.

    Raises:
        FileNotFoundError: If one is missing that has neither ``build`` nor
            ``dim``, with the command that makes it.
    """
    model = cfg.get('model') or cfg
    for node in dicts(model.to_dict() if hasattr(model, 'to_dict') else model):
        if type_name(node) not in FILE_PROVIDERS or node.get('dim'):
            continue
        for file in map(str, as_list(node.get('file'))):
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f'there is no embeddings file {file} (working directory '
                    f'{Path.cwd()}). {build_command(file, None)}')


def build_command(file: str, build: Optional[Mapping] = None) -> str:
    """Describe the command that makes an embeddings file.

    Args:
        file (str): The embeddings file.
        build (Mapping, optional): The ``build`` of the config. Defaults to
            None.

    Returns:
        str: The sentence with the command.
    """
    build = dict(build or {})
    vocabulary = build.get('vocabulary', 'DATASET')
    words = ['python tools/encode_text.py']
    if isinstance(vocabulary, (str, Path)):
        words.append(str(vocabulary))
    elif isinstance(vocabulary, Mapping):
        words.append('VOCABULARY.json')
    else:
        words.append(f'"{",".join(vocabulary)}"')
    words.append(f'--model {build.get("model", "MODEL")}')
    for key in ('pretrained', 'cache_dir'):
        if build.get(key):
            words.append(f'--{key.replace("_", "-")} {build[key]}')
    templates = build.get('templates')
    if isinstance(templates, (str, Path)):
        words.append(f'--templates "{templates}"')
    elif templates:
        words.append('--templates TEMPLATES.txt')
    if build.get('keep_bank'):
        words.append('--keep-bank')
    words.append(f'--out {file}')
    return f'Make it with `{" ".join(words)}`.'


def _check_build(file: str, build: Mapping) -> None:
    """Check the keys of ``build`` before anything is loaded."""
    unknown = sorted(set(build) - set(BUILD_KEYS))
    missing = [key for key in ('model', 'vocabulary') if not build.get(key)]
    if unknown or missing:
        raise ValueError(
            f'`build` of the embeddings file {file}: unknown keys {unknown}, '
            f'missing keys {missing}; it takes {list(BUILD_KEYS)}.')


def _make(path: Path, build: Mapping, progress: bool) -> bool:
    """Encode an embeddings file, unless another process does.

    Returns:
        bool: Whether this process has made it.
    """
    from filelock import FileLock, Timeout
    path.parent.mkdir(parents=True, exist_ok=True)
    # The OS releases the lock of a killed process, so none can be stale.
    lock = FileLock(path.parent / f'.{path.name}.lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print_log(f'Waiting for another process to make {path}', 'current')
        try:
            lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout as error:
            raise RuntimeError(
                f'Another process has been making {path} for '
                f'{LOCK_TIMEOUT / 60:.0f} minutes (lock {lock.lock_file}). '
                f'{build_command(str(path), build)}') from error
    try:
        if path.is_file():
            return False
        print_log(f'The embeddings file {path} is missing; making it',
                  'current')
        tower = {k: build.get(k) for k in ('model', 'pretrained', 'cache_dir')}
        encode_classes(
            build['vocabulary'],
            tower,
            build.get('templates') or 'vild',
            keep_bank=bool(build.get('keep_bank')),
            progress=progress).save(path)
    finally:
        lock.release()
    print_log(f'Made {path}', 'current')
    return True


def _check_fit(file: str, build: Mapping) -> None:
    """Compare an existing file with the settings of the config."""
    found = TextEmbeddings.load(file)
    vocabulary = Vocabulary.from_spec(build['vocabulary'], found.names)
    remedy = f'Delete or rename it. {build_command(file, build)}'
    try:
        found.check_names(vocabulary.names, 'the vocabulary in `build`')
    except ValueError as error:
        raise ValueError(
            f'Embeddings file {file}: {error}\n{remedy}') from None
    wanted = dict(
        model=build['model'],
        pretrained=build.get('pretrained') or '',
        templates=tuple(get_templates(build.get('templates') or 'vild')),
        phrases=vocabulary.phrases)
    differences = [
        f'{key} {_short(getattr(found, key))} instead of {_short(value)}'
        for key, value in wanted.items() if getattr(found, key) != value
    ]
    if build.get('keep_bank') and found.bank is None:
        differences.append('no bank')
    if differences:
        print_log(
            f'The embeddings file {file} is used as it is, but was not made '
            f'as `build` says: {"; ".join(differences)}. To make it anew: '
            f'{remedy}', 'current', logging.WARNING)


def _short(value: Any) -> str:
    """Shortened representation of a value."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:76]} ...'
