# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Released models by their names."""
import difflib
import hashlib
from pathlib import Path
from typing import Any, Dict, List, Tuple

import mmengine

PACKAGE = Path(__file__).resolve().parents[1]


def released_models() -> List[str]:
    """Names of the models whose weights have been released.

    Returns:
        list[str]: Names, as :func:`find_model` takes them.
    """
    return sorted(k for k, v in _entries(_root()).items() if 'Weights' in v)


def find_model(name: str, text: bool = False) -> Tuple[Path, Path]:
    """Find config and weights of a released model.

    They are what ``mmseg.apis.init_model`` and MMSegmentation's
    ``MMSegInferencer(model=..., weights=...)`` take. No network is used.

    Args:
        name (str): Name of the model, that of its config.
        text (bool): Whether to take, where the model has them, the weights
            that still have text in them, which :class:`.TextSegInferencer`
            can ask for other classes. Defaults to False: the folded ones,
            which are those of a stock network.

    Returns:
        tuple[Path, Path]: The config and the weights.

    Raises:
        ValueError: If there is no such model, none of its weights have been
            released, or the file is not the released one.
        FileNotFoundError: If the weights are not there, as in a wheel.
    """
    root = _root()
    entries = _entries(root)
    released = [k for k, v in entries.items() if 'Weights' in v]
    if name not in released:
        reason = ('has no released weights'
                  if name in entries else 'is neither a file nor a model')
        near = difflib.get_close_matches(name, released, n=3, cutoff=0.3)
        raise ValueError(f'{name!r} {reason}. Released models are '
                         f'{near or released}; see model_zoo/README.md.')
    entry = entries[name]
    config, weights = entry['Config'], entry['Weights']
    if text and 'Text Weights' in entry:
        config, weights = entry['Text Config'], entry['Text Weights']
    path = root / weights
    if not path.is_file():
        raise FileNotFoundError(
            f'the weights of {name} are not at {path}. They are in the '
            'repository, not in the installed package: clone it, and install '
            'it with `pip install -e .`.')
    if hashlib.sha256(path.read_bytes()).hexdigest()[:8] != path.stem[-8:]:
        raise ValueError(f'{path} is not the released file: its SHA-256 does '
                         f'not begin with {path.stem[-8:]}. Get it anew.')
    return root / config, path


def _root() -> Path:
    """Folder of model-index.yml: the checkout, or ``.mim`` of a wheel."""
    index = PACKAGE / '.mim/model-index.yml'
    if not index.is_file():
        index = PACKAGE.parent / 'model-index.yml'
    # In an editable install it is a link into the checkout.
    return index.resolve().parent


def _entries(root: Path) -> Dict[str, Dict[str, Any]]:
    """Entries of all models by their names."""
    index = mmengine.load(root / 'model-index.yml')
    return {
        model['Name']: model
        for path in index['Import']
        for model in mmengine.load(root / path)['Models']
    }
