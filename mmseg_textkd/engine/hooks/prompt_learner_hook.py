# Copyright (c) mmseg_textkd contributors. All rights reserved.
import re
from typing import Dict, List, Optional, Sequence, Union

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmseg.registry import HOOKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmseg_textkd.models.text_parameters import (prompt_parameters,
                                                 text_parameters,
                                                 text_providers, text_scales)

from mmseg_textkd.text.text_geometry import geometry
from .stage_schedule import StageSchedule


@HOOKS.register_module()
class PromptLearnerHook(Hook):
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
        if isinstance(switch_at, bool) or not (switch_at is None or isinstance(
                switch_at, (int, float))):
            raise TypeError('`switch_at` must be an iteration (int), a '
                            f'fraction (float) or None, but got {switch_at!r}')
        if isinstance(switch_at, float) and not 0 < switch_at < 1:
            raise ValueError(
                'a fractional `switch_at` must lie in (0, 1), but got '
                f'{switch_at}; give an int for an iteration.')
        if isinstance(switch_at, int) and switch_at < 0:
            raise ValueError('`switch_at` must not be negative, but got '
                             f'{switch_at}.')
        if learn is not None and not isinstance(learn, dict):
            learn = {pattern: 1.0 for pattern in learn}
        self.switch_at = switch_at
        self.learn = learn
        self.schedule = StageSchedule(**(schedule or {}))
        self.log_interval = log_interval
        self.switch_iter: Optional[int] = None
        self.stage = 0  # not yet known
        self._outer_lrs: Optional[List[float]] = None

    # -------------------------------------------------------- set-up
    def before_run(self, runner) -> None:
        """Check what can be checked before weights are loaded.

        Args:
            runner (Runner): The runner of the training process.
        """
        if not text_providers(_unwrap(runner.model)):
            raise ValueError(
                'PromptLearnerHook found no text in the model. Use a text '
                "head, for instance decode_head=dict(type='TextFCNHead', "
                'text=dict(...)), or remove the hook.')

    def before_train(self, runner) -> None:
        """Settle the plan of the stages and enter the one that is due.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            ValueError: If the plan cannot be carried out, and why.
        """
        model = _unwrap(runner.model)
        self._check_classes(runner, runner.train_dataloader)
        for name, provider in text_providers(model).items():
            message = provider.reconcile(resumed=runner._resume)
            if message:
                print_log(f'{name}: {message}', 'current', 30)
        for module in self._ema_models(runner):
            for name, provider in text_providers(module).items():
                provider.reconcile(resumed=False)
        self.switch_iter = self._resolve_switch(runner)
        # Taken before any change: what the user froze stays frozen.
        self._trainable = {
            name
            for name, param in model.named_parameters() if param.requires_grad
        }
        self._prompts = set(prompt_parameters(model))
        self._plan: Dict[str, float] = {}
        if self.switch_iter is not None:
            self._plan = self._resolve_plan(model)
            self._check_optimizer(runner, model)
            self._check_ddp(runner)
        self._apply(runner)
        self._log_text(runner)

    def _resolve_switch(self, runner) -> Optional[int]:
        if self.switch_at is None:
            return None
        switch, max_iters = self.switch_at, runner.max_iters
        if isinstance(switch, float):
            switch = round(switch * max_iters)
        if switch >= max_iters:
            raise ValueError(
                f'stage 2 would start at iteration {switch}, but the run ends '
                f'after {max_iters}. Lower `switch_at`, or set it to None for '
                'stage 1 only.')
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if switch % counts:
            # Stage 1 gradients must not be applied, or lost, in stage 2.
            rounded = -(-switch // counts) * counts
            print_log(
                f'Stage 2 starts at iteration {rounded} instead of {switch}: '
                f'gradients are accumulated over {counts} iterations.',
                'current', 30)
            switch = rounded
        return switch

    def _resolve_plan(self, model: nn.Module) -> Dict[str, float]:
        """Find the learning-rate factor of each parameter of stage 2."""
        if self.learn is None:
            plan = {name: 1.0 for name in text_parameters(model)}
            # Without prompts to learn there is still scale and bias.
            if not plan:
                raise ValueError(
                    'nothing would learn in stage 2: the text is fixed and '
                    'has no learnable scale or bias. Use a prompt learner, '
                    'e.g. text=dict(type=\'ResidualPromptLearner\', ...), or '
                    'set switch_at=None.')
            return plan
        plan = {}
        for pattern, factor in self.learn.items():
            matches = [
                name for name, _ in model.named_parameters()
                if re.search(pattern, name)
            ]
            if not matches:
                raise ValueError(
                    f'the pattern {pattern!r} in `learn` matches no '
                    'parameter. Text parameters of this model are '
                    f'{sorted(text_parameters(model))}; network parameters '
                    'look like '
                    f'{[n for n, _ in model.named_parameters()][:3]}.')
            for name in matches:
                plan.setdefault(name, float(factor))
        return plan

    def _check_optimizer(self, runner, model: nn.Module) -> None:
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            raise ValueError(
                'PromptLearnerHook supports one optimizer (OptimWrapper), but '
                f'got {type(wrapper).__name__}.')
        for group in wrapper.param_groups:
            group.setdefault('initial_lr', group['lr'])
        names = {id(p): n for n, p in model.named_parameters()}
        known = set()
        self._group_factors: List[float] = []
        for group in wrapper.param_groups:
            members = [names.get(id(p)) for p in group['params']]
            known.update(members)
            factors = {self._plan.get(n) for n in members} - {None}
            if len(factors) > 1:
                raise ValueError(
                    'parameters that stage 2 learns at different rates '
                    f'({sorted(factors)}) share one group of the optimizer. '
                    'Give each parameter a group of its own by adding to '
                    '`optim_wrapper`: paramwise_cfg=dict(custom_keys={'
                    "'.text.': dict(decay_mult=0.)}).")
            self._group_factors.append(factors.pop() if factors else 1.0)
        lost = [
            name for name in self._plan
            if name not in known or name not in self._trainable
        ]
        if lost:
            raise ValueError(
                f'stage 2 is to learn {lost[:5]}{"..." if lost[5:] else ""}, '
                'but they are not in the optimizer or were frozen when it was '
                'built. Do not freeze them yourself (the hook does), or leave '
                'them out of `learn`.')

    def _check_ddp(self, runner) -> None:
        wrapper = runner.model
        if is_model_wrapper(wrapper) and not getattr(
                wrapper, 'find_unused_parameters', True):
            raise ValueError(
                'the stages freeze parameters after the model has been '
                'wrapped for distributed training; add the line '
                '`find_unused_parameters = True` to the config.')

    def _check_classes(self, runner, dataloader) -> None:
        """Compare the text's class names with those of a dataset."""
        dataset = getattr(dataloader, 'dataset', None)
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        if classes is None:
            return
        for name, provider in text_providers(_unwrap(runner.model)).items():
            record = getattr(provider, 'record', None) or getattr(
                provider, 'fixed_record', None)
            if record is not None:
                record.check_names(
                    classes, where=f'{type(dataset).__name__} ({name})')

    # -------------------------------------------------------- stages
    def _due_stage(self, runner) -> int:
        if self.switch_iter is None:
            return 1
        return 2 if runner.iter >= self.switch_iter else 1

    def _apply(self, runner) -> None:
        """Bring the model into the stage that is due."""
        stage = self._due_stage(runner)
        if stage == self.stage:
            return
        self.stage = stage
        model = _unwrap(runner.model)
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
                learns = name in self._plan
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

    def _next(self, stage: int) -> str:
        if stage == 2 or self.switch_iter is None:
            return ''
        return f'; stage 2 follows at iteration {self.switch_iter}'

    def _enter_stage2(self, runner, model: nn.Module) -> None:
        copies = [text_providers(m) for m in self._ema_models(runner)]
        for name, provider in text_providers(model).items():
            fresh = not getattr(provider, 'started', True)
            provider.start_learning()
            for copy in copies:
                copy[name].start_learning()
                if fresh:
                    # Averages of prompts begin where the prompts do.
                    copy[name].load_state_dict(provider.state_dict())
        self._checksums = _tower_checksums(model)
        deployed = [
            n for n in self._plan
            if '.text_branch.' not in n and '.text_losses.' not in n
        ]
        if not deployed:
            print_log(
                "In the role 'auxiliary' nothing that is deployed learns in "
                'stage 2: name some of the network in `learn`, e.g. '
                "{r'\\.text\\.': 1.0, 'backbone': 0.1}.", 'current', 30)

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
        for module in _unwrap(runner.model).modules():
            if isinstance(module, _BatchNorm) and not any(
                    p.requires_grad for p in module.parameters()):
                module.eval()
        factor = self.schedule.factor(runner.iter - self.switch_iter,
                                      runner.max_iters - self.switch_iter)
        groups = runner.optim_wrapper.param_groups
        self._outer_lrs = [group['lr'] for group in groups]
        for group, own in zip(groups, self._group_factors):
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
            self._log_text(runner)

    def after_train(self, runner) -> None:
        """Make the learned text final and prove that the tower is unchanged.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            RuntimeError: If a weight of the text tower has changed.
        """
        model = _unwrap(runner.model)
        self._refresh(runner)
        if self.stage == 2 and _tower_checksums(model) != self._checksums:
            raise RuntimeError('the frozen text tower has changed during '
                               'training; its embeddings cannot be trusted.')

    # -------------------------------------------- evaluation and saving
    def _refresh(self, runner) -> None:
        for model in [_unwrap(runner.model), *self._ema_models(runner)]:
            for provider in text_providers(model).values():
                if provider.learning:
                    provider.refresh()

    def _swap_with_ema(self, runner) -> None:
        """Let the text follow the parameters that EMAHook swaps.

        EMAHook swaps buffers too only with ``update_buffers=True``.
        """
        hook = _ema_hook(runner)
        if hook is None or hook.ema_model.update_buffers:
            return
        averaged = text_providers(hook.ema_model.module)
        for name, provider in text_providers(_unwrap(runner.model)).items():
            current = provider.class_embeddings.clone()
            provider.class_embeddings.copy_(averaged[name].class_embeddings)
            averaged[name].class_embeddings.copy_(current)

    def before_val(self, runner) -> None:
        """Check that the text is for the classes of the validation set.

        Args:
            runner (Runner): The runner of the training process.
        """
        self._check_classes(runner, runner.val_dataloader)

    def before_val_epoch(self, runner) -> None:
        """Evaluate with the text as it is now.

        Args:
            runner (Runner): The runner of the training process.
        """
        self._refresh(runner)
        self._swap_with_ema(runner)

    def after_val_epoch(self,
                        runner,
                        metrics: Optional[Dict[str, float]] = None) -> None:
        """Undo the swap of :meth:`before_val_epoch`.

        Args:
            runner (Runner): The runner of the training process.
            metrics (dict[str, float], optional): Results. Defaults to None.
        """
        self._swap_with_ema(runner)

    def before_test(self, runner) -> None:
        """Check that the text is for the classes of the test set.

        Args:
            runner (Runner): The runner of the testing process.
        """
        self._check_classes(runner, runner.test_dataloader)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Write the learned text into the checkpoint.

        Args:
            runner (Runner): The runner of the training process.
            checkpoint (dict): The checkpoint that is about to be written.
        """
        self._refresh(runner)
        for name, provider in text_providers(_unwrap(runner.model)).items():
            checkpoint['state_dict'][f'{name}.class_embeddings'] = (
                provider.class_embeddings.detach().cpu().clone())

    # ------------------------------------------------------------- log
    def _log_text(self, runner) -> None:
        model = _unwrap(runner.model)
        hub = runner.message_hub
        hub.update_scalar('train/text_stage', self.stage)
        for i, scale in enumerate(text_scales(model).values()):
            hub.update_scalar(f'train/text_scale{i or ""}', scale)
        for i, provider in enumerate(text_providers(model).values()):
            if not provider.filled:
                continue
            drift = provider.drift() if provider.learning else 0.
            facts = geometry(provider.class_embeddings.cpu())
            hub.update_scalar(f'train/text_cos_mean{i or ""}', facts['mean'])
            hub.update_scalar(f'train/text_cos_closest{i or ""}',
                              facts['closest'])
            hub.update_scalar(f'train/text_drift{i or ""}', drift)

    @staticmethod
    def _ema_models(runner) -> List[nn.Module]:
        hook = _ema_hook(runner)
        return [] if hook is None else [hook.ema_model.module]


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


def _ema_hook(runner) -> Optional[EMAHook]:
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and hasattr(hook, 'ema_model'):
            return hook
    return None


def _tower_checksums(model: nn.Module) -> Dict[str, str]:
    towers = {
        name: getattr(provider, 'tower', None)
        for name, provider in text_providers(model).items()
    }
    return {n: t.checksum() for n, t in towers.items() if t is not None}
