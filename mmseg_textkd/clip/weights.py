# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Local weights of CLIP models, downloaded where there is a network.

Weights are always opened from local files. open_clip on its own queries the
hub first, which costs half a minute of retries per file on a machine without a
network even if everything is in the cache, and goes on with random weights
when a download fails.
"""

import difflib
import hashlib
import json
import logging
import os
import socket
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Union
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from mmengine.logging import print_log

LOCAL, HUB = 'local-dir:', 'hf-hub:'
CONFIG_NAME = 'open_clip_config.json'
BPE_NAME = 'bpe_vocab.txt.gz'
WEIGHT_SUFFIXES = ('.safetensors', '.bin', '.pth')
TOKENIZER_FILES = ('tokenizer*', 'vocab*', 'merges*', 'special_tokens*',
                   'sentencepiece*', 'spiece*')
TOY_CLIP = Path(__file__).parent / 'toy_clip'
PathLike = Union[str, os.PathLike]


class TextTowerError(RuntimeError):
    """Raised where a tower is not available or not supported."""


def expand(cache_dir: Optional[PathLike]) -> Optional[str]:
    """Expand the ``~`` of a folder, which the hub's client takes as it is."""
    return None if cache_dir is None else os.path.expanduser(cache_dir)


class WeightsLocation(NamedTuple):
    """Local weights of a tower, as ``open_clip.create_model`` takes them.

    Attributes:
        name (str): Architecture name or ``local-dir:`` name.
        pretrained (str, optional): Weights file of an architecture.
        quick_gelu (bool): Whether the weights were trained with QuickGELU.
        preprocess (dict, optional): ``mean`` and ``std`` of the images that
            they were trained with, in [0, 1], if not those of the
            architecture.
    """

    name: str
    pretrained: Optional[str] = None
    quick_gelu: bool = False
    preprocess: Optional[Dict[str, Sequence[float]]] = None


class _NotHere(Exception):
    """Raised where known weights are not on this machine.

    Args:
        looked (str): Where was looked.
        url (str): The server which has them.
    """

    def __init__(self, looked: str, url: str) -> None:
        super().__init__(looked)
        self.looked, self.url = looked, url


def import_open_clip() -> ModuleType:
    """Import open_clip on first use, since only towers need it.

    Raises:
        TextTowerError: If it is not installed or its import fails.
    """
    try:
        import open_clip
    except ImportError as error:
        raise TextTowerError(
            f'A text tower needs open_clip ({error}). Install it with '
            '`pip install open_clip_torch`, or use a precomputed embeddings '
            'file, which needs no tower.') from error
    except Exception as error:
        raise TextTowerError(
            f'open_clip is installed but its import fails: {error} (a torch '
            'and a torchvision that do not belong together are the usual '
            'cause; install both in one pip command)') from error
    return open_clip


def missing_weights(model: str, pretrained: Optional[str], looked: str,
                    reason: str) -> TextTowerError:
    """Make the error for weights that are not available."""
    name = model + (f' --pretrained {pretrained}' if pretrained else '')
    if model.startswith(LOCAL) or model == 'toyclip':
        name = 'ViT-B-16 --pretrained openai'
    return TextTowerError(
        f'The weights of the text tower {model!r} (pretrained={pretrained!r}) '
        f'cannot be had: {reason}\n'
        f'Looked in: {looked}\n'
        'Three remedies:\n'
        '  1. On a machine with a network run `python tools/encode_text.py '
        f'--prefetch --model {name} --cache-dir DIR`, copy DIR here and give '
        "cache_dir='DIR' (encode_text.py: `--cache-dir DIR`; the demo and "
        'textkd2mmseg.py: HF_HUB_CACHE=DIR in the environment).\n'
        "  2. Use a local copy: model='local-dir:/path' (a folder with "
        f'{CONFIG_NAME} and weights), or an architecture name with '
        "pretrained='/path/to/weights.safetensors'; of OpenAI's weights its "
        "-quickgelu form, such as 'ViT-B-16-quickgelu'. In tools these are "
        '`--model` (the demo: `--text-model`) and `--pretrained`.\n'
        '  3. Do without a tower: encode the class names elsewhere and import '
        'the vectors with `python tools/encode_text.py --import VECTORS.npy '
        '--names-file NAMES.json --out FILE.safetensors`. Then pass it: '
        '`--embeddings FILE.safetensors` (the demo and textkd2mmseg.py), '
        "embeddings='FILE.safetensors' (set_classes) or, in a config, "
        "file='FILE.safetensors'.")


