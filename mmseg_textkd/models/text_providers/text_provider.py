# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
import logging
from abc import ABCMeta, abstractmethod
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from .phrase_bank import PhraseBank


class TextProvider(BaseModule, metaclass=ABCMeta):
    """Base of the modules that provide the class embeddings.

    The matrix that :meth:`forward` returns is the only interface between
    language and vision. Fixed vectors, controls and learned prompts are all
    providers, so that no classifier or loss depends on their kind.

    The matrix is a plain persistent buffer, ``class_embeddings``: a
    checkpoint can be tested with neither the vectors' file nor a text tower.
    A provider whose file is missing can still be built (inference tools build
    the model before they load the checkpoint), but raises an error if used
    before its buffer has been set.

    Args:
        num_classes (int): Number of classes K.
        dim (int): Width D of the text embeddings.
        names (Sequence[str], optional): Class names in row order. Defaults to
            None, which means unknown.
    """

    def __init__(self,
                 num_classes: int,
                 dim: int,
                 names: Optional[Sequence[str]] = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dim = dim
        self.names: Optional[Tuple[str, ...]] = tuple(names) if names else None
        self.learning = self.centered = False
        self._filled = False
        self._missing_hint = 'no class embeddings were given.'
        # Phrases that replace the class embeddings in training.
        self.phrase_bank: Optional[PhraseBank] = None
        self._bank_hint = ''  # the error if they are needed but missing
        self.register_buffer('class_embeddings',
                             torch.full((num_classes, dim), float('nan')))

    @property
    def filled(self) -> bool:
        """bool: Whether the embeddings have been set."""
        return self._filled

    @property
    def has_vectors(self) -> bool:
        """bool: Whether the vectors that the config names are there."""
        return True

    def adopt(self, other: 'TextProvider') -> None:
        """Become another provider of the same config, but for what learns.

        What a checkpoint has filled stays as well.

        Args:
            other (TextProvider): One that was built when its files were
                there.

        Raises:
            ValueError: If what learns depends on what is in the files: an
                optimizer may hold it by now.
        """
        own = dict(self.named_parameters())
        if {
                k: p.shape
                for k, p in own.items()
        } != {
                k: p.shape
                for k, p in other.named_parameters()
        }:
            raise ValueError(
                f'the embeddings file of the {type(self).__name__} was '
                'missing when the network was built, and what it holds sizes '
                'weights of it. The file is there now: start the run again.')
        state = self.state_dict() if self._filled else {}
        # A model and its averages adopt the same one.
        other = copy.deepcopy(other)
        other.train(self.training).to(self.class_embeddings.device)
        self.__dict__.update(other.__dict__)
        # Of the provider itself: none has parts with parameters.
        self._parameters.update(own)
        self.load_state_dict(state, strict=False)

    def fill(self, vectors: Tensor) -> None:
        """Set the current embeddings.

        Args:
            vectors (Tensor): Float tensor with shape (K, D). Rows are brought
                to unit length.

        Raises:
            ValueError: If the shape is not (K, D), or a row is zero.
        """
        expected = (self.num_classes, self.dim)
        if tuple(vectors.shape) != expected:
            raise ValueError(
                f'the class embeddings have shape {tuple(vectors.shape)}, but '
                f'the head needs (num_classes, dim) = {expected}. Use '
                'embeddings made for these classes and this width, or change '
                "the head's `num_classes` or the embeddings' `dim`.")
        zero = (vectors == 0).all(dim=1).nonzero().flatten().tolist()
        if zero:
            raise ValueError(f'the class embeddings of the rows {zero} are '
                             'all zero: they have no direction.')
        with torch.no_grad():
            self.class_embeddings.copy_(F.normalize(vectors.float(), dim=1))
        self._filled = True

    def replace(self, vectors: Tensor) -> None:
        """Become the text of other classes, for evaluation alone.

        Args:
            vectors (Tensor): Unit rows with shape (K', D).
        """
        self.num_classes = len(vectors)
        self.class_embeddings: Tensor = vectors.to(self.class_embeddings)
        self.names = None

    def forward(self, num_images: int = 1) -> Tensor:
        """Get the class embeddings.

        Args:
            num_images (int): Number of images N in the batch, for providers
                that draw other text for each of them in training. Defaults
                to 1.

        Returns:
            Tensor: Unit rows, float32, with shape (K, D), or in training
            (N, K, D) where each image has its own, or (1, R, K, D) where each
            class has several that count. They carry a graph to the learnable
            parameters while the provider is learning.

        Raises:
            RuntimeError: If neither a file nor a checkpoint has filled them,
                or phrases to train with are missing.
        """
        if self.learning and self.training:
            # Under AMP too: a K×D matrix costs nothing in float32.
            with torch.autocast(
                    self.class_embeddings.device.type, enabled=False):
                return self.compute()
        if not self._filled:
            raise RuntimeError('The class embeddings are empty: '
                               f'{self._missing_hint}')
        if self.training and not self.learning:
            if self.phrase_bank is not None:
                return self.phrase_bank.sample(num_images,
                                               self.class_embeddings.device)
            if self._bank_hint:
                raise RuntimeError('Training needs the phrases of the '
                                   f'classes: {self._bank_hint}')
        return self.class_embeddings

    def center(self, vectors: Tensor) -> Tensor:
        """Subtract the mean that was subtracted from the own vectors.

        Args:
            vectors (Tensor): Unit vectors with shape (n, D).

        Returns:
            Tensor: Unit vectors; the same if the own are not centered.

        Raises:
            ValueError: If that mean is not known, as its file is missing.
        """
        shift = getattr(self, 'shift', None)
        if shift is None and self.centered:
            raise ValueError(
                'the network was trained with centered vectors, and the '
                'embeddings file with the mean is missing. Put it there.')
        return vectors if shift is None else F.normalize(
            vectors - shift.to(vectors), dim=1)

    def train(self, mode: bool = True) -> 'TextProvider':
        """Set the mode; evaluation uses the text of the current weights.

        Args:
            mode (bool): Whether to train. Defaults to True.

        Returns:
            TextProvider: The provider.
        """
        super().train(mode)
        if self.learning and not mode:
            # Of averaged weights too: EMAHook swaps them in before this.
            self.refresh()
        return self

    def trained_vectors(self) -> Tensor:
        """Get all vectors that pixels are compared with in training.

        Returns:
            Tensor: Unit rows, float32, with shape (M, D): the class
            embeddings, and behind them the phrases that are sampled. The
            phrases are not in a checkpoint: without their file they are left
            out, and a warning is logged.
        """
        rows, bank = self.class_embeddings, self.phrase_bank
        if bank is not None:
            used = bank.probability > 0
            return torch.cat(
                [rows, bank.vectors.to(rows)[used.to(rows.device)]])
        if self._bank_hint:
            print_log(
                'The phrases of the training are not known, so new words are '
                f'projected onto the class names alone: {self._bank_hint}',
                'current', logging.WARNING)
        return rows

    @abstractmethod
    def compute(self) -> Tensor:
        """Compute the embeddings from the parameters.

        Returns:
            Tensor: Unit rows with shape (K, D), with gradient.
        """

    @property
    def can_compute(self) -> bool:
        """bool: Whether :meth:`compute` can be called."""
        return self._filled

    def learnable(self) -> Dict[str, nn.Parameter]:
        """Get the parameters that stage 2 learns.

        Returns:
            dict[str, nn.Parameter]: Parameters by their name in this module;
            empty for fixed text.
        """
        return {}

    def class_rows(self) -> List[str]:
        """Name the weights with a row for each class.

        Returns:
            list[str]: Their names in this module.
        """
        return ['class_embeddings', *self._parameters]

    def start_learning(self) -> None:
        """Enter stage 2; a fixed provider stays as it is."""

    def check_stage2(self) -> None:
        """Check before stage 1 what stage 2 will need, and keep nothing."""

    def stop_learning(self) -> None:
        """Enter stage 1, in which the embeddings are fixed."""
        self.learning = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the buffer from the parameters."""
        if self.can_compute:
            self.fill(self.compute())

    @torch.no_grad()
    def distance_from_start(self) -> float:
        """Mean cosine distance of the embeddings from those of stage 1.

        Returns:
            float: Mean over the classes of 1 - cosine between the current
            and the stage-1 embedding; 0 for fixed text.
        """
        return 0.

    def expected(self) -> Optional[Tensor]:
        """Compute the embeddings from the config and the parameters.

        Returns:
            Tensor, optional: Unit rows with shape (K, D); None if they cannot
            be computed.
        """
        return self.compute() if self.can_compute else None

    @torch.no_grad()
    def check_loaded(self, resumed: bool) -> Optional[str]:
        """Compare loaded class embeddings with those of the config.

        A resumed run must go on with the text that it began with, so a
        difference is an error. A run that only starts from other weights
        uses the text of its config.

        Args:
            resumed (bool): Whether the run is a resumed one.

        Returns:
            str, optional: What was done, if there was a difference.

        Raises:
            ValueError: If the run is resumed and its text has changed.
        """
        fresh = self.expected()
        if fresh is None or not self._filled:
            return None
        difference = (fresh - self.class_embeddings).abs().max().item()
        # Written so that NaN counts as a difference.
        if difference <= 1e-4:
            return None
        if resumed:
            raise ValueError(
                'the class embeddings in the checkpoint differ from those '
                f'that the config gives (max |difference| {difference:.2e}). '
                'A resumed run must keep its text: restore the embeddings '
                'file with which the run began, or start a new run with '
                '`load_from` instead of `--resume`.')
        self.fill(fresh)
        return ('The class embeddings in the loaded checkpoint differed from '
                f'those of the config (max |difference| {difference:.2e}); '
                "the config's are used.")

    def _load_from_state_dict(self, state_dict, prefix, *args,
                              **kwargs) -> None:
        """Load the embeddings, which are set then."""
        value = state_dict.get(prefix + 'class_embeddings')
        if value is not None and value.shape == self.class_embeddings.shape:
            self._filled = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FixedProvider(TextProvider):
    """Provider of vectors that do not depend on parameters."""

    # Kept apart from the buffer, which a checkpoint may overwrite.
    _source: Optional[Tensor] = None

    @property
    def has_vectors(self) -> bool:
        """bool: Whether the vectors that the config names are there."""
        return self._source is not None

    @property
    def can_compute(self) -> bool:
        """bool: Whether :meth:`compute` can be called."""
        return self.has_vectors

    def compute(self) -> Tensor:
        """Get the vectors of the config.

        Returns:
            Tensor: Unit rows with shape (K, D).
        """
        assert self._source is not None
        return self._source.to(self.class_embeddings)


def build_text(cfg: Mapping[str, Any], **defaults: Any) -> TextProvider:
    """Build a text provider.

    Args:
        cfg (Mapping): Its config.
        **defaults: What the config need not have.

    Returns:
        TextProvider: The provider.

    Raises:
        TypeError: If the config builds something else.
    """
    provider = MODELS.build(cfg, default_args=defaults)
    if not isinstance(provider, TextProvider):
        raise TypeError(
            '`text` must be the config of a text provider, such as '
            f"dict(type='ClassEmbeddings', file=...), but {cfg} builds a "
            f'{type(provider).__name__}.')
    return provider
