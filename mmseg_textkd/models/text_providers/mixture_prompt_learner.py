# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from .prompt_learner import PromptLearner


@MODELS.register_module()
class MixturePromptLearner(PromptLearner):
    r"""Learnable weights over the phrases and templates of a class.

    :math:`T_k = \mathrm{normalize}(\sum_r \mathrm{softmax}(w_k)_r\, t_{kr})`
    over the bank of the embeddings file, one vector for every phrase in
    every template. With :math:`w = 0` this is the usual ensemble, so the
    switch to stage 2 changes nothing by itself. It needs no text tower.

    Args:
        embeddings (dict): Config of a ``ClassEmbeddings`` whose file holds a
            bank (``tools/encode_text.py --keep-bank``).
        num_classes (int): Number of classes K. The head passes its own.

    Raises:
        ValueError: If the file holds no bank.
    """

    def __init__(self, embeddings: dict, num_classes: int) -> None:
        super().__init__(embeddings, num_classes)
        bank: Optional[Tensor] = None
        mask: Optional[Tensor] = None
        if self.has_base:
            record = self.record
            if record is None or record.bank is None:
                raise ValueError(
                    'MixturePromptLearner needs an embeddings file with a '
                    'bank of phrases; make it with `python '
                    'tools/encode_text.py ... --keep-bank` (in `build`: '
                    'keep_bank=True).')
            bank, mask = record.bank.clone(), record.bank_mask.clone()
        self.register_buffer('bank', bank, persistent=False)
        self.register_buffer('bank_mask', mask, persistent=False)
        width = 1 if bank is None else bank.shape[1]
        self.weights = nn.Parameter(torch.zeros(num_classes, width))

    def compute(self) -> Tensor:
        """Average the vectors of the bank by the weights.

        Returns:
            Tensor: Unit rows, float32, with shape (K, D).
        """
        logits = self.weights.masked_fill(~self.bank_mask, float('-inf'))
        mixed = torch.einsum('kr,krd->kd', logits.softmax(dim=1), self.bank)
        return self.center(F.normalize(mixed, dim=1))

    def _load_from_state_dict(self, state_dict, prefix, *args,
                              **kwargs) -> None:
        # Without the file the width of the bank is known to the checkpoint
        # alone.
        value = state_dict.get(prefix + 'weights')
        if value is not None and self.bank is None:
            # An optimizer may hold the parameter by now.
            self.weights.data = self.weights.new_zeros(value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
