# Copyright (c) mmseg_textkd contributors. All rights reserved.
import re
from typing import Dict, List, Optional, Sequence, Set

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmseg.registry import PARAM_SCHEDULERS
from torch import nn

from ...models.text_parameters import text_parameters

# Schedulers of the deprecated argument `schedule`, by its `type`.
SCHEDULES: Dict[str, List[dict]] = dict(
    constant=[],
    cosine=[dict(type='CosineAnnealingLR', eta_min=0.)],
    poly=[dict(type='PolyLR', power=0.9, eta_min=0.)])


def convert_schedule(type: str = 'constant',
                     warmup_iters: int = 0) -> List[dict]:
    """Convert the deprecated ``schedule`` to configs of schedulers."""
    if type not in SCHEDULES or warmup_iters < 0:
        raise ValueError(f'unknown schedule {type!r} for stage 2, or a '
                         f'negative `warmup_iters`: {warmup_iters}.')
    warmup = dict(
        type='LinearLR',
        start_factor=1 / max(warmup_iters, 1),
        end=warmup_iters)
    return SCHEDULES[type] + [warmup] * (warmup_iters > 1)


def lr_factors(model: nn.Module, learn: Optional[Dict[str, float]],
               trainable: Set[str]) -> Dict[str, float]:
    """Get the parameters of stage 2, with factors on their learning rates.

    Args:
        model (nn.Module): The segmentor.
        learn (dict[str, float], optional): Patterns and factors, see
            :class:`PromptLearnerHook`.
        trainable (set[str]): Names of the parameters that are not frozen
            for the whole run.

    Returns:
        dict[str, float]: Factors, none of them 0, by parameter name.

    Raises:
        ValueError: If a pattern matches nothing, or nothing would learn.
    """
    names = [name for name, _ in model.named_parameters()]
    text = list(text_parameters(model))
    if learn is None:
        if not text:
            raise ValueError(
                'nothing would learn in stage 2: the text is fixed and has '
                'no learnable scale or bias. Use prompts, e.g. '
                "text=dict(type='ResidualPromptLearner', ...), or set "
                'switch_at=None.')
        return {name: 1.0 for name in text}
    factors: Dict[str, float] = {}
    # Not the first one: MMEngine sorts the keys of a config it writes.
    for pattern in sorted(sorted(learn), key=len, reverse=True):
        matches = [name for name in names if re.search(pattern, name)]
        if not matches:
            raise ValueError(
                f'the pattern {pattern!r} in `learn` matches no parameter. '
                f'Text parameters of this model are {sorted(text)}; network '
                f'parameters look like {names[:3]}.')
        # What is frozen from the start, such as a constant kernel of STDC,
        # stays so; frozen text is reported by `group_factors`.
        own = [n for n in matches if n in trainable or n in text]
        for name in own or matches:
            factors.setdefault(name, float(learn[pattern]))
    factors = {name: value for name, value in factors.items() if value}
    if not factors:
        raise ValueError('nothing would learn in stage 2: all factors in '
                         f'`learn` are 0, {learn}.')
    return factors


def group_factors(model: nn.Module, wrapper: OptimWrapper,
                  factors: Dict[str,
                                float], trainable: Set[str]) -> List[float]:
    """Get the factor of each parameter group of the optimizer.

    Args:
        model (nn.Module): The segmentor.
        wrapper (OptimWrapper): Wrapper of its optimizer.
        factors (dict[str, float]): Result of :func:`lr_factors`.
        trainable (set[str]): Names of the parameters that are not frozen
            for the whole run.

    Returns:
        list[float]: A factor for each group; 1 where nothing learns.

    Raises:
        ValueError: If a group has parameters of different factors, or
            parameters are in no group.
    """
    if isinstance(wrapper, OptimWrapperDict):
        raise ValueError(
            'PromptLearnerHook supports one optimizer, but got '
            f'{type(wrapper).__name__} with {list(wrapper.keys())}.')
    names = {id(param): name for name, param in model.named_parameters()}
    optimized: Set[Optional[str]] = set()
    result = []
    for group in wrapper.param_groups:
        members = [names.get(id(param)) for param in group['params']]
        optimized.update(members)
        own = {factors[name] for name in members if name in factors}
        if len(own) > 1:
            raise ValueError(
                'parameters that stage 2 learns at different rates '
                f'({sorted(own)}) share one group of the optimizer. Give '
                'each parameter a group of its own by adding to '
                '`optim_wrapper`: paramwise_cfg=dict(custom_keys={'
                "'.text.': dict(decay_mult=0.)}).")
        result.append(own.pop() if own else 1.0)
    lost = [name for name in factors if name not in optimized & trainable]
    if lost:
        raise ValueError(
            f'stage 2 is to learn {lost[:5]}{"..." if lost[5:] else ""}, but '
            'they are not in the optimizer or were frozen when it was built. '
            'Do not freeze them yourself (the hook does), or leave them out '
            'of `learn`.')
    return result


class Stage2Schedule:
    """MMEngine's schedulers on an optimizer of their own.

    Args:
        param_groups (Sequence[dict]): Groups of the optimizer of the run.
        schedulers (Sequence[dict]): Configs, in iterations of stage 2.
        length (int): Iterations of stage 2.

    Raises:
        ValueError: If a scheduler counts epochs.
    """

    def __init__(self, param_groups: Sequence[dict],
                 schedulers: Sequence[dict], length: int) -> None:
        if any(cfg.get('by_epoch') for cfg in schedulers):
            raise ValueError('`param_scheduler` of PromptLearnerHook counts '
                             'iterations from the switch; leave `by_epoch` '
                             'out.')
        # 'initial_lr' is there already where the run has a schedule.
        self._base_lrs = [
            group.setdefault('initial_lr', group['lr'])
            for group in param_groups
        ]
        # One group for each rate: a run may have hundreds of equal groups.
        groups = [
            dict(params=[nn.Parameter(torch.zeros(()))], lr=lr, initial_lr=lr)
            for lr in dict.fromkeys(self._base_lrs)
        ]
        self._optimizer, self._step = torch.optim.SGD(groups, lr=0.), 0
        self._schedulers = [
            PARAM_SCHEDULERS.build(
                dict(cfg, by_epoch=False, end=cfg.get('end', length)),
                default_args=dict(optimizer=self._optimizer))
            for cfg in schedulers
        ]

    def lrs(self, step: int) -> List[float]:
        """Get the learning rate of each group of the run.

        Args:
            step (int): Iteration of stage 2, not below that of the last
                call.

        Returns:
            list[float]: The rates, before the factors.
        """
        # A resumed run repeats the steps before it, which takes seconds for
        # 100,000 iterations and needs no state in a checkpoint.
        while self._step < step:
            self._optimizer.step()
            for scheduler in self._schedulers:
                scheduler.step()
            self._step += 1
        # Not by 'initial_lr', which some schedulers change.
        lrs = dict(
            zip(
                dict.fromkeys(self._base_lrs),
                (group['lr'] for group in self._optimizer.param_groups)))
        return [lrs[base] for base in self._base_lrs]
