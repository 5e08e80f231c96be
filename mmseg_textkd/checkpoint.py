# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Read checkpoints that others wrote."""
import zipfile
from pathlib import Path
from typing import Dict, Mapping

import torch
from torch import Tensor, nn

from .compat import allow_runner_checkpoints

SHOWN = 5


def read_checkpoint(path: Path) -> Dict:
    """Read a checkpoint without running any code that may be in it.

    With MMEngine's ``EMAHook`` the ``state_dict`` of a checkpoint holds the
    averaged weights, text included, and ``ema_state_dict`` the others: it
    swaps them when it saves.

    Args:
        path (Path): The file.

    Returns:
        dict: With ``state_dict``, whose names begin with no ``module.``, and
        ``meta``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds more than weights and logs, or is
            no checkpoint.
    """
    try:
        if zipfile.is_zipfile(path):
            # torch does not look at the checksums.
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken:
                raise ValueError(f'the checksum of {broken} does not fit')
        allow_runner_checkpoints()
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f'{path} is no checkpoint, a damaged one, or one '
                         f'that is not safe to read: {error}') from error
    state = checkpoint
    if isinstance(checkpoint, dict) and 'state_dict' in checkpoint:
        state = checkpoint['state_dict']
    if not isinstance(state, dict) or not state or not all(
            isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f'{path} has no weights: a `state_dict`, by name, '
                         'was expected.')
    return dict(
        state_dict={
            k.removeprefix('module.'): v
            for k, v in state.items()
        },
        meta=dict(checkpoint.get('meta') or {}))


def load_strictly(model: nn.Module, state: Mapping[str, Tensor],
                  path: Path) -> None:
    """Load weights that must be those of the model, all of them.

    Args:
        model (nn.Module): The model.
        state (Mapping[str, Tensor]): Weights by name.
        path (Path): Where they come from, for messages.

    Raises:
        ValueError: If names or shapes differ, with the first of them.
    """
    own = model.state_dict()
    # Old batch norms have none, and torch does not mind.
    missing = [
        k for k in own
        if k not in state and not k.endswith('num_batches_tracked')
    ]
    shapes = [
        f'{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}'
        for k, v in own.items() if k in state and state[k].shape != v.shape
    ]
    faults = [
        f'{len(names)} {what}: {", ".join(names[:SHOWN])}' +
        (', ...' if len(names) > SHOWN else '')
        for what, names in (('missing', missing),
                            ('unexpected', [k for k in state if k not in own]),
                            ('of another shape', shapes)) if names
    ]
    if faults:
        raise ValueError(f'{path} is not of the network of the config:\n  ' +
                         '\n  '.join(faults))
    model.load_state_dict(state, strict=True)
