# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The safetensors file of class embeddings."""
from pathlib import Path
from typing import Dict, Tuple

from torch import Tensor

from ..utils.io import DamagedFileError, read_hashed
from .vector_import import EmbeddingFileError, sniff

KIND = 'mmseg_textkd.class_embeddings.1'
TEXTS = ('names', 'phrases', 'templates', 'model', 'pretrained', 'library')


def read_file(path: Path) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
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
