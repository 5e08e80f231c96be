# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
from typing import Dict, List, Optional, Sequence, Union

import torch
from mmengine.logging import print_log
from mmseg.registry import HOOKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_textkd.models.text_parameters import (prompt_parameters,
                                                 text_providers)
from ..stages import StagePlan, StageSchedule
from ..stages.stage_plan import check_switch_at
from ..stages.text_state import (log_text, refresh_text, start_text,
                                 tower_checksums, unwrap)
from .text_hook import TextHook


@HOOKS.register_module()
class PromptLearnerHook(TextHook):
    r"""Switch from stage 1 to stage 2 of text-knowledge training.

    Stage 1: the network learns against fixed class embeddings. Stage 2: the
    prompts learn, with what ``learn`` names; the rest is frozen, batch norm
    statistics included. The stage follows from ``runner.iter`` alone, so a
    resumed run is in the stage in which it was killed.

    The hook changes ``requires_grad`` only once the optimizer has been built
    (MMEngine leaves parameters frozen before that out of it). The run's own
    schedule goes on underneath stage 2: the learning rates of stage 2 are put
    in before each iteration and taken out after it.

    Args:
        switch_at (int | float, optional): Iteration at which stage 2 starts,
            or, as a float in (0, 1), the fraction of the run. Defaults to
            None: the whole run is stage 1.
        learn (dict[str, float] | Sequence[str], optional): What learns in
            stage 2: regular expressions that are searched for in parameter
            names, and the factor on each one's base learning rate. A
            parameter that several match takes the first. Defaults to None:
            prompts, scales and biases, at their base rate.
        schedule (dict, optional): Arguments of :class:`StageSchedule`, the
            learning-rate schedule of stage 2. Defaults to None: constant.
        log_interval (int): Iterations between two looks at the text (scale,
            cosines, drift). Defaults to 50.

    Examples:
        >>> custom_hooks = [
        >>>     dict(
        >>>         type='PromptLearnerHook',
        >>>         switch_at=0.8,
        >>>         learn={r'\.text\.': 1.0, 'backbone': 0.1},
        >>>         schedule=dict(type='cosine', warmup_iters=50))
        >>> ]
    """

    # Before EMAHook (NORMAL), which swaps parameters but not buffers, and
    # before RuntimeInfoHook (VERY_HIGH), which logs the learning rate.
    priority = 'HIGHEST'

    def __init__(self,
                 switch_at: Optional[Union[int, float]] = None,
                 learn: Optional[Union[Dict[str, float],
                                       Sequence[str]]] = None,
                 schedule: Optional[dict] = None,
                 log_interval: int = 50) -> None:
        check_switch_at(switch_at)
        if learn is not None and not isinstance(learn, dict):
            learn = {pattern: 1.0 for pattern in learn}
        self.switch_at = switch_at
        self.learn = learn
        self.schedule = StageSchedule(**(schedule or {}))
        self.log_interval = log_interval
        self.plan: Optional[StagePlan] = None
        self.stage = 0  # not yet known
        self._outer_lrs: Optional[List[float]] = None

    def before_train(self, runner) -> None:
        """Settle the plan of the stages and enter the one that is due.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            ValueError: If the plan cannot be carried out, and why.
        """
        super().before_train(runner)
        model = unwrap(runner.model)
        # Taken before any change: what the user froze stays frozen.
        self._trainable = {
            name
            for name, param in model.named_parameters() if param.requires_grad
        }
        self._prompts = set(prompt_parameters(model))
        if self.switch_at is not None:
            self.plan = StagePlan.make(runner, model, self.switch_at,
                                       self.learn, self._trainable)
            for group in runner.optim_wrapper.param_groups:
                # Set already where the run has a schedule.
                group.setdefault('initial_lr', group['lr'])
        if runner.cfg.get('compile'):
            # MMEngine compiles the whole step. The optimizer would be traced
            # again for each learning rate, and in stage 2, where it first
            # sees the prompts, Dynamo fails on it.
            step = runner.optim_wrapper.step
            runner.optim_wrapper.step = torch.compiler.disable(step)
        self._apply(runner)

    def _due_stage(self, runner) -> int:
        if self.plan is None:
            return 1
        return 2 if runner.iter >= self.plan.switch_iter else 1

    def _apply(self, runner) -> None:
        """Bring the model into the stage that is due."""
        stage = self._due_stage(runner)
        if stage == self.stage:
            return
        self.stage = stage
        model = unwrap(runner.model)
        if stage == 2:
            self._enter_stage2(runner, model)
        else:
            for provider in text_providers(model).values():
                provider.stop_learning()
        learning = []
        for name, param in model.named_parameters():
            if stage == 1:
                learns = name in self._trainable - self._prompts
            else:
                learns = name in self.plan.factors
            param.requires_grad_(learns)
            if learns:
                learning.append(name)
            else:
                # A leftover gradient would still be applied.
                param.grad = None
        print_log(
            f'Stage {stage} of text-knowledge training from iteration '
            f'{runner.iter}: {len(learning)} parameter tensors learn'
            f'{self._next(stage)}.', 'current')
        if stage == 2:
            print_log(f'Learning in stage 2: {learning}', 'current')
        log_text(runner, self.stage)

    def _next(self, stage: int) -> str:
        if stage == 2 or self.plan is None:
            return ''
        return f'; stage 2 follows at iteration {self.plan.switch_iter}'

    def _enter_stage2(self, runner, model: nn.Module) -> None:
        start_text(runner)
        self._checksums = tower_checksums(model)
        deployed = [
            n for n in self.plan.factors
            if '.text_branch.' not in n and '.text_losses.' not in n
            and not n.startswith('auxiliary_head.')
        ]
        if not deployed:
            print_log(
                "In the role 'auxiliary' nothing that is deployed learns in "
                'stage 2: name some of the network in `learn`, e.g. '
                "{r'\\.text\\.': 1.0, 'backbone': 0.1}.", 'current',
                logging.WARNING)

    def before_train_iter(self,
                          runner,
                          batch_idx: int,
                          data_batch: Optional[dict] = None) -> None:
        """Enter the stage that is due; in stage 2 set its learning rates.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): Index of the batch.
            data_batch (dict, optional): The batch. Defaults to None.
        """
        self._apply(runner)
        if self.stage != 2:
            return
        # The loop calls `train()` before each iteration.
        for module in unwrap(runner.model).modules():
            if isinstance(module, _BatchNorm) and not any(
                    p.requires_grad for p in module.parameters()):
                module.eval()
        start = self.plan.switch_iter
        factor = self.schedule.factor(runner.iter - start,
                                      runner.max_iters - start)
        groups = runner.optim_wrapper.param_groups
        self._outer_lrs = [group['lr'] for group in groups]
        for group, own in zip(groups, self.plan.group_factors):
            group['lr'] = group['initial_lr'] * own * factor

    def after_train_iter(self,
                         runner,
                         batch_idx: int,
                         data_batch: Optional[dict] = None,
                         outputs: Optional[dict] = None) -> None:
        """Put the run's own learning rates back and look at the text.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): Index of the batch.
            data_batch (dict, optional): The batch. Defaults to None.
            outputs (dict, optional): Losses. Defaults to None.
        """
        if self._outer_lrs is not None:
            for group, rate in zip(runner.optim_wrapper.param_groups,
                                   self._outer_lrs):
                group['lr'] = rate
            self._outer_lrs = None
        if self.every_n_train_iters(runner, self.log_interval):
            log_text(runner, self.stage)

    def after_train(self, runner) -> None:
        """Make the learned text final and prove that the tower is unchanged.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            RuntimeError: If a weight of the text tower has changed.
        """
        model = unwrap(runner.model)
        refresh_text(runner)
        if self.stage == 2 and tower_checksums(model) != self._checksums:
            raise RuntimeError('the frozen text tower has changed during '
                               'training; its embeddings cannot be trusted.')
