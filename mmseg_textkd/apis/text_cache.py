# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Vectors of words, kept on disk so that no tower is loaded twice for them."""
import hashlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Union

from mmengine.logging import print_log

from mmseg_textkd.text import TextEmbeddings


def default_cache_dir() -> Path:
    """Get the folder of the cache.

    Returns:
        Path: ``MMSEG_TEXTKD_CACHE``, or a folder of the user's cache.
    """
    own = os.environ.get('MMSEG_TEXTKD_CACHE')
    if own:
        return Path(own)
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(home) / 'mmseg_textkd' / 'text'


def cached(made_of: Mapping[str, Any], make: Callable[[], TextEmbeddings],
           folder: Optional[Union[str, os.PathLike]]) -> TextEmbeddings:
    """Get embeddings from the cache, or make them and put them there.

    Entries are embeddings files: written whole or not at all, and verified
    when they are read. One that is damaged is made anew; a folder that cannot
    be written to costs nothing but the time.

    Args:
        made_of (Mapping): All that the vectors depend on, as JSON knows it.
            Files and folders of weights that it names count with their size
            and time.
        make (Callable): Makes the embeddings.
        folder (str or PathLike, optional): The cache. None:
            :func:`default_cache_dir`.

    Returns:
        TextEmbeddings: The embeddings.
    """
    try:
        library = version('open_clip_torch')
    except PackageNotFoundError:
        library = ''
    tower = dict(made_of)['tower']
    key = json.dumps([dict(made_of), library, _files(tower)], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()
    path = Path(folder or default_cache_dir()) / f'{name}.safetensors'
    if path.is_file():
        try:
            return TextEmbeddings.load(path)
        except (OSError, ValueError) as error:
            print_log(f'A damaged entry of the cache is made anew: {error}',
                      'current')
    found = make()
    try:
        found.save(path)
    except OSError as error:
        print_log(f'The vectors cannot be kept in the cache: {error}',
                  'current')
    return found


def _files(tower: Mapping[str, Optional[str]]) -> List[Dict[str, Any]]:
    """Size and time of local weights: they may change under their name."""
    model, pretrained = tower['model'], tower.get('pretrained') or ''
    files: List[Path] = []
    if model.startswith('local-dir:'):
        files = sorted(Path(model[len('local-dir:'):]).glob('*'))
    elif Path(pretrained).is_file():
        files = [Path(pretrained)]
    return [
        dict(name=f.name, size=f.stat().st_size, time=f.stat().st_mtime_ns)
        for f in files
    ]
