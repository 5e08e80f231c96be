# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Loading of checkpoints, without running code and strictly."""
import copy
import hashlib
import io
import logging
import os
import re
from itertools import zip_longest
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..compat import weights_only
from .config import dicts, type_name

SHOWN = 5
NUMBERED = re.compile(r'(?:iter|epoch)_(\d+)\.pth')


def load_file(path: Union[str, os.PathLike], map_location: Any = 'cpu') -> Any:
    """Load a file of ``torch.save`` without running code in it.

    Args:
        path (str or PathLike): The file.
        map_location: As in ``torch.load``. Defaults to 'cpu'.

    Returns:
        Any: Its content.

    Raises:
        OSError: As of :func:`weights_only`.
        ValueError: As of :func:`weights_only`.
    """
    with weights_only(path):
        return torch.load(path, map_location=map_location, weights_only=True)


def read_checkpoint(path: Union[str, os.PathLike]) -> Dict[str, Any]:
    """Load a checkpoint without running code in it.

    With MMEngine's ``EMAHook`` the ``state_dict`` of a checkpoint holds the
    averaged weights, text included, and ``ema_state_dict`` the others: it
    swaps them when it saves.

    Args:
        path (str or PathLike): The file.

    Returns:
        dict: With ``state_dict``, whose names begin with no ``module.``, and
        ``meta``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds more than weights and logs, or is
            no checkpoint.
    """
    checkpoint = load_file(path)
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


def find_checkpoint(folder: Path) -> Optional[Path]:
    """Find the newest checkpoint of a run that can be read.

    That is the one that ``last_checkpoint`` names. A kill may leave that file
    empty, and a full disk half a checkpoint; then it is the one with the
    highest number that is whole, and a warning names those that were skipped.

    Args:
        folder (Path): Work directory of the run.

    Returns:
        Path, optional: The checkpoint; None if none can be read.
    """
    numbers = {
        path: int(NUMBERED.fullmatch(path.name)[1])
        for path in folder.glob('*.pth') if NUMBERED.fullmatch(path.name)
    }
    candidates = sorted(numbers, key=numbers.get, reverse=True)
    note, faults = folder / 'last_checkpoint', []
    if note.is_file():
        # A path of the machine that wrote it; the run may have been moved.
        named = folder / Path(note.read_text().strip() or '-').name
        if named.is_file():
            candidates.insert(0, named)
        else:
            faults.append(f'{note} names no checkpoint that is there')
    for path in dict.fromkeys(candidates):
        try:
            load_file(path)
        except (OSError, ValueError) as error:
            faults.append(str(error))
            continue
        if faults:
            print_log(
                f'{"; ".join(faults)}. Instead {path} is taken, the newest '
                'that can be read.', 'current', logging.WARNING)
        return path
    if faults:
        print_log('; '.join(faults), 'current', logging.WARNING)
    return None


def load_faults(model: nn.Module, state: Mapping[str, Tensor]) -> List[str]:
    """Load weights, and tell where they are not those of the model.

    Args:
        model (nn.Module): The model. What fits is loaded.
        state (Mapping[str, Tensor]): Weights by name.

    Returns:
        list[str]: What is missing, unexpected or of another shape, with the
        first names of each; empty if the weights are those of the model.
    """
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError:
        pass  # shapes, which are compared below
    # Only now: a mixture of phrases takes the number of them from the state.
    own = model.state_dict()
    # Old batch norms have none, and torch does not mind.
    missing = [
        k for k in own
        if k not in state and not k.endswith('num_batches_tracked')
    ]
    surplus = [k for k in state if k not in own]
    shapes = [
        f'{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}'
        for k, v in own.items() if k in state and state[k].shape != v.shape
    ]
    faults = [
        f'{len(names)} {what}: {", ".join(names[:SHOWN])}' +
        (', ...' if len(names) > SHOWN else '')
        for what, names in (('missing', missing), ('unexpected', surplus),
                            ('of another shape', shapes)) if names
    ]
    if any(k.endswith('.class_embeddings') for k in missing):
        faults.append('the config is that of a text network, the weights are '
                      'of a folded or stock one: use the config that '
                      'textkd2mmseg.py wrote beside them')
    if any(k.endswith('.class_embeddings') for k in surplus):
        faults.append('the weights are of a text network: use its config, or '
                      'fold them by tools/model_converters/textkd2mmseg.py')
    return faults