def find_weights(model: str,
                 pretrained: Optional[str] = None,
                 cache_dir: Optional[PathLike] = None) -> WeightsLocation:
    """Locate the weights of a tower, downloading them when there is a network.

    Args:
        model (str): ``'toyclip'``, an architecture name of open_clip,
            ``hf-hub:org/name`` or ``local-dir:/path``.
        pretrained (str, optional): Tag or weights file of an architecture.
            Defaults to None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None, the cache of the hub.

    Raises:
        TextTowerError: If there are no weights.
    """
    try:
        return _locate(model, pretrained, cache_dir)
    except _NotHere as missing:
        looked, url = missing.looked, missing.url
    if _offline():
        raise missing_weights(
            model, pretrained, looked, 'they are not in the cache, and '
            'HF_HUB_OFFLINE forbids a download.')
    try:
        _require_server(url)
    except OSError as error:
        raise missing_weights(
            model, pretrained, looked, 'they are not in the cache, and '
            f'{urlsplit(url).hostname} cannot be reached '
            f'({error}).') from error
    print_log(
        f'Downloading the text tower {model} from '
        f'{urlsplit(url).hostname}', 'current')
    try:
        _download(model, pretrained, cache_dir)
        return _locate(model, pretrained, cache_dir)
    except _NotHere as error:
        raise missing_weights(
            model, pretrained, looked,
            'the download did not bring the needed files.') from error
    except Exception as error:
        raise missing_weights(model, pretrained, looked,
                              f'the download failed: {error}') from error


def hash_weights(model: str,
                 pretrained: Optional[str] = None,
                 cache_dir: Optional[PathLike] = None) -> Optional[str]:
    """Hash the files of a tower, without loading it.

    Args:
        model (str): See :func:`find_weights`.
        pretrained (str, optional): Tag or weights file of an architecture.
            Defaults to None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None, the cache of the hub.

    Returns:
        str, optional: SHA-256 over weights and configuration, in hexadecimal
        digits; None if they are not on this machine. Nothing is downloaded.
    """
    try:
        location = _locate(model, pretrained, cache_dir)
    except (_NotHere, TextTowerError):
        return None
    if location.pretrained:
        files = [Path(location.pretrained)]
    else:
        folder = Path(location.name[len(LOCAL):])
        files = sorted(p for p in folder.iterdir()
                       if p.suffix in WEIGHT_SUFFIXES or p.name == CONFIG_NAME)
    total = hashlib.sha256()
    if location.pretrained:
        total.update(f'{location.name} {location.quick_gelu} '
                     f'{location.preprocess};'.encode())
    for path in files:
        _hash_file(total, path)
    return total.hexdigest()


def find_hub_file(repo: str,
                  filename: str,
                  cache_dir: Optional[PathLike] = None) -> str:
    """Locate one file of a hub repository, downloading it if need be.

    Args:
        repo (str): Repository, ``org/name``.
        filename (str): File in it.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None, the cache of the hub.

    Returns:
        str: Path of the file on this machine.

    Raises:
        OSError: If it is not in the cache and cannot be fetched.
    """
    try:
        return _hub_files(repo, filename, cache_dir)[0]
    except _NotHere as missing:
        looked, url = missing.looked, missing.url
    try:
        if _offline():
            raise OSError('HF_HUB_OFFLINE forbids a download')
        _require_server(url)
        from huggingface_hub import hf_hub_download
        return hf_hub_download(repo, filename, cache_dir=expand(cache_dir))
    except Exception as error:
        raise OSError(f'{filename} of {repo} is not in the cache ({looked}) '
                      f'and cannot be fetched: {error}') from error


