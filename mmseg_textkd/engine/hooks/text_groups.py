# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What the groups of an optimizer do to the text."""
import math
from typing import Any, Dict, List, Mapping

from mmengine.optim import OptimWrapper
from torch import nn

from ...models.layers import LogitScale
from ...models.text_parameters import prompt_parameters, text_parameters
from ...utils.config import type_name

SHOWN = 3


def check_groups(optim_wrapper: OptimWrapper) -> None:
    """Require settings of an optimizer that leave weights numbers.

    Args:
        optim_wrapper (OptimWrapper): The optimizer.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    odd = {
        key: value
        for group in optim_wrapper.param_groups
        for key, value in group.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if odd:
        raise ValueError(
            f'the optimizer has {odd}, of which all weights would become NaN. '
            'Set `optim_wrapper.optimizer` (and `param_scheduler`) to finite '
            'numbers.')


def group_faults(model: nn.Module, optim_wrapper: OptimWrapper,
                 cfg: Mapping[str, Any]) -> List[str]:
    """Find text parameters that learn otherwise than the config seems to say.

    MMEngine gives a parameter the settings of the longest key of
    ``custom_keys`` that is in its name, and none of the others; constructors
    with layer-wise rates do not look at ``custom_keys`` at all.

    Args:
        model (nn.Module): The model, not wrapped.
        optim_wrapper (OptimWrapper): Its optimizer.
        cfg (Mapping): The config of the optimizer, ``optim_wrapper``.

    Returns:
        list[str]: One line for each kind of fault, with what to do.
    """
    constructor = type_name(dict(type=cfg.get('constructor', '')))
    found = []
    if constructor in ('', 'DefaultOptimWrapperConstructor'):
        paramwise = cfg.get('paramwise_cfg') or {}
        found = _lost_settings(
            list(text_parameters(model)),
            paramwise.get('custom_keys') or {})
    decays = {
        id(param): group['weight_decay']
        for group in optim_wrapper.param_groups
        for param in group['params'] if group.get('weight_decay')
    }
    tied = dict(prompt_parameters(model))
    for name, module in model.named_modules():
        if isinstance(module, LogitScale) and module.learnable:
            tied[f'{name}.log_scale'] = module.log_scale
    decaying = [name for name, param in tied.items() if id(param) in decays]
    if decaying:
        why = "add '.text.': dict(decay_mult=0.) and 'log_scale': dict(" \
            'decay_mult=0.) to paramwise_cfg.custom_keys of optim_wrapper'
        if constructor not in ('', 'DefaultOptimWrapperConstructor'):
            why = f'{constructor} does not look at custom_keys; take one ' \
                'that does, or a weight_decay of 0'
        found.append(
            f'{_some(decaying)} decay by '
            f'{decays[id(tied[decaying[0]])]:g}, which pulls prompts back to '
            f'where they started and scales to 1: {why}.')
    return found


def _lost_settings(names: List[str], keys: Dict[str, Dict]) -> List[str]:
    """Settings of keys that are in a name, but are not the longest."""
    ordered = sorted(sorted(keys), key=len, reverse=True)  # as MMEngine does
    lost: Dict[tuple, List[str]] = {}
    for name in names:
        first, *others = [key for key in ordered if key in name] or ['']
        for key in others:
            for setting, value in keys[key].items():
                if setting not in keys[first] and value != 1:
                    lost.setdefault((first, key, setting, repr(value)),
                                    []).append(name)
    return [
        f'{_some(members)} do not get {setting}={value} of the key {key!r}: '
        f'of all keys in a name MMEngine takes the longest, {first!r}, alone. '
        f'If they should, write {first!r}: dict(..., {setting}={value})' +
        (f'; else {first!r}: dict(..., {setting}=1.).'
         if setting.endswith('_mult') else '.')
        for (first, key, setting, value), members in lost.items()
    ]


def _some(names: List[str]) -> str:
    """The first of many names."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more
