# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
import re
from dataclasses import dataclass
from typing import Dict, List, Optional, Set, Union

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn

from mmseg_textkd.models.text_parameters import text_parameters


@dataclass(frozen=True)
class StagePlan:
    """When stage 2 starts, what learns in it, and how fast.

    Attributes:
        switch_iter (int): First iteration of stage 2.
        factors (dict[str, float]): Factor on the base learning rate of each
            parameter that learns, by its name.
        group_factors (list[float]): The same for each group of the
            optimizer, in its order.
    """
    switch_iter: int
    factors: Dict[str, float]
    group_factors: List[float]

    @classmethod
    def make(cls, runner, model: nn.Module, switch_at: Union[int, float],
             learn: Optional[Dict[str,
                                  float]], trainable: Set[str]) -> 'StagePlan':
        """Make the plan of a run, or say why it cannot be carried out.

        Args:
            runner (Runner): The runner, its optimizer built.
            model (nn.Module): The model, not wrapped.
            switch_at (int | float): Iteration or fraction of the run.
            learn (dict[str, float], optional): Patterns of names and their
                factors; None for the text and its scales and biases.
            trainable (set[str]): Names of what was trainable at the start.

        Returns:
            StagePlan: The plan.

        Raises:
            ValueError: If the switch lies beyond the run, a pattern matches
                nothing, a parameter is missing from the optimizer or shares
                a group with one of another rate, or the wrapper for
                distributed training would not allow it.
        """
        switch_iter = _switch_iter(runner, switch_at)
        factors = _factors(model, learn, trainable)
        group_factors = _group_factors(runner.optim_wrapper, model, factors,
                                       trainable)
        if is_model_wrapper(runner.model) and not getattr(
                runner.model, 'find_unused_parameters', True):
            raise ValueError(
                'the stages freeze parameters after the model has been '
                'wrapped for distributed training; add the line '
                '`find_unused_parameters = True` to the config.')
        return cls(switch_iter, factors, group_factors)


def check_switch_at(switch_at: Optional[Union[int, float]]) -> None:
    """Check what can be checked of it without a run.

    Args:
        switch_at (int | float, optional): Iteration or fraction of the run.

    Raises:
        TypeError: If it is neither a number nor None.
        ValueError: If it lies out of range.
    """
    if isinstance(switch_at, bool) or not (switch_at is None or isinstance(
            switch_at, (int, float))):
        raise TypeError('`switch_at` must be an iteration (int), a fraction '
                        f'(float) or None, but got {switch_at!r}')
    if isinstance(switch_at, float) and not 0 < switch_at < 1:
        raise ValueError('a fractional `switch_at` must lie in (0, 1), but '
                         f'got {switch_at}; give an int for an iteration.')
    if isinstance(switch_at, int) and switch_at < 0:
        raise ValueError('`switch_at` must not be negative, but got '
                         f'{switch_at}.')


def _switch_iter(runner, switch_at: Union[int, float]) -> int:
    max_iters = runner.max_iters
    if isinstance(switch_at, float):
        switch_at = round(switch_at * max_iters)
    if switch_at >= max_iters:
        raise ValueError(
            f'stage 2 would start at iteration {switch_at}, but the run ends '
            f'after {max_iters}. Lower `switch_at`, or set it to None for '
            'stage 1 only.')
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    if switch_at % counts:
        # Gradients of stage 1 must be neither lost nor applied in stage 2.
        rounded = -(-switch_at // counts) * counts
        print_log(
            f'Stage 2 starts at iteration {rounded} instead of {switch_at}: '
            f'gradients are accumulated over {counts} iterations.', 'current',
            logging.WARNING)
        switch_at = rounded
    return switch_at


def _factors(model: nn.Module, learn: Optional[Dict[str, float]],
             trainable: Set[str]) -> Dict[str, float]:
    # What is frozen from the start stays so, but for the text: of that the
    # caller hears. STDC's boundary head, for one, has a constant parameter.
    names = [name for name, _ in model.named_parameters()]
    text = list(text_parameters(model))
    if learn is None:
        if not text:
            raise ValueError(
                'nothing would learn in stage 2: the text is fixed and has '
                'no learnable scale or bias. Use a prompt learner, e.g. '
                "text=dict(type='ResidualPromptLearner', ...), or set "
                'switch_at=None.')
        return {name: 1.0 for name in text}
    factors: Dict[str, float] = {}
    for pattern, factor in learn.items():
        matches = [name for name in names if re.search(pattern, name)]
        if not matches:
            raise ValueError(
                f'the pattern {pattern!r} in `learn` matches no parameter. '
                f'Text parameters of this model are {sorted(text)}; network '
                f'parameters look like {names[:3]}.')
        kept = [n for n in matches if n in trainable or n in text]
        for name in kept or matches:
            factors.setdefault(name, float(factor))
    return factors


def _group_factors(wrapper: OptimWrapper, model: nn.Module,
                   factors: Dict[str,
                                 float], trainable: Set[str]) -> List[float]:
    if isinstance(wrapper, OptimWrapperDict):
        raise ValueError(
            'PromptLearnerHook supports one optimizer, but got '
            f'{type(wrapper).__name__} with {list(wrapper.keys())}.')
    names = {id(param): name for name, param in model.named_parameters()}
    known: Set[Optional[str]] = set()
    group_factors = []
    for group in wrapper.param_groups:
        members = [names.get(id(param)) for param in group['params']]
        known.update(members)
        own = {factors[name] for name in members if name in factors}
        if len(own) > 1:
            raise ValueError(
                'parameters that stage 2 learns at different rates '
                f'({sorted(own)}) share one group of the optimizer. Give '
                'each parameter a group of its own by adding to '
                '`optim_wrapper`: paramwise_cfg=dict(custom_keys={'
                "'.text.': dict(decay_mult=0.)}).")
        group_factors.append(own.pop() if own else 1.0)
    lost = [n for n in factors if n not in known or n not in trainable]
    if lost:
        raise ValueError(
            f'stage 2 is to learn {lost[:5]}{"..." if lost[5:] else ""}, but '
            'they are not in the optimizer or were frozen when it was built. '
            'Do not freeze them yourself (the hook does), or leave them out '
            'of `learn`.')
    return group_factors
