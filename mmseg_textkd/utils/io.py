# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Atomic writing, verified reading and safe removal of files."""
import hashlib
import json
import os
import shutil
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Tuple, Union

import cv2
import numpy as np
from torch import Tensor

PathLike = Union[str, os.PathLike]
# Pillow's own: of more pixels it warns as of an attack.
MAX_PIXELS = 89_478_485
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_PILLOW = threading.Lock()  # its limit is one of the whole process
MARK = '.mmseg_textkd'
MARK_TEXT = 'Made by mmseg_textkd, which may remove this folder.\n'


class DamagedFileError(ValueError):
    """Raised for a file that is truncated, changed, or of another kind."""


class UnknownImageError(ValueError):
    """A file is no image of a format that is known."""


def write_files(files: Mapping[PathLike, bytes]) -> None:
    """Write several files atomically.

    Args:
        files (Mapping[str or PathLike, bytes]): Contents by path. Folders are
            made.

    Raises:
        OSError: If one cannot be written; none is then.
    """
    # In the same folder: os.replace is atomic within a file system only.
    temporary = {
        Path(path):
        Path(path).with_name(f'.{Path(path).name}.{uuid.uuid4().hex[:12]}.tmp')
        for path in files
    }
    try:
        for (path, part), data in zip(temporary.items(), files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, 'xb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in temporary.items():
            os.replace(part, path)
    finally:
        for part in temporary.values():
            part.unlink(missing_ok=True)


# ------------------------------------------------------ hashed safetensors
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


def write_hashed(path: PathLike, kind: str, tensors: Mapping[str, Tensor],
                 texts: Mapping[str, str]) -> None:
    """Write a safetensors file with a hash of its content.

    Args:
        path (str or PathLike): The file. Folders are made, and readers never
            see half of it.
        kind (str): What is in it, with a version.
        tensors (Mapping[str, Tensor]): Contiguous tensors on the CPU.
        texts (Mapping[str, str]): Texts by name.
    """
    from safetensors.torch import save
    meta = dict(texts, kind=kind, sha256=digest(texts, tensors))
    write_files({path: save(dict(tensors), metadata=meta)})


def read_hashed(path: PathLike,
                kind: str) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Read and verify a file of :func:`write_hashed`.

    It is read once, so that all that is verified is what is returned, even
    where another process replaces or cuts the file.

    Args:
        path (str or PathLike): The file.
        kind (str): What must be in it.

    Returns:
        tuple[dict[str, Tensor], dict[str, str]]: Tensors and texts, in memory
        of their own.

    Raises:
        OSError: If it cannot be read.
        DamagedFileError: If it is damaged, changed or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load
    data = Path(path).read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise DamagedFileError(
            'It is cut short or damaged, as after a copy or download that '
            f'did not finish ({error}).') from error
    header = json.loads(data[8:8 + int.from_bytes(data[:8], 'little')])
    texts = header.get('__metadata__') or {}
    found, sha256 = texts.pop('kind', None), texts.pop('sha256', None)
    if found != kind:
        raise DamagedFileError(
            f'It is a safetensors file with the tensors {sorted(tensors)} '
            f'that says kind={found!r} where {kind!r} is needed.')
    if sha256 != digest(texts, tensors):
        raise DamagedFileError(
            f'It is damaged: its content, the tensors {sorted(tensors)}, does '
            'not fit its SHA-256. Somebody or something has changed it since '
            'it was written.')
    return tensors, texts


# ----------------------------------------------------------------- folders
@contextmanager
def new_folder(path: PathLike) -> Iterator[Path]:
    """Write a folder that is there when it is whole, or not at all.

    Args:
        path (str or PathLike): The folder, which must not exist.

    Yields:
        Path: A folder beside it that gets its name in the end, or is removed.

    Raises:
        FileExistsError: If something of that name exists.
        FileNotFoundError: If there is no folder that it could be in.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileExistsError(f'{path} exists; remove it or write elsewhere')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent}')
    part = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:12]}.tmp')
    part.mkdir()
    try:
        yield part
        os.rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_folder(path: PathLike) -> Path:
    """Make or empty a folder that :func:`remove_folder` may remove.

    Args:
        path (str or PathLike): The folder.

    Returns:
        Path: The folder, with nothing in it but our mark.

    Raises:
        FileExistsError: If something is there that does not carry the mark.
    """
    path = Path(path)
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        remove_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARK).write_text(MARK_TEXT, encoding='utf-8')
    return path


def remove_folder(path: PathLike) -> None:
    """Remove a folder of :func:`make_folder` with its content.

    Args:
        path (str or PathLike): The folder.

    Raises:
        FileExistsError: If it does not carry our mark, or is a link.
    """
    path = Path(path)
    if path.is_symlink() or not (path / MARK).is_file() or (
            path / MARK).read_text(encoding='utf-8') != MARK_TEXT:
        raise FileExistsError(
            f'{path} is there and was not made by this tool; nothing was '
            'removed. Choose another folder, or remove it by hand.')
    shutil.rmtree(path)


# ------------------------------------------------------------------ images
def check_image(path: PathLike, max_pixels: int = MAX_PIXELS) -> None:
    """Require an image of a limited size by its header.

    Args:
        path (str or PathLike): The image.
        max_pixels (int): Most pixels that it may have. Defaults to 89478485,
            Pillow's own limit.

    Raises:
        FileNotFoundError: If there is no such file.
        UnknownImageError: If it is no image.
        ValueError: If it has more pixels.
    """
    from PIL import Image
    with _PILLOW:
        limit = Image.MAX_IMAGE_PIXELS
        try:
            # Its own limit is another one.
            Image.MAX_IMAGE_PIXELS = None
            with Image.open(path) as image:
                width, height = image.size
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, ValueError) as error:
            raise UnknownImageError(
                f'{path} cannot be read as an image: {error}') from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if width * height > max_pixels:
        raise ValueError(
            f'{path} has {width} x {height} = {width * height} pixels, more '
            f'than the {max_pixels} that are allowed. Make it smaller, or '
            'allow more (max_pixels; `--max-pixels`).')


def read_image(path: PathLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image after checking its size by the header.

    Args:
        path (str or PathLike): The image.
        max_pixels (int): See :func:`check_image`. Defaults to 89478485.

    Returns:
        np.ndarray: uint8, BGR, with shape (H, W, 3).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, or too large.
    """
    check_image(path, max_pixels)
    data = np.fromfile(path, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f'{path} cannot be read as an image')
    return image


def list_images(folder: PathLike) -> List[Path]:
    """List the images of a folder, in the order of their names.

    Args:
        folder (str or PathLike): The folder.

    Returns:
        list[Path]: Their paths.

    Raises:
        ValueError: If there is none.
    """
    paths = sorted(
        p for p in Path(folder).glob('*') if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f'there are no images in {folder}')
    return paths
