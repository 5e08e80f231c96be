# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from mmseg_textkd.models.layers import seen_classes
from mmseg_textkd.models.text_parameters import unwrap
from mmseg_textkd.text import Vocabulary
from mmseg_textkd.utils.checkpoint import class_differences


@HOOKS.register_module()
class TeacherHook(Hook):
    """Check that a frozen teacher fits the data and stays unchanged.

    Without it ``DistilledEncoderDecoder`` trains too, but only the number of
    classes is compared. A teacher of embeddings may have other classes, if
    none of those that are hidden from the student.

    Examples:
        >>> custom_hooks = [dict(type='TeacherHook')]
    """

    def before_train(self, runner) -> None:
        """Load the teacher and compare its classes with those of the data.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            ValueError: If the model has no teacher, one of other classes, or
                one that was trained with classes that are hidden.
            FileNotFoundError: If the teacher has no checkpoint.
        """
        model = unwrap(runner.model)
        teacher = getattr(model, 'teacher', None)
        if teacher is None:
            raise ValueError(
                'TeacherHook found no teacher in the model. Use model=dict('
                "type='DistilledEncoderDecoder', teacher=dict(config=..., "
                'checkpoint=...)), or remove the hook.')
        self._checksum = teacher.checksum()
        dataset = runner.train_dataloader.dataset
        classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
        if not classes or not teacher.classes:
            return
        classes = tuple(classes)
        if teacher.num_classes is None:
            branch = getattr(model.decode_head, 'text_branch', None)
            self._check_unseen(
                teacher, [classes[k] for k in getattr(branch, 'unseen', ())])
            return
        faults = class_differences(teacher.classes, classes, 'teacher')
        if faults:
            raise ValueError('\n  '.join([
                f'The teacher {teacher.checkpoint} has other classes than '
                f'{type(dataset).__name__}; train one on the same:',
                *faults[:5], '...' if faults[5:] else ''
            ]).rstrip())

    @staticmethod
    def _check_unseen(teacher, unseen) -> None:
        """Require a teacher that was not trained with unseen classes."""
        if not unseen:
            return
        known = seen_classes(*(Vocabulary.from_spec(list(names))
                               for names in (unseen, teacher.classes)))
        if any(known):
            raise ValueError(
                f'The teacher {teacher.name} was trained with '
                f'{[n for n, k in zip(unseen, known) if k]}, which are unseen '
                'by the student (`unseen`). Use another teacher.')

    def after_train(self, runner) -> None:
        """Check that the teacher is unchanged.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            RuntimeError: If a weight of the teacher has changed.
        """
        if unwrap(runner.model).teacher.checksum() != self._checksum:
            raise RuntimeError('the frozen teacher has changed during '
                               'training; what was distilled is not valid.')
