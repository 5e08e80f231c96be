# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
import warnings
from typing import Dict, List, Optional, Sequence, Set, Union

import torch
from mmengine.dist import barrier, broadcast, is_main_process
from mmengine.fileio import exists
from mmengine.hooks import CheckpointHook, EMAHook, Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.model import BaseAveragedModel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.registry import HOOKS, MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...models.layers import ScoreMap
from ...models.text_parameters import (check_classes, check_prompts_learn,
                                       check_text_losses, prompt_parameters,
                                       text_parameters, text_providers,
                                       text_statistics, tower_checksums,
                                       unwrap)
from ...text.encode_classes import ensure_embeddings
from ...utils.config import as_list
from .class_rows import match_classes
from .loaded_checkpoint_hook import LoadedCheckpointHook
from .stage2_rates import (Stage2Schedule, convert_schedule, group_factors,
                           lr_factors)
from .text_groups import check_groups, group_faults


@HOOKS.register_module()
class PromptLearnerHook(Hook):
    r"""Train in two stages: the network first, then the prompts.

    In stage 1 the network learns with fixed class embeddings. In stage 2 the
    parameters that ``learn`` names are trained, by default the prompts, and
    all others are frozen. The stage depends on ``runner.iter`` only, so that
    a resumed run is in the stage in which it was interrupted.

    In both stages the hook checks that the text is for the classes of the
    data sets. Before a checkpoint is saved it updates the class embeddings
    from the prompts, those of :class:`EMAHook` included.

    Source: Lin, Chen and Wu, `Enhancing Real-Time Semantic Segmentation with
    Textual Knowledge of Pre-Trained VLM
    <https://doi.org/10.1109/APSIPAASC58517.2023.10317179>`_.

    Args:
        switch_at (int | float, optional): Iteration at which stage 2 starts,
            or, as a float in (0, 1), the fraction of the run; 0 if the whole
            run is stage 2. Defaults to None: the whole run is stage 1.
        learn (dict[str, float] | Sequence[str], optional): Parameters of
            stage 2: regular expressions that are searched for in parameter
            names, and the factor on each one's base learning rate, 0 to
            freeze it. The longest that matches a parameter applies, whatever
            their order, as in MMEngine's ``custom_keys``. Defaults to None:
            prompts, scales and biases, at their base rate.
        param_scheduler (dict | Sequence[dict], optional): MMEngine's
            learning rate schedulers of stage 2, which count iterations from
            the switch; ``end`` defaults to the end of the run. Defaults to
            None: constant rates, or the schedule of the run if all of it is
            stage 2.
        load_best (bool): Whether stage 2 starts, as a separate run would,
            from the best checkpoint of stage 1 with a new state of the
            optimizer. Needs ``save_best`` of :class:`CheckpointHook`, which
            then keeps a best checkpoint of either stage. Defaults to False.
        freeze_norm (bool): Whether frozen batch norms keep their statistics
            in stage 2. Defaults to True.
        log_interval (int, optional): Iterations between two log entries of
            the text statistics. Defaults to None: as often as the run logs.
        schedule (dict, optional): Deprecated, see ``param_scheduler``.

    Examples:
        >>> custom_hooks = [
        >>>     dict(
        >>>         type='PromptLearnerHook',
        >>>         switch_at=0.5,
        >>>         learn={r'^backbone\.backbone\.': 0., '.': 1.},
        >>>         param_scheduler=[
        >>>             dict(type='LinearLR', start_factor=1e-5, end=200),
        >>>             dict(type='PolyLR', power=0.9, eta_min=1e-6, begin=200)
        >>>         ],
        >>>         load_best=True)
        >>> ]
    """

    # Before EMAHook (NORMAL), which swaps parameters but not buffers, and
    # before RuntimeInfoHook (VERY_HIGH), which logs the learning rate.
    priority = 'HIGHEST'

    def __init__(self,
                 switch_at: Optional[Union[int, float]] = None,
                 learn: Optional[Union[Dict[str, float],
                                       Sequence[str]]] = None,
                 param_scheduler: Optional[Union[dict, Sequence[dict]]] = None,
                 load_best: bool = False,
                 freeze_norm: bool = True,
                 log_interval: Optional[int] = None,
                 schedule: Optional[dict] = None) -> None:
        if not (switch_at is None or type(switch_at) is int and switch_at >= 0
                or type(switch_at) is float and 0 < switch_at < 1):
            raise ValueError(
                '`switch_at` must be an iteration (int, not negative), a '
                'fraction of the run (float in (0, 1)) or None, but got '
                f'{switch_at!r}.')
        if load_best and not switch_at:
            raise ValueError(
                'load_best=True needs a stage 1 and a stage 2 in this run, '
                f'but got switch_at={switch_at}. To start from the best '
                'checkpoint of another run, give that as `load_from`.')
        if learn is not None and not isinstance(learn, dict):
            learn = dict.fromkeys(as_list(learn), 1.0)
        if any(factor < 0 for factor in (learn or {}).values()):
            raise ValueError('factors in `learn` must not be negative, but '
                             f'got {learn}.')
        if schedule is not None:
            warnings.warn('`schedule` of PromptLearnerHook is deprecated; use '
                          '`param_scheduler`, a list of MMEngine schedulers.')
            param_scheduler = convert_schedule(**schedule)
        self.switch_at = switch_at
        self.learn = learn
        self.param_scheduler = as_list(param_scheduler)
        self.load_best = load_best
        self.freeze_norm = freeze_norm
        self.log_interval = log_interval
        self.stage = 0  # until the first iteration
        self.switch_iter: Optional[int] = None
        self._loaded = self._losses_checked = False
        self._run_lrs: Optional[List[float]] = None

    # ----------------------------------------------- hook points of training
    def before_run(self, runner) -> None:
        """Check that the model has text and the run one hook of this type.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            ValueError: If there is no text, or are several hooks.
        """
        if not text_providers(unwrap(runner.model)):
            raise ValueError(
                'PromptLearnerHook found no text in the model. Use a text '
                "head, for instance decode_head=dict(type='TextFCNHead', "
                'text=dict(...)), or remove the hook.')
        number = sum(isinstance(h, PromptLearnerHook) for h in runner.hooks)
        if number > 1:
            raise ValueError(
                f'`custom_hooks` has {number} PromptLearnerHooks, which would '
                "undo each other's work. Leave one; it serves all text of the "
                'model.')
        if not any(isinstance(h, LoadedCheckpointHook) for h in runner.hooks):
            runner.register_hook(LoadedCheckpointHook())

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Check that the text of a resumed run has the same shape.

        Rows of other classes are matched by name for a run that is not
        resumed, see :func:`.match_classes`.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): The checkpoint, not yet in the model.

        Raises:
            ValueError: If the shapes differ.
        """
        self._loaded = True
        if not runner._resume:
            if isinstance(runner._train_loop, BaseLoop):
                dataset = runner.train_dataloader.dataset
                done = match_classes(
                    unwrap(runner.model), checkpoint,
                    (getattr(dataset, 'metainfo', None) or {}).get('classes'))
                if done:
                    print_log(done, 'current', logging.WARNING)
            return
        for name, provider in text_providers(unwrap(runner.model)).items():
            saved = checkpoint['state_dict'].get(f'{name}.class_embeddings')
            found = 'none' if saved is None else tuple(saved.shape)
            expected = tuple(provider.class_embeddings.shape)
            if found != expected:
                raise ValueError(
                    f'{name} has class embeddings of shape {expected}, but '
                    f'the checkpoint to resume from has {found}. A resumed '
                    'run must keep its text; start a new run with '
                    '`load_from` instead of `--resume`.')

    def before_train(self, runner) -> None:
        """Check the text and prepare stage 2.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            ValueError: If the text is not for the classes of the data, or
                stage 2 cannot be run as configured.
        """
        model = unwrap(runner.model)
        if not all(p.has_vectors for p in text_providers(model).values()):
            # `tools/train.py` has done it; MMSegmentation's has not.
            self._make_embeddings(runner, model)
        for loop in (runner.train_loop, runner.val_loop):
            dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', {})
            check_classes(model, dataset)
            if 'classes' not in getattr(dataset, 'metainfo', {'classes'}):
                print_log(
                    f'{type(dataset).__name__} names no classes (`metainfo`): '
                    'whether the text is for them is not known.', 'current',
                    logging.WARNING)
        for name, provider in text_providers(model).items():
            message = provider.check_loaded(resumed=runner._resume)
            if not provider.has_vectors and provider.filled:
                message = ('the text is that of the checkpoint, since '
                           f'{provider._missing_hint}')
            if message:
                print_log(f'{name}: {message}', 'current', logging.WARNING)
        for ema in _ema_models(runner):
            for provider in text_providers(ema).values():
                provider.check_loaded(resumed=False)
        # Before any change: what the user has frozen stays frozen.
        self._trainable = {
            name
            for name, param in model.named_parameters() if param.requires_grad
        }
        if self.switch_at is not None:
            self._prepare_stage2(runner, model)
        if isinstance(runner.optim_wrapper, OptimWrapper):
            check_groups(runner.optim_wrapper)
            for fault in group_faults(model, runner.optim_wrapper,
                                      runner.cfg.get('optim_wrapper') or {}):
                print_log(fault, 'current', logging.WARNING)
        if runner.cfg.get('compile'):
            # MMEngine compiles the whole step. The optimizer would be traced
            # again for each learning rate, and in stage 2, where it first
            # gets gradients of the prompts, Dynamo fails on it.
            step = runner.optim_wrapper.step
            runner.optim_wrapper.step = torch.compiler.disable(step)

    def before_train_iter(self,
                          runner,
                          batch_idx: int,
                          data_batch: Optional[dict] = None) -> None:
        """Switch the stage if it is due; set the learning rates of stage 2.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): Index of the batch.
            data_batch (dict, optional): The batch. Defaults to None.
        """
        stage = 1
        if self.switch_iter is not None and runner.iter >= self.switch_iter:
            stage = 2
        if self.stage != stage:
            self._switch_stage(runner, stage)
        if stage == 1:
            return
        # The loop calls `train()` before each iteration.
        for norm in self._frozen_norms:
            norm.eval()
        groups = runner.optim_wrapper.param_groups
        # The schedulers of the run continue from their own rates.
        self._run_lrs = [group['lr'] for group in groups]
        if self.switch_iter or self.param_scheduler:
            lrs = self._schedule.lrs(runner.iter - self.switch_iter)
        else:
            lrs = self._run_lrs
        for group, lr, factor in zip(groups, lrs, self._group_factors):
            group['lr'] = lr * factor

    def after_train_iter(self,
                         runner,
                         batch_idx: int,
                         data_batch: Optional[dict] = None,
                         outputs: Optional[dict] = None) -> None:
        """Restore the learning rates of the run and log the text statistics.

        Args:
            runner (Runner): The runner of the training process.
            batch_idx (int): Index of the batch.
            data_batch (dict, optional): The batch. Defaults to None.
            outputs (dict, optional): Losses. Defaults to None.

        Raises:
            RuntimeError: After the first iteration, if text losses were not
                computed.
        """
        if not self._losses_checked:
            self._losses_checked = True
            check_text_losses(unwrap(runner.model))
        if self._run_lrs is not None:
            for group, lr in zip(runner.optim_wrapper.param_groups,
                                 self._run_lrs):
                group['lr'] = lr
            self._run_lrs = None
        # Before LoggerHook, at the same iterations.
        every = self.log_interval or next(
            (h.interval for h in runner.hooks if isinstance(h, LoggerHook)), 0)
        if self.every_n_inner_iters(batch_idx, every) or self.end_of_epoch(
                runner.train_dataloader, batch_idx):
            self._log_text(runner)

    def after_train(self, runner) -> None:
        """Update the embeddings and check that the tower is unchanged.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            RuntimeError: If a weight of the text tower has changed.
        """
        _update_embeddings(runner)
        if self.stage == 2 and tower_checksums(unwrap(
                runner.model)) != self._checksums:
            raise RuntimeError('the frozen text tower has changed during '
                               'training; its embeddings cannot be trusted.')

    # --------------------- hook points of validation, testing and checkpoints
    def before_val(self, runner) -> None:
        """Check that the text is for the classes of the validation set.

        Args:
            runner (Runner): The runner of the training process.
        """
        check_classes(unwrap(runner.model), runner.val_dataloader.dataset)

    def before_test(self, runner) -> None:
        """Check that the text is for the classes of the test set.

        Args:
            runner (Runner): The runner of the testing process.
        """
        check_classes(unwrap(runner.model), runner.test_dataloader.dataset)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Save the updated embeddings.

        Args:
            runner (Runner): The runner of the training process.
            checkpoint (dict): The checkpoint that is about to be written.
        """
        _update_embeddings(runner)
        for name, provider in text_providers(unwrap(runner.model)).items():
            checkpoint['state_dict'][f'{name}.class_embeddings'] = (
                provider.class_embeddings.detach().cpu().clone())

    # ------------------------------------------------------ switch of stages
    @staticmethod
    def _make_embeddings(runner, model) -> None:
        """Make the files that are missing and read them."""
        if 'model' not in runner.cfg:  # built by hand
            return
        # With the same seed the run goes on as if the files had been there.
        with torch.random.fork_rng(devices=[]):
            if is_main_process():
                ensure_embeddings(runner.cfg)
            barrier()
            fresh = text_providers(MODELS.build(runner.cfg.model))
        for part in (model, *(ema.module for ema in _ema_models(runner))):
            for name, provider in text_providers(part).items():
                if not provider.has_vectors and fresh[name].has_vectors:
                    provider.adopt(fresh[name])

    def _prepare_stage2(self, runner, model: nn.Module) -> None:
        """Check and set when stage 2 starts, what it trains, and its rates."""
        self.switch_iter = self._get_switch_iter(runner)
        if runner._resume:
            self._check_resumed_stage(runner)
            if runner.iter > self.switch_iter:
                # A validation may come before the first iteration.
                _start_prompts(runner)
        self._lr_factors = lr_factors(model, self.learn, self._trainable)
        idle = check_prompts_learn(model, self._lr_factors)
        if idle:
            print_log(idle, 'current', logging.WARNING)
        self._group_factors = group_factors(model, runner.optim_wrapper,
                                            self._lr_factors, self._trainable)
        self._schedule = Stage2Schedule(runner.optim_wrapper.param_groups,
                                        self.param_scheduler,
                                        runner.max_iters - self.switch_iter)
        if self.switch_iter == 0 and not self._loaded:
            print_log(
                "Stage 2 without stage 1's weights: the whole run is stage 2, "
                'but there is neither `load_from` nor a checkpoint to resume '
                'from.', 'current', logging.WARNING)
        if runner.iter < self.switch_iter:
            for provider in text_providers(model).values():
                provider.check_stage2()
        if self.load_best:
            self._check_load_best(runner)
        if is_model_wrapper(runner.model) and not getattr(
                runner.model, 'find_unused_parameters', True):
            raise ValueError(
                'the stages freeze parameters after the model has been '
                'wrapped for distributed training; add the line '
                '`find_unused_parameters = True` to the config.')

    def _check_resumed_stage(self, runner) -> None:
        """Require the stage in which the run was stopped."""
        # Not by the prompts, which may have learned in a run before it.
        log = runner.message_hub.log_scalars.get('train/text_stage')
        # Without this hook the prompts have not learned.
        stage = 1 if log is None else log.current()
        if runner.iter == self.switch_iter:
            return
        if stage != (1 if runner.iter < self.switch_iter else 2):
            raise ValueError(
                f'the run was stopped in stage {stage}, after {runner.iter} '
                'iterations, but by the config stage 2 starts at iteration '
                f'{self.switch_iter}: `switch_at` or, of a fraction, '
                '`max_iters` is another. Give `switch_at` as the iteration '
                'of the switch before, or of one to come.')

    def _get_switch_iter(self, runner) -> int:
        """Get the first iteration of stage 2."""
        switch = self.switch_at
        if isinstance(switch, float):
            wanted = round(switch * runner.max_iters)
            # A fraction of a short run still leaves both stages something.
            switch = min(max(wanted, 1), max(runner.max_iters - 1, 1))
            if switch != wanted:
                print_log(
                    f'switch_at={self.switch_at} of {runner.max_iters} '
                    f'iterations leaves one stage nothing: stage 2 starts at '
                    f'iteration {switch}.', 'current', logging.WARNING)
        counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
        if switch % counts:
            # Gradients of stage 1 must be neither lost nor applied in stage 2.
            rounded = -(-switch // counts) * counts
            print_log(
                f'Stage 2 starts at iteration {rounded} instead of {switch}: '
                f'gradients are accumulated over {counts} iterations.',
                'current', logging.WARNING)
            switch = rounded
        if switch >= runner.max_iters:
            raise ValueError(
                f'stage 2 would start at iteration {switch}, but the run ends '
                f'after {runner.max_iters}. Lower `switch_at`, or set it to '
                'None for stage 1 only.')
        return switch

    def _switch_stage(self, runner, stage: int) -> None:
        """Freeze and unfreeze the parameters of the model for a stage."""
        model = unwrap(runner.model)
        if stage == 2:
            # A checkpoint of a later iteration has been through the switch.
            if self.load_best and runner.iter <= self.switch_iter:
                self._load_best(runner, model)
            _start_prompts(runner)
            self._checksums = tower_checksums(model)
            # Each process has its own unless it is a SyncBatchNorm; those of
            # the first are saved, and the prompts learn for them.
            for module in model.modules():
                if isinstance(module, (_BatchNorm, ScoreMap)):
                    for statistic in module.buffers(recurse=False):
                        broadcast(statistic)
            self._warn_if_nothing_is_deployed()
            learned = set(self._lr_factors)
        else:
            for provider in text_providers(model).values():
                provider.stop_learning()
            learned = self._trainable - set(prompt_parameters(model))
        # Only now that the optimizer has been built: MMEngine leaves out of
        # it what is frozen before that.
        for name, param in model.named_parameters():
            param.requires_grad_(name in learned)
            if name not in learned:
                # A leftover gradient would still be applied.
                param.grad = None
        self._frozen_norms = [
            module for name, module in model.named_modules()
            if self.freeze_norm and isinstance(module, _BatchNorm)
            and not _learns(name, module, learned)
        ]
        rests = self.freeze_norm and learned <= set(text_parameters(model))
        for module in model.modules():
            if isinstance(module, ScoreMap):
                module.length_fixed = stage == 2 and rests
        self.stage = stage
        follows = ''
        if stage == 1 and self.switch_iter is not None:
            follows = f'; stage 2 follows at iteration {self.switch_iter}'
        print_log(
            f'Stage {stage} of text-knowledge training from iteration '
            f'{runner.iter}: {len(learned)} parameter tensors learn{follows}.',
            'current')
        if stage == 2:
            print_log(f'Learning in stage 2: {sorted(learned)}', 'current')
        self._log_text(runner)

    def _warn_if_nothing_is_deployed(self) -> None:
        """Warn if stage 2 trains only parameters that training alone has."""
        if all('.text_branch.' in n or '.text_losses.' in n
               or n.startswith('auxiliary_head.') for n in self._lr_factors):
            print_log(
                "In the role 'auxiliary' nothing that is deployed learns in "
                'stage 2: name some of the network in `learn`, e.g. '
                "{r'\\.text\\.': 1.0, 'backbone': 0.1}.", 'current',
                logging.WARNING)

    def _log_text(self, runner) -> None:
        """Add stage and text statistics to the message hub."""
        model, hub = unwrap(runner.model), runner.message_hub
        hub.update_scalar('train/text_stage', self.stage)
        _update_embeddings(runner, averaged=False)
        for name, value in text_statistics(model).items():
            hub.update_scalar(f'train/{name}', value)

    # ------------------------------------------- best checkpoint of stage 1
    def _check_load_best(self, runner) -> None:
        """Check that stage 1 will save one best checkpoint."""
        hook, loop = _checkpoint_hook(runner), runner.train_loop
        if hook is None or len(hook.save_best or []) != 1:
            raise ValueError(
                'load_best=True needs one best checkpoint: set '
                "default_hooks=dict(checkpoint=dict(save_best='mIoU')).")
        if runner.val_loop is None or not isinstance(loop, IterBasedTrainLoop):
            raise ValueError('load_best=True needs validation and an '
                             'IterBasedTrainLoop.')
        begin, every = loop.val_begin, loop.val_interval
        first = max(1, -(-begin // every)) * every
        if first > self.switch_iter:
            raise ValueError(
                'load_best=True needs a validation in stage 1, but the first '
                f'is at iteration {first} and the switch at '
                f'{self.switch_iter}. Lower `val_interval`.')

    def _load_best(self, runner, model: nn.Module) -> None:
        """Load the best checkpoint of stage 1 and reset the optimizer."""
        hook = _checkpoint_hook(runner)
        barrier()  # the main process writes
        path = hook.best_ckpt_path
        if path is None or not exists(path):
            raise RuntimeError(
                'load_best=True, but stage 1 has no best checkpoint: '
                f'{path or "no validation gave a number"}. Put it back, or '
                'resume with load_best=False from the last checkpoint of '
                'stage 1.')
        state = CheckpointLoader.load_checkpoint(path, 'cpu')['state_dict']
        for module in [model, *(ema.module for ema in _ema_models(runner))]:
            module.load_state_dict(state)
        runner.optim_wrapper.optimizer.state.clear()
        # The next best one must not delete that of stage 1, from which a run
        # that is killed and resumed before the switch starts again.
        hook.best_ckpt_path = None
        for key in ('best_ckpt', 'best_score'):
            runner.message_hub.pop_info(key)
        print_log(
            f'Stage 2 starts from the best checkpoint of stage 1, {path}, '
            'with a new state of the optimizer.', 'current')


def _checkpoint_hook(runner) -> Optional[CheckpointHook]:
    """Get the checkpoint hook of a run, if there is one."""
    return next((h for h in runner.hooks if isinstance(h, CheckpointHook)),
                None)


def _ema_models(runner) -> List[BaseAveragedModel]:
    """Get the averaged models of all EMAHooks."""
    return [
        hook.ema_model for hook in runner.hooks
        if isinstance(hook, EMAHook) and hasattr(hook, 'ema_model')
    ]


def _learns(name: str, norm: nn.Module, learned: Set[str]) -> bool:
    """Whether a norm learns or, if it has no weights, what is around it."""
    own = [f'{name}.{key}' for key, _ in norm.named_parameters()]
    if own:
        return not learned.isdisjoint(own)
    around = name.rpartition('.')[0]
    return any(key.startswith(f'{around}.') for key in learned)


def _start_prompts(runner) -> None:
    """Let the prompts learn, those of averaged models included."""
    averages = [text_providers(ema.module) for ema in _ema_models(runner)]
    for name, provider in text_providers(unwrap(runner.model)).items():
        first_time = not getattr(provider, 'started', True)
        provider.start_learning()
        for average in averages:
            average[name].start_learning()
            if first_time:
                # The average starts from the initial prompts.
                average[name].load_state_dict(provider.state_dict())


def _update_embeddings(runner, averaged: bool = True) -> None:
    """Recompute learned embeddings, those of averaged models included."""
    models = [unwrap(runner.model), *(_ema_models(runner) if averaged else [])]
    for model in models:
        for provider in text_providers(model).values():
            if provider.learning:
                provider.refresh()
