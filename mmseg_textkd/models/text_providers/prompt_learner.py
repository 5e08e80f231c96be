# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, Optional

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from .text_provider import TextProvider


class PromptLearner(TextProvider):
    """Base of the providers that learn in stage 2.

    In stage 1 it provides the fixed vectors of ``embeddings``; in stage 2
    those that :meth:`compute` derives from its parameters. A checkpoint
    holds the parameters and the resulting embeddings, not the fixed vectors.

    Args:
        embeddings (dict): Config of the fixed provider to start from.
        num_classes (int): Number of classes K. The head passes its own.
    """

    def __init__(self, embeddings: dict, num_classes: int) -> None:
        fixed = MODELS.build(
            embeddings, default_args=dict(num_classes=num_classes))
        if (not isinstance(fixed, TextProvider) or fixed.learnable()
                or fixed.learning):
            raise TypeError(
                '`embeddings` must be the config of a fixed provider '
                '(ClassEmbeddings or ControlEmbeddings), but got '
                f'{type(fixed).__name__}.')
        super().__init__(num_classes, fixed.dim, fixed.names)
        self._missing_hint = fixed._missing_hint
        self.register_buffer(
            'base', fixed.class_embeddings.clone(), persistent=False)
        self.register_buffer(
            'shift', getattr(fixed, 'shift', None), persistent=False)
        # Whether stage 2 has started, also in a resumed run.
        self.register_buffer('started', torch.zeros((), dtype=torch.bool))
        self.has_base = fixed.filled
        self.centered = fixed.centered
        self.record = getattr(fixed, 'record', None)
        # Stage 1 trains with phrases, stage 2 with the learned embeddings.
        self.phrase_bank = fixed.phrase_bank
        self._bank_hint = fixed._bank_hint
        if self.has_base:
            self.fill(fixed.class_embeddings)

    def learnable(self) -> Dict[str, nn.Parameter]:
        """Get the parameters that stage 2 learns.

        Returns:
            dict[str, nn.Parameter]: Parameters by their name.
        """
        return dict(self.named_parameters())

    @property
    def has_vectors(self) -> bool:
        """bool: Whether the vectors that the config names are there."""
        return self.has_base

    @property
    def can_compute(self) -> bool:
        """bool: Whether the initial vectors are loaded."""
        return self.has_base

    def check_stage2(self) -> None:
        """Check before stage 1 what stage 2 will need, and keep nothing.

        Raises:
            RuntimeError: If the vectors to start from are missing.
        """
        if not self.has_base:
            raise RuntimeError('Stage 2 cannot start without the class '
                               f'embeddings: {self._missing_hint}')

    def start_learning(self) -> None:
        """Enter stage 2.

        Raises:
            RuntimeError: If the vectors to start from are missing.
        """
        PromptLearner.check_stage2(self)
        self.prepare()
        self.learning = True
        self.started.fill_(True)

    def prepare(self) -> None:
        """Prepare stage 2."""

    def expected(self) -> Optional[Tensor]:
        """Compute the embeddings from the config and the parameters.

        Returns:
            Tensor, optional: Unit rows with shape (K, D); None if they cannot
            be computed.
        """
        if not self.started:
            # In stage 1, also where stage 2 needs a tower to compute them.
            return self.base if self.has_base else None
        return super().expected()

    @torch.no_grad()
    def distance_from_start(self) -> float:
        """Mean cosine distance of the embeddings from those of stage 1.

        Returns:
            float: Mean over the classes of 1 - cosine between the current
            and the stage-1 embedding.
        """
        if not (self.has_base and self.can_compute):
            return 0.
        # float64: small angles vanish in 1 - cosine.
        cosine = F.cosine_similarity(
            self.compute().double(), self.base.double(), dim=1)
        return (1 - cosine).mean().clamp(min=0).item()
