# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from mmseg_textkd.text import Vocabulary
from .label_maps import select_classes
from .open_classifier import NewClasses, OpenClassifier


class FoldedClassifier(OpenClassifier):
    """The classifier of a folded or stock network: only its own classes."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__(model, names)
        self.own = model.decode_head.conv_seg

    def encode(self, classes: Any, **how: Any) -> NewClasses:
        """Choose among the classes of the network."""
        words = Vocabulary.from_spec(classes)
        new = [name for name in words.names if name not in self.names]
        if new:
            raise ValueError(
                f'this checkpoint is folded, or stock: without the projection '
                f'into the space of text it cannot learn of {new[:10]}. It '
                f'has the classes {list(self.names)}. Take the checkpoint of '
                'the training, not the one of textkd2mmseg.py, with its '
                'config.')
        trained = [self.names.index(name) for name in words.names]
        return NewClasses(words.names, words.phrases, None, trained,
                          'as trained')

    def take(self, found: NewClasses, new_bias: float = 0.) -> None:
        """Take the rows of these classes."""
        device = next(self.own.parameters()).device
        rows = torch.tensor(found.trained, device=device)
        self.install(select_classes(self.own, rows), len(rows))

    def select(self, rows: Tensor) -> nn.Module:
        """Take some rows of the present classifier."""
        return select_classes(self.model.decode_head.conv_seg, rows)

    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """There is none."""
        raise ValueError('this checkpoint is folded, or stock: it has no '
                         'pixel embeddings and no similarities. Take the '
                         'checkpoint of the training.')
