# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Import of vectors, names and texts from untrusted files."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence, Union, cast

import numpy as np
import torch
from torch import Tensor

from ..utils.checkpoint import load_file

PathLike = Union[str, os.PathLike]


class EmbeddingFileError(ValueError):
    """Invalid embeddings file, or invalid input for one."""


def read_text_file(path: Path) -> str:
    """Read a text, with or without a byte order mark.

    Args:
        path (Path): An existing file.

    Returns:
        str: Its content.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        return path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(
            f'it is not UTF-8 text (byte {error.start}). Save it as UTF-8, '
            f'for instance with `iconv -f LATIN1 -t UTF-8 {path}`, or `-f '
            'UTF-16`.') from error


def has_control(text: str) -> bool:
    """Whether a text holds line breaks or other control characters.

    Args:
        text (str): The text.

    Returns:
        bool: True also for tabs and zero bytes.
    """
    return any(unicodedata.category(c) in ('Cc', 'Zl', 'Zp') for c in text)


def sniff(path: PathLike) -> str:
    """Kind of a file, by its first bytes.

    Args:
        path (str or PathLike): An existing file.

    Returns:
        str: 'safetensors', or the kind in words.
    """
    with open(path, 'rb') as file:
        head = file.read(9)
    if not head:
        return 'an empty file (a writer was killed?)'
    if head.startswith(b'PK\x03\x04'):
        return 'a zip archive, such as torch.save or np.savez writes'
    if head.startswith(b'\x93NUMPY'):
        return 'a NumPy array'
    # Length of the header in 8 bytes, then JSON. Asked before pickle, whose
    # first byte may as well begin a length.
    if head[8:9] == b'{':
        return 'safetensors'
    if head[:1] == b'\x80':
        return 'a pickle (it was not opened: unpickling runs code)'
    return 'a file of an unknown kind'


def read_vectors(path: PathLike) -> Tensor:
    """Read K×D vectors without unpickling anything.

    Args:
        path (str or PathLike): ``.npy``, ``.pt``, ``.pth`` or
            ``.safetensors``.

    Returns:
        Tensor: Float32 with shape (K, D), as in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        EmbeddingFileError: If it holds anything but one finite matrix without
            zero rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no file of vectors {path}.')
    readers = {
        '.npy': _read_npy,
        '.pt': _read_torch,
        '.pth': _read_torch,
        '.safetensors': _read_safetensors
    }
    if path.suffix not in readers:
        raise EmbeddingFileError(
            f'cannot import {path.suffix or "a file without suffix"}; known '
            f'are {", ".join(readers)}')
    content = readers[path.suffix](path)
    if isinstance(content, Mapping):
        tensors = {
            name: value
            for name, value in content.items() if isinstance(value, Tensor)
        }
        if len(tensors) != 1:
            raise EmbeddingFileError(
                f'it must hold one tensor, but has {sorted(map(str, tensors))}'
                ' (save the one with the class vectors by itself)')
        content, = tensors.values()
    if not isinstance(content, Tensor):
        raise EmbeddingFileError(
            f'it holds a {type(content).__name__} and not a tensor')
    if content.dim() != 2 or 0 in content.shape or content.is_complex():
        raise EmbeddingFileError(
            'it must hold K×D numbers, one row a class, but has '
            f'{content.dtype} of shape {tuple(content.shape)}')
    vectors = content.detach().float()
    bad = ~vectors.isfinite().all(dim=1) | (vectors.norm(dim=1) < 1e-6)
    if bad.any():
        raise EmbeddingFileError('NaN, infinity or nothing but zeros in the '
                                 f'rows {bad.nonzero().flatten().tolist()}')
    return vectors


def _read_npy(path: Path) -> Tensor:
    """Read a NumPy array of numbers."""
    try:
        array = np.load(path, allow_pickle=False)
        if np.iscomplexobj(array):
            return torch.from_numpy(array)  # refused with its type
        # Every number type of NumPy, among them some that torch lacks.
        return torch.from_numpy(array.astype(np.float32))
    except Exception as error:  # of a damaged header NumPy raises anything
        raise EmbeddingFileError(
            f'it is no plain .npy array but {sniff(path)} ({error}); objects '
            'are not unpickled, for that runs code') from error


def _read_torch(path: Path) -> Any:
    """Read a torch file with ``weights_only``."""
    try:
        return load_file(path)
    except (OSError, ValueError) as error:
        raise EmbeddingFileError(
            'it holds more than tensors, or is damaged; such files are not '
            'unpickled, for that runs code. Save the bare K×D tensor with '
            'torch.save(tensor, FILE) or np.save where you trust its origin '
            f'({error})') from error


def _read_safetensors(path: Path) -> Any:
    """Read a safetensors file of another origin."""
    from safetensors import SafetensorError
    from safetensors.torch import load
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise EmbeddingFileError(
            f'it is no safetensors file, or cut short ({error})') from error


def read_names(names: Union[PathLike, Sequence[str], Mapping]) -> Dict:
    """Read class names and what else is known of their vectors.

    Args:
        names (str or PathLike or Sequence[str] or Mapping): The names; or a
            ``.txt`` file with one per line; or a ``.json`` file with a list
            or a dict; or such a dict.

    Returns:
        dict: ``names`` and, where they are known, ``phrases``, ``templates``,
        ``model``, ``pretrained``, ``library``.

    Raises:
        FileNotFoundError: If there is no such file.
        EmbeddingFileError: If there are no names in it.
    """
    where = 'The list of names'
    if isinstance(names, (str, os.PathLike)):
        path, where = Path(names), f'Names file {names}'
        if not path.is_file():
            raise FileNotFoundError(f'There is no names file {path}.')
        try:
            text = read_text_file(path)
            if path.suffix == '.json':
                names = json.loads(text)
            else:
                lines = map(str.strip, text.splitlines())
                names = [line for line in lines if line]
        except ValueError as error:
            raise EmbeddingFileError(f'{where}: {error}') from error
    known: Dict[str, Any] = {}
    if isinstance(names, Mapping):
        content, names = names, cast(Any, names.get('names'))
        for key in ('phrases', 'templates', 'model', 'pretrained', 'library'):
            if content.get(key):
                known[key] = content[key]
        if 'templates' not in known and isinstance(
                content.get('template'), str):
            known['templates'] = [content['template']]
    if not isinstance(names, (list, tuple)) or not names:
        raise EmbeddingFileError(
            f'{where}: expected class names in row order, a list or a dict '
            'with the list under "names"')
    for k, name in enumerate(names):
        if not isinstance(name, str):
            raise EmbeddingFileError(
                f'{where}: name {k} is no text but {name!r}')
        if has_control(name):
            raise EmbeddingFileError(f'{where}: name {name!r} has a line '
                                     'break or another control character')
    for key in set(known) & {'model', 'pretrained', 'library'}:
        if not isinstance(known[key], str):
            raise EmbeddingFileError(
                f'{where}: "{key}" is no text but {known[key]!r}')
    for key in set(known) & {'phrases', 'templates'}:
        if not isinstance(known[key], (list, tuple)) or not all(
                isinstance(text, str) for item in known[key]
                for text in (item if isinstance(item, (list,
                                                       tuple)) else [item])):
            raise EmbeddingFileError(f'{where}: "{key}" must be a list of '
                                     f'texts, but got {known[key]!r}')
    known['names'] = tuple(names)
    return known
