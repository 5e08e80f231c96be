# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Checks and serialization of checkpoints to be published."""
import hashlib
import io
import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Dict, Mapping, Optional

import torch
from torch import Tensor

from ..utils.checkpoint import checkpoint_bytes, non_finite

# As publish_model.py names them: other names may end in a date.
NAME = re.compile(r'.+_\d{8}_\d{6}-([0-9a-f]{8})\.pth')
# Parts of the names of weights that only text networks have.
TEXT = ('.text.', 'text_branch.', 'text_losses.')


def check_weights(path: Path,
                  state_dict: Mapping[str, Tensor],
                  meta: Mapping[str, Any],
                  keep_text: bool = False) -> bool:
    """Require weights that may be published.

    Args:
        path (Path): The checkpoint. If it has the name of a published file,
            its bytes must have the hash in the name.
        state_dict (Mapping[str, Tensor]): Its weights.
        meta (Mapping): Its meta.
        keep_text (bool): Whether text may be in it. Defaults to False.

    Returns:
        bool: Whether text is in it.

    Raises:
        ValueError: If the file is not the one that its name says, a weight is
            not finite, there is text, or the classes are not named.
    """
    name = NAME.fullmatch(path.name)
    if name and name[1] != hashlib.sha256(path.read_bytes()).hexdigest()[:8]:
        raise ValueError(f'{path} is not the file that was published under '
                         'this name: its SHA-256 is another one. Get it anew.')
    odd = non_finite(state_dict)
    if odd:
        raise ValueError(f'{path}: {odd}. Take an earlier checkpoint.')
    text = [k for k in state_dict if any(part in k for part in TEXT)]
    if text and not keep_text:
        raise ValueError(
            f'{path} still has text in it: {text[:3]}. Fold it first, '
            '`python tools/model_converters/textkd2mmseg.py CONFIG '
            f'{path} --out OUT`, or publish it with --keep-text: it then '
            'needs mmseg_textkd and its text config.')
    if not (meta.get('dataset_meta') or {}).get('classes'):
        raise ValueError(f'{path} does not name its classes: meta'
                         '["dataset_meta"]["classes"] is missing.')
    return bool(text)


def to_half(path: Path, state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """Round weights to half precision.

    Args:
        path (Path): The checkpoint, for the error.
        state_dict (Mapping[str, Tensor]): Its weights.

    Returns:
        dict[str, Tensor]: What was of float32 is of float16.

    Raises:
        ValueError: If a weight is too large for half precision.
    """
    half = {
        k: v.half() if v.dtype is torch.float32 else v
        for k, v in state_dict.items()
    }
    odd = non_finite(half)
    if odd:
        raise ValueError(f'{path} in half precision: {odd}. Publish it '
                         'without --fp16.')
    return half


def read_log(path: Path, iteration: Optional[int]) -> Dict[str, Any]:
    """Get the last validation in a log, up to an iteration.

    MMEngine may log validations with step 0; their iteration is that of the
    training line before.

    Args:
        path (Path): MMEngine's scalars.json, one JSON object a line.
        iteration (int, optional): That of the checkpoint. None: the last of
            the run.

    Returns:
        dict: ``metrics`` and ``iter``.

    Raises:
        ValueError: If it is no such log, or has no such validation.
    """
    found, iters = None, 0
    try:
        for line in path.read_text(encoding='utf-8').splitlines():
            entry = json.loads(line)
            iters = entry.get('iter', iters)
            if iteration is not None and iters > iteration:
                break
            if 'mIoU' in entry:
                drop = ('step', 'time', 'data_time')
                metrics = {k: v for k, v in entry.items() if k not in drop}
                found = dict(metrics=metrics, iter=iters)
    except (AttributeError, ValueError) as error:
        raise ValueError(f'{path} is no log of MMEngine: one JSON object a '
                         f'line was expected ({error})') from error
    if found is None:
        raise ValueError(f'{path} has no validation with mIoU' +
                         ('' if iteration is None else
                          f' up to iteration {iteration} of the checkpoint'))
    return found


def serialize(state_dict: Mapping[str, Tensor], meta: Dict[str, Any]) -> bytes:
    """Serialize a checkpoint that loads without this package.

    Args:
        state_dict (Mapping[str, Tensor]): The weights.
        meta (dict): What is known of them, text and numbers only.

    Returns:
        bytes: The file. The same input gives the same bytes.

    Raises:
        ValueError: If ``torch.load(weights_only=True)`` would refuse it where
            this package is not installed.
    """
    # Copies: torch writes all the memory behind a view.
    weights = {key: value.clone() for key, value in state_dict.items()}
    data = checkpoint_bytes(dict(state_dict=weights, meta=meta))
    # In this process the plugin has allowed what runner's checkpoints hold.
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        raise ValueError('its meta holds more than text and numbers, which '
                         f'weights_only=True refuses: {error}') from error
    finally:
        torch.serialization.add_safe_globals(allowed)
    return data
