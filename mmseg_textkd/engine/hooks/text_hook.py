# Copyright (c) mmseg_textkd contributors. All rights reserved.
import logging
from typing import Dict, Optional

from mmengine.hooks import Hook
from mmengine.logging import print_log

from mmseg_textkd.models.text_parameters import text_providers
from ..stages.text_state import (averaged_models, check_classes, refresh_text,
                                 swap_text_with_average, unwrap)


class TextHook(Hook):
    """Keep the text of a run consistent: what every stage needs.

    The text is for the classes of the data, fits the checkpoint that a run
    goes on from, is evaluated as it is now (or as EMAHook averages it), and
    is what the checkpoints hold.
    """

    def before_run(self, runner) -> None:
        """Check what can be checked before weights are loaded.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            ValueError: If the model has no text, or there are several hooks
                of this kind.
        """
        name = type(self).__name__
        if not text_providers(unwrap(runner.model)):
            raise ValueError(
                f'{name} found no text in the model. Use a text head, for '
                "instance decode_head=dict(type='TextFCNHead', "
                'text=dict(...)), or remove the hook.')
        number = sum(isinstance(hook, type(self)) for hook in runner.hooks)
        if number > 1:
            raise ValueError(
                f'`custom_hooks` has {number} {name}s, which would undo '
                "each other's work. Leave one; it serves all text of the "
                'model.')

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Check that a resumed run goes on with text of the same shape.

        Without this the optimizer would stumble over it later.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): The checkpoint, not yet in the model.

        Raises:
            ValueError: If the shapes differ.
        """
        if not runner._resume:
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
        """Check the classes and settle which text a loaded one is held to.

        Args:
            runner (Runner): The runner of the training process.
        """
        check_classes(runner, runner.train_dataloader)
        for name, provider in text_providers(unwrap(runner.model)).items():
            message = provider.reconcile(resumed=runner._resume)
            if message:
                print_log(f'{name}: {message}', 'current', logging.WARNING)
        for module in averaged_models(runner):
            for name, provider in text_providers(module).items():
                provider.reconcile(resumed=False)

    def before_val(self, runner) -> None:
        """Check that the text is for the classes of the validation set.

        Args:
            runner (Runner): The runner of the training process.
        """
        check_classes(runner, runner.val_dataloader)

    def before_val_epoch(self, runner) -> None:
        """Evaluate with the text as it is now.

        Args:
            runner (Runner): The runner of the training process.
        """
        refresh_text(runner)
        swap_text_with_average(runner)

    def after_val_epoch(self,
                        runner,
                        metrics: Optional[Dict[str, float]] = None) -> None:
        """Undo the swap of :meth:`before_val_epoch`.

        Args:
            runner (Runner): The runner of the training process.
            metrics (dict[str, float], optional): Results. Defaults to None.
        """
        swap_text_with_average(runner)

    def before_test(self, runner) -> None:
        """Check that the text is for the classes of the test set.

        Args:
            runner (Runner): The runner of the testing process.
        """
        check_classes(runner, runner.test_dataloader)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Write the learned text into the checkpoint.

        Args:
            runner (Runner): The runner of the training process.
            checkpoint (dict): The checkpoint that is about to be written.
        """
        refresh_text(runner)
        for name, provider in text_providers(unwrap(runner.model)).items():
            checkpoint['state_dict'][f'{name}.class_embeddings'] = (
                provider.class_embeddings.detach().cpu().clone())