def load_strictly(model: nn.Module, state: Mapping[str, Tensor],
                  path: Union[str, os.PathLike]) -> None:
    """Load weights that must be those of the model, all of them and finite.

    Args:
        model (nn.Module): The model.
        state (Mapping[str, Tensor]): Weights by name.
        path (str or PathLike): Where they come from, for messages.

    Raises:
        ValueError: If names or shapes differ, or a weight is not finite, with
            the first of them.
    """
    odd = non_finite(state)
    if odd:
        raise ValueError(f'{path}: {odd}. Take an earlier checkpoint.')
    faults = load_faults(model, state)
    if faults:
        raise ValueError(f'{path} is not of the network of the config:\n  ' +
                         '\n  '.join(faults))


def class_names(meta: Mapping[str, Any]) -> Optional[Tuple[str, ...]]:
    """Get the names of the classes that a checkpoint is for.

    Args:
        meta (Mapping): Its ``meta``, also of MMSegmentation 0.x.

    Returns:
        tuple[str], optional: The names; None if it does not tell them.
    """
    names = (meta.get('dataset_meta')
             or {}).get('classes') or meta.get('CLASSES')
    return None if names is None else tuple(names)


def class_differences(theirs: Optional[Sequence[str]],
                      ours: Optional[Sequence[str]],
                      of: str = 'checkpoint') -> List[str]:
    """Compare the classes of a checkpoint with those of a data set.

    Args:
        theirs (Sequence[str], optional): Names in the checkpoint.
        ours (Sequence[str], optional): Names in the data set.
        of (str): What the first are in. Defaults to 'checkpoint'.

    Returns:
        list[str]: A line for each difference; empty if there is none, or if
        either side does not tell its names.
    """
    if theirs is None or ours is None:
        return []
    # Stock data sets have names such as 'bed '.
    pairs = zip_longest(*([name.strip() for name in names]
                          for names in (theirs, ours)))
    return [
        f'{k}: {their!r} in the {of}, {our!r} in the data set'
        for k, (their, our) in enumerate(pairs) if their != our
    ]


def skip_pretraining(model: Dict) -> Dict:
    """Take out the weights that timm loads when a network is built.

    Args:
        model (dict): Config of a network whose weights come from a
            checkpoint; changed in place.

    Returns:
        dict: The config.
    """
    for part in dicts(model):
        if type_name(part) == 'TIMMBackbone':
            part.update(pretrained=False, checkpoint_path='')
    return model


def build_network(model: Dict) -> nn.Module:
    """Build a network whose weights come from a checkpoint.

    Args:
        model (dict): Its config, which stays as it is.

    Returns:
        nn.Module: The network, without weights of a pre-training.
    """
    return MODELS.build(skip_pretraining(copy.deepcopy(model)))


def build_segmentor(model: Dict, state: Mapping[str, Tensor],
                    path: Union[str, os.PathLike]) -> nn.Module:
    """Build a network without auxiliary heads, and load it strictly.

    Args:
        model (dict): Config of the segmentor. Its ``auxiliary_head``, which
            only training needs, is removed, and so are weights that timm
            would load.
        state (Mapping[str, Tensor]): Weights by name, with those of auxiliary
            heads or without.
        path (str or PathLike): Where they come from, for messages.

    Returns:
        nn.Module: The network in evaluation mode, on the CPU.

    Raises:
        ValueError: As of :func:`load_strictly`.
    """
    model.pop('auxiliary_head', None)
    segmentor = revert_sync_batchnorm(build_network(model))
    load_strictly(segmentor, {
        k: v
        for k, v in state.items() if not k.startswith('auxiliary_head.')
    }, path)
    return segmentor.eval()


def non_finite(state: Mapping[str, Tensor]) -> str:
    """Find weights that are NaN or infinite.

    Args:
        state (Mapping[str, Tensor]): Weights by name.

    Returns:
        str: How many they are and the first of them; '' if there is none.
    """
    odd = [
        k for k, v in state.items()
        if v.is_floating_point() and not v.isfinite().all()
    ]
    if not odd:
        return ''
    return f'{len(odd)} weights have NaN or infinite values: {odd[:SHOWN]}'


def checkpoint_bytes(checkpoint: Dict[str, Any]) -> bytes:
    """Serialize a checkpoint as ``torch.save`` does.

    Args:
        checkpoint (dict): The checkpoint.

    Returns:
        bytes: The content of the file.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def checksum(module: nn.Module) -> str:
    """Hash all weights of a module, to prove that they are unchanged.

    Args:
        module (nn.Module): The module.

    Returns:
        str: SHA-256 over names, types, shapes and bytes of all parameters and
        buffers, in hexadecimal digits.
    """
    digest = hashlib.sha256()
    tensors: List[Tuple[str, Tensor]] = [
        *module.named_parameters(), *module.named_buffers()
    ]
    for name, value in sorted(tensors, key=lambda item: item[0]):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)};'.encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