def _locate(model: str, pretrained: Optional[str],
            cache_dir: Optional[PathLike]) -> WeightsLocation:
    """Locate weights on this machine only."""
    if model == 'toyclip':
        return _locate_folder(model, TOY_CLIP)
    if model.startswith(LOCAL):
        return _locate_folder(model, Path(model[len(LOCAL):]).expanduser())
    if model.startswith(HUB):
        config = _hub_files(model[len(HUB):], None, cache_dir, True)[1]
        return WeightsLocation(LOCAL + str(Path(config).parent))
    return _locate_architecture(model, pretrained, cache_dir)


def _locate_folder(model: str, folder: Path) -> WeightsLocation:
    """Check a ``local-dir:`` folder before open_clip reads it."""
    looked = str(folder.absolute())
    if not folder.is_dir():
        raise missing_weights(model, None, looked, 'there is no such folder.')
    if not (folder / CONFIG_NAME).is_file():
        raise missing_weights(model, None, looked,
                              f'the folder has no {CONFIG_NAME}.')
    if not any(p.suffix in WEIGHT_SUFFIXES for p in folder.iterdir()):
        raise missing_weights(
            model, None, looked, 'the folder has no weights '
            f'({", ".join("*" + s for s in WEIGHT_SUFFIXES)}).')
    return WeightsLocation(LOCAL + str(folder))


def _locate_architecture(model: str, pretrained: Optional[str],
                         cache_dir: Optional[PathLike]) -> WeightsLocation:
    """Find the weights of one of open_clip's architectures."""
    open_clip = import_open_clip()
    name = model.replace('/', '-')
    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), 4, .5)
        raise TextTowerError(
            f'open_clip {open_clip.__version__} has no architecture '
            f'{model!r}; near it: {near or "nothing"}. Other kinds of names: '
            f"'{HUB}org/name', '{LOCAL}/path', 'toyclip'.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not pretrained:
        raise TextTowerError(
            f'Architecture {model!r} without weights would be random: give '
            f'pretrained=, a weights file or one of the tags {tags}.')
    cfg = open_clip.get_pretrained_cfg(name, pretrained)
    if not cfg:
        path = Path(pretrained).expanduser()
        if path.is_file():
            return WeightsLocation(name, str(path), _needs_quick_gelu(path),
                                   _common_preprocess(name, tags))
        raise missing_weights(
            model, pretrained, str(path.absolute()),
            f'{pretrained!r} is neither a file nor one of the tags {tags}.')
    # open_clip cannot infer them from the file in place of the tag.
    return WeightsLocation(name, _tag_file(cfg, cache_dir),
                           bool(cfg.get('quick_gelu')), _preprocess(cfg))


def _preprocess(cfg: Dict) -> Dict[str, Sequence[float]]:
    """Normalization of images that a tag was trained with."""
    return {key: cfg[key] for key in ('mean', 'std') if key in cfg}


def _common_preprocess(name: str,
                       tags: Sequence[str]) -> Optional[Dict[str, Any]]:
    """Normalization of all tags of an architecture; None if they differ."""
    from open_clip import get_pretrained_cfg
    found = [_preprocess(get_pretrained_cfg(name, tag)) for tag in tags]
    return found[0] if found and found.count(found[0]) == len(found) else None


def _needs_quick_gelu(path: Path) -> bool:
    """Whether a weights file is one of OpenAI's, which have QuickGELU.

    Nothing in a file tells it, and either activation gives vectors.
    """
    from open_clip import pretrained
    urls = [
        cfg.get('url') or '' for tags in pretrained._PRETRAINED.values()
        for cfg in tags.values() if cfg.get('quick_gelu')
    ]
    # OpenAI's addresses name the SHA-256.
    known = {part for url in urls for part in url.split('/') if len(part) > 63}
    return _hash_file(hashlib.sha256(), path).hexdigest() in known


def warn_of_activation(model: str, pretrained: Optional[str],
                       location: WeightsLocation) -> None:
    """Say that a weights file may need another form of its architecture.

    Args:
        model (str): See :func:`find_weights`.
        pretrained (str, optional): What was asked for.
        location (WeightsLocation): What was found.
    """
    form = f'{location.name}-quickgelu'
    if (location.pretrained and location.pretrained == _expanded(pretrained)
            and not location.quick_gelu
            and form in import_open_clip().list_models()):
        print_log(
            f'{pretrained} is loaded as {model}, with GELU. If these are '
            "OpenAI's weights, or others that were trained with QuickGELU "
            f'(DFN, MetaCLIP), the vectors are wrong: then give {form}.',
            'current', logging.WARNING)


def _expanded(pretrained: Optional[str]) -> str:
    """A path as it is looked up."""
    return str(Path(pretrained or '').expanduser())


def _hash_file(total: Any, path: Path) -> Any:
    """Add the content of a file to a hash."""
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 22), b''):
            total.update(block)
    return total


