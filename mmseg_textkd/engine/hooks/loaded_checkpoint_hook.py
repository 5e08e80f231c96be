# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Dict, List

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel
from mmengine.runner import (BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop,
                             Runner)
from mmseg.registry import HOOKS
from torch import Tensor, nn

from ...models.ebseg.switchable_text import SwitchableText
from ...models.text_parameters import unwrap
from ...utils.checkpoint import (class_differences, class_names, load_faults,
                                 non_finite)

AUXILIARY = 'auxiliary_head.'


@HOOKS.register_module()
class LoadedCheckpointHook(Hook):
    """Require a checkpoint that is tested or resumed to be the right one.

    MMEngine loads what fits, whatever is missing, and drops what is not
    there, such as the state of the optimizer. With this hook it is an error
    if

    - a weight is NaN or infinite, also of a checkpoint to start from;
    - in a test or a resumed run a weight is missing, unexpected or of another
      shape; auxiliary heads may be missing in a test, which does not run
      them;
    - a test is for other classes than the checkpoint, by their names;
    - a resumed run would go on without the state of its optimizer or its
      schedule.

    A resumed run also makes up for the validation that a kill has prevented:
    where one is due at the iteration that it goes on from, it is done again,
    with the best checkpoint that it brings.

    ``tools/train.py`` and ``tools/test.py`` add it to every run, and
    :class:`PromptLearnerHook` to those of MMSegmentation's own tools.

    Args:
        strict (bool): Whether other weights and other classes of a test are
            an error; if not, a warning says what they are. Defaults to True.

    Examples:
        >>> custom_hooks = [dict(type='LoadedCheckpointHook')]
    """

    # Before EMAHook, which takes the state of a checkpoint apart.
    priority = 'VERY_HIGH'

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self._resumed = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check what has been read, before the model takes it.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): The checkpoint.

        Raises:
            ValueError: If it is not the right one, and why.
        """
        state = {
            k.removeprefix('module.'): v
            for k, v in checkpoint.get('state_dict', checkpoint).items()
            if isinstance(v, Tensor)
        }
        path = runner._load_from or f'the latest of {runner.work_dir}'
        training = isinstance(runner._train_loop, BaseLoop)
        odd = non_finite(state)
        if odd:
            raise ValueError(f'{path}: {odd}. The training has diverged, or '
                             'the file is damaged; take an earlier one.')
        if training and not runner._resume:
            return
        model = unwrap(runner.model)
        if isinstance(model, BaseTTAModel):
            model = model.module
        if training:
            _check_resumable(runner, checkpoint, path)
            faults = load_faults(model, state)
            if faults:
                raise ValueError(
                    f'{path} is not of the network of the config, so it '
                    'cannot be resumed; start a new run with `load_from`:\n  '
                    + '\n  '.join(faults))
            self._resumed = True
            return
        faults = _test_faults(model, state)
        if faults:
            self._tell(f'{path} is not of the network of the config:', faults)
        for loop in (runner._test_loop, runner._val_loop):
            if isinstance(loop, BaseLoop):
                self._check_classes(model, loop, checkpoint, path)

    def _check_classes(self, model: nn.Module, loop: BaseLoop,
                       checkpoint: dict, path: str) -> None:
        """Compare the classes of a checkpoint with those of a data set."""
        names, of = class_names(checkpoint.get('meta') or {}), 'checkpoint'
        for module in model.modules():
            if isinstance(module, SwitchableText) and module.switched:
                # On purpose other classes than those of the training.
                names, of = module.test_names, 'text for testing'
        own = getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes')
        faults = class_differences(names, own, of)
        if faults:
            where = path if of == 'checkpoint' else f'The {of}'
            self._tell(f'{where} is for other classes than the data set:',
                       faults)

    def _tell(self, what: str, faults: List[str]) -> None:
        """Raise an error, or warn."""
        text = '\n  '.join([what, *faults])
        if self.strict:
            raise ValueError(
                f'{text}\nTo test it all the same: `--no-strict` of '
                'tools/test.py.')
        print_log(text, 'current', logging.WARNING)

    def before_train_epoch(self, runner: Runner) -> None:
        """Validate where a resumed run goes on, if that is due there.

        Args:
            runner (Runner): The runner of the training process.
        """
        loop, resumed = runner.train_loop, self._resumed
        self._resumed = False
        if not resumed or runner.val_loop is None:
            return
        if isinstance(loop, IterBasedTrainLoop):
            step, last = loop.iter, loop.max_iters
        elif isinstance(loop, EpochBasedTrainLoop):
            step, last = loop.epoch, loop.max_epochs
        else:
            return
        loop._decide_current_val_interval()
        # A validation with a new best score writes the checkpoint of its
        # iteration anew, with what it has changed.
        best = {
            Path(str(value)).stem.split('_')[-1]
            for key, value in runner.message_hub.runtime_info.items()
            if key.startswith('best_ckpt')
        }
        if str(step) in best:
            return
        if step and step >= loop.val_begin and (step % loop.val_interval == 0
                                                or step == last):
            print_log(
                f'A validation is due at {step}, from where the run goes on. '
                'Whether it was done before the run stopped cannot be told; '
                'it is done now.', 'current')
            runner.val_loop.run()

    def after_train(self, runner: Runner) -> None:
        """As :meth:`before_train_epoch`, where no epoch was left.

        Args:
            runner (Runner): The runner of the training process.
        """
        self.before_train_epoch(runner)


def check_loaded(tool: ModuleType, strict: bool = True) -> None:
    """Let a tool of MMSegmentation add the hook to what it runs.

    Not by its config, which is written down and must not need the plugin. A
    checkpoint that is refused ends the tool with the reason alone.

    Args:
        tool (module): The tool, as of :func:`.compat.load_stock_tool`.
        strict (bool): See :class:`LoadedCheckpointHook`. Defaults to True.
    """

    class CheckedRunner(tool.Runner):
        """The runner of the tool, with the hook."""

        def register_hooks(self, *args, **kwargs) -> None:
            super().register_hooks(*args, **kwargs)
            # One of the config would be as strict as that says.
            self._hooks = [
                hook for hook in self._hooks
                if not isinstance(hook, LoadedCheckpointHook)
            ]
            self.register_hook(LoadedCheckpointHook(strict))

        def load_or_resume(self) -> None:
            # It is the file that is wrong: a traceback would only hide why.
            try:
                super().load_or_resume()
            except (OSError, ValueError) as error:
                sys.exit(f'Error: {error}')

    tool.Runner = CheckedRunner


def _check_resumable(runner: Runner, checkpoint: dict, path: str) -> None:
    """Require what a run goes on with besides its weights."""
    needed = dict(optimizer='the state of its optimizer')
    if runner.param_schedulers:
        needed['param_schedulers'] = 'that of its learning rate'
    missing = [what for key, what in needed.items() if key not in checkpoint]
    if missing:
        raise ValueError(
            f'{path} cannot be resumed: it has not '
            f'{" and ".join(missing)}, as best_*.pth and published '
            'checkpoints have not. Resume from iter_*.pth or epoch_*.pth, or '
            'start a new run from it with `load_from`.')
    counts = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    lost = (checkpoint.get('meta') or {}).get('iter', 0) % counts
    if lost:
        print_log(
            f'{path} was saved between two steps of the optimizer: gradients '
            f'of {lost} iteration(s), accumulated over {counts}, are not in '
            'it and are lost. Let the interval of the checkpoints be a '
            'multiple.', 'current', logging.WARNING)


def _test_faults(model: nn.Module, state: Dict[str, Tensor]) -> List[str]:
    """Compare what a test needs, which is no auxiliary head."""
    own = {
        k: v
        for k, v in model.state_dict().items() if k.startswith(AUXILIARY)
    }
    known = {
        k: v
        for k, v in state.items() if k in own or not k.startswith(AUXILIARY)
    }
    return load_faults(model, {**own, **known})
