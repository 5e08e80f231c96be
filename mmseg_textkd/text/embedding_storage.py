# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The safetensors file of class embeddings: bytes, hash, atomic writes."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Dict, Mapping, Tuple, Union

from torch import Tensor

from .vector_import import EmbeddingFileError, sniff

KIND = 'mmseg_textkd.class_embeddings.1'
TEXTS = ('names', 'phrases', 'templates', 'model', 'pretrained', 'library')


def digest(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Hash texts and tensors with their names, types and shapes.

    Args:
        texts (Mapping[str, str]): The texts.
        tensors (Mapping[str, Tensor]): Contiguous tensors on the CPU.

    Returns:
        str: SHA-256 in hexadecimal digits.
    """
    total = hashlib.sha256()
    for name in sorted(texts):
        # With its length: no text can flow over into the next.
        data = texts[name].encode()
        total.update(f'{name} {len(data)};'.encode() + data)
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f'{name} {value.dtype} {tuple(value.shape)};'.encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def write_file(path: Union[str, os.PathLike], tensors: Mapping[str, Tensor],
               texts: Mapping[str, str]) -> None:
    """Write a file so that readers never see half of it.

    Args:
        path (str or PathLike): The file. Folders are made.
        tensors (Mapping[str, Tensor]): Contiguous tensors on the CPU.
        texts (Mapping[str, str]): The texts named in ``TEXTS``, as JSON.
    """
    from safetensors.torch import save
    meta = dict(texts, kind=KIND, sha256=digest(texts, tensors))
    data = save(dict(tensors), metadata=meta)
    write_atomically(Path(path), data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file at once or not at all.

    Args:
        path (Path): The file. Folders are made.
        data (bytes): Its content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: os.replace is atomic within a file system only.
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner alone.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_file(path: Path) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Read and verify a file of :func:`write_file`.

    Args:
        path (Path): The file.

    Returns:
        tuple[dict[str, Tensor], dict[str, str]]: Tensors and texts.

    Raises:
        EmbeddingFileError: If it is of another kind, damaged or changed.
    """
    from safetensors import SafetensorError, safe_open
    kind = sniff(path)
    if kind != 'safetensors':
        raise EmbeddingFileError(
            f'It is no embeddings file but {kind}. If it holds plain vectors, '
            f'import it: `python tools/encode_text.py --import {path} '
            '--names-file NAMES.json --out FILE.safetensors`.')
    try:
        with safe_open(path, framework='pt') as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise EmbeddingFileError(
            'It is cut short or damaged, as after a copy or download that '
            f'did not finish ({error}). Delete it and make it anew.'
        ) from error
    allowed = {'vectors', 'bank', 'bank_mask'}
    if (meta.get('kind') != KIND or 'vectors' not in tensors
            or set(tensors) - allowed or set(TEXTS) - set(meta)):
        raise EmbeddingFileError(
            'It is a safetensors file, but none of class embeddings: it has '
            f'the tensors {sorted(tensors)} and says kind='
            f'{meta.get("kind")!r} where `vectors` and {KIND!r} are needed. '
            'Plain vectors are imported with `python tools/encode_text.py '
            f'--import {path} --names-file NAMES.json --out '
            'FILE.safetensors`.')
    texts = {name: meta[name] for name in TEXTS}
    if digest(texts, tensors) != meta.get('sha256'):
        raise EmbeddingFileError(
            'Its content does not fit its SHA-256: somebody or something has '
            'changed it since it was written. Make it anew.')
    return tensors, texts