def _tag_file(cfg: Dict, cache_dir: Optional[PathLike]) -> str:
    """Find the file of a pretrained tag in the cache."""
    if cfg.get('file'):
        return cfg['file']
    if cfg.get('hf_hub'):
        repo, filename = os.path.split(cfg['hf_hub'])
        return _hub_files(repo, filename, cache_dir)[0]
    folder = Path(cache_dir or '~/.cache/clip').expanduser()
    path = folder / os.path.basename(cfg['url'])
    if not path.is_file():
        raise _NotHere(str(path), cfg['url'])
    return str(path)


def _hub_files(repo: str,
               filename: Optional[str],
               cache_dir: Optional[PathLike],
               config: bool = False) -> List[str]:
    """Find a hub repository's files in the cache: weights, configuration.

    A tag names an architecture, so its repository needs no configuration.
    """
    import_open_clip()
    cache_dir = expand(cache_dir)
    from huggingface_hub import constants, try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
    if filename:
        # open_clip's download prefers the safetensors version of a file.
        safetensors = os.path.splitext(filename)[0] + '.safetensors'
        wanted = [(safetensors, filename)]
    else:
        wanted = [(HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)]
    if config:
        wanted.append((CONFIG_NAME, ))
    found = []
    for names in wanted:
        paths = (
            try_to_load_from_cache(repo, name, cache_dir=cache_dir)
            for name in names)
        found.append(next((p for p in paths if isinstance(p, str)), None))
        if found[-1] is None:
            folder = Path(cache_dir or constants.HF_HUB_CACHE)
            raise _NotHere(
                f'{folder / ("models--" + repo.replace("/", "--"))} for '
                f'{" or ".join(names)}', constants.ENDPOINT)
    return found


def _download(model: str, pretrained: Optional[str],
              cache_dir: Optional[PathLike]) -> None:
    """Download the weights of :func:`_locate` into the cache."""
    open_clip = import_open_clip()
    cache_dir = expand(cache_dir)
    if not model.startswith(HUB):
        cfg = open_clip.get_pretrained_cfg(model.replace('/', '-'), pretrained)
        open_clip.download_pretrained(cfg, cache_dir=cache_dir)
        return
    from huggingface_hub import snapshot_download
    from open_clip.pretrained import download_pretrained_from_hf
    repo = model[len(HUB):]
    config = download_pretrained_from_hf(
        repo, filename=CONFIG_NAME, cache_dir=cache_dir)
    download_pretrained_from_hf(repo, cache_dir=cache_dir)
    text_cfg = json.loads(Path(config).read_text('utf-8'))['model_cfg'].get(
        'text_cfg', {})
    if text_cfg.get('hf_tokenizer_name'):
        # Opened as a local-dir later, where open_clip wants these files too.
        snapshot_download(
            repo, cache_dir=cache_dir, allow_patterns=list(TOKENIZER_FILES))


def _offline() -> bool:
    """Whether downloads from the hub are disabled."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return False
    return bool(constants.HF_HUB_OFFLINE)


def _require_server(url: str, timeout: float = 5.) -> None:
    """Raise OSError within seconds if a server (or its proxy) is down.

    The hub's client would retry for about a minute.
    """
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if '://' in proxy else f'http://{proxy}')
    port = parts.port or (443 if parts.scheme == 'https' else 80)
    socket.create_connection((parts.hostname, port), timeout).close()
