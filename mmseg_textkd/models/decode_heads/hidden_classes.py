# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Nothing in training may tell of classes that are to stay unseen."""
from typing import Sequence

import torch
from torch import Tensor


def check_labels(labels: Tensor, unseen: Sequence[int]) -> None:
    """Refuse labels of hidden classes.

    Args:
        labels (Tensor): Labels of a batch, of any shape.
        unseen (Sequence[int]): The hidden classes.

    Raises:
        ValueError: If there is one.
    """
    found = torch.isin(labels, labels.new_tensor(unseen))
    if found.any():
        classes = labels[found].unique().tolist()
        raise ValueError(
            f'the classes {classes} are to stay unseen in training, but '
            f"have labels. Hide them: dict(type='HideClasses', classes="
            f'{list(unseen)}) behind LoadAnnotations in the pipeline of '
            'train_dataloader.')


def check_teacher(batch_data_samples: list) -> None:
    """Refuse a teacher that knows classes.

    Image embeddings come of pictures and are asked for no class.

    Args:
        batch_data_samples (list[:obj:`SegDataSample`]): With what a teacher
            has said.

    Raises:
        ValueError: If there are logits or features of a segmentor, or region
            embeddings.
    """
    if any('region_embeddings' in sample or {'logits', 'features'}
           & set(sample.get('teacher', {}).keys())
           for sample in batch_data_samples):
        raise ValueError(
            'a teacher or region embeddings of all classes would tell of '
            'those that are to stay unseen; leave them out. Only image '
            'embeddings (FrozenCLIPTeacher) may be taught.')
