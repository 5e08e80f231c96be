# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Checks that no supervision of unseen classes reaches the training."""
from typing import Sequence

import torch
from torch import Tensor


def check_unseen_labels(labels: Tensor, unseen: Sequence[int]) -> None:
    """Require a batch without labels of unseen classes.

    Args:
        labels (Tensor): Labels of a batch, of any shape.
        unseen (Sequence[int]): The unseen classes.

    Raises:
        ValueError: If a pixel has such a label.
    """
    found = torch.isin(labels, labels.new_tensor(unseen))
    if found.any():
        classes = labels[found].unique().tolist()
        raise ValueError(
            f'the classes {classes} are unseen in training (`unseen`), but '
            f"have labels. Hide them: dict(type='HideClasses', classes="
            f'{list(unseen)}) behind LoadAnnotations in the pipeline of '
            'train_dataloader.')


def check_unseen_teacher(batch_data_samples: list) -> None:
    """Require that the teacher gives image embeddings only.

    Logits and region embeddings depend on the classes, also unseen ones.

    Args:
        batch_data_samples (list[:obj:`SegDataSample`]): With the outputs
            of the teacher.

    Raises:
        ValueError: If there are logits or features of a segmentor, or region
            embeddings.
    """
    if any('region_embeddings' in sample or {'logits', 'features'}
           & set(sample.get('teacher', {}).keys())
           for sample in batch_data_samples):
        raise ValueError(
            'a teacher or region embeddings of all classes supervise the '
            'unseen ones too; leave them out. Only image embeddings '
            '(FrozenCLIPTeacher) may be distilled.')
