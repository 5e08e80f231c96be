# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Tuple

import torch
from mmengine.model import BaseModule
from torch import Tensor

from mmseg_textkd.text import TextEmbeddings, Vocabulary
from mmseg_textkd.text.vocabulary import VocabularySpec
from ..layers.balance import seen_classes
from ..text_providers import ClassEmbeddings, TextProvider, build_text


class SwitchableText(BaseModule):
    """Class embeddings of training, and replaceable ones of inference.

    Args:
        text (dict): Config of the :class:`TextProvider` of the training.
        num_classes (int): Number of classes K of the training.
        train_classes (VocabularySpec, optional): Vocabulary of the training,
            to tell seen classes where the file of ``text`` is missing.
            Defaults to None: that of the file.
        test_text (dict, optional): Config of the provider for inference, with
            ``num_classes``. It is no part of a checkpoint. Defaults to None:
            that of the training.

    Raises:
        TypeError: If a config builds no text provider.
        ValueError: If the two are of different width, or one is centered.
    """

    def __init__(self,
                 text: dict,
                 num_classes: int,
                 train_classes: Optional[VocabularySpec] = None,
                 test_text: Optional[dict] = None) -> None:
        super().__init__()
        self.trained = build_text(dict(text, num_classes=num_classes))
        bank = self.trained.phrase_bank
        if bank is not None and bank.mode != 'mean':
            raise ValueError(
                'EBSeg takes one vector for each class, but the text of the '
                f'training draws or holds several (mode={bank.mode!r}). Use '
                "mode='mean', or ClassEmbeddings.")
        self.train_classes = train_classes
        other = None if test_text is None else build_text(test_text)
        if other is not None and (self.trained.centered or other.centered):
            raise ValueError(
                '`text` or `test_text` is centered, each by a mean of its '
                'own, so that the two cannot be compared. Leave `center` out, '
                'or set the classes by `EBSeg.set_classes`.')
        self.switch(other)

    @property
    def dim(self) -> int:
        """Int: Width D of the text."""
        return self.trained.dim

    @property
    def num_classes(self) -> int:
        """Int: Number of classes K' at inference."""
        return (self.__dict__['other'] or self.trained).num_classes

    @property
    def switched(self) -> bool:
        """Bool: Whether inference has other text than the training."""
        return self.__dict__['other'] is not None

    @property
    def test_names(self) -> Optional[Tuple[str, ...]]:
        """tuple[str], optional: Names of the classes at inference, as far as
        they are known.
        """
        return (self.__dict__['other'] or self.trained).names

    def switch(self, other: Optional[TextProvider]) -> None:
        """Set the text provider of inference.

        Args:
            other (TextProvider, optional): The provider; None for that of
                the training.

        Raises:
            ValueError: If it is of another width.
        """
        if other is not None and other.dim != self.dim:
            raise ValueError(
                f'The new classes have embeddings of width {other.dim}, but '
                f'the network was trained with {self.dim}. Encode them with '
                'the text tower of the training.')
        # Out of nn.Module's sight, and so of checkpoints and of `train`.
        self.__dict__['other'] = other and other.eval()

    def set_classes(self, embeddings: Optional[TextEmbeddings]) -> None:
        """Set the classes of inference.

        Args:
            embeddings (TextEmbeddings, optional): Text embeddings of the
                classes; None for the classes of the training.

        Raises:
            ValueError: If they are of another width.
        """
        provider = None
        if embeddings is not None:
            provider = ClassEmbeddings(
                '', num_classes=len(embeddings), dim=embeddings.dim)
            provider.fill(embeddings.vectors)
            provider.names, provider.record = embeddings.names, embeddings
        self.switch(provider)

    def forward(self) -> Tensor:
        """Get the text of the training.

        Returns:
            Tensor: Unit rows with shape (K, D).
        """
        return self.trained()

    def vocabulary(self) -> Tuple[Tensor, Tensor]:
        """Get the text of inference.

        Returns:
            tuple[Tensor, Tensor]: Unit rows with shape (K', D), and bool with
            shape (K', ): seen in training.

        Raises:
            ValueError: If it is not known what the classes are called.
        """
        other, own = self.__dict__['other'], self.trained()
        if other is None:
            return own, torch.ones_like(own[:, 0], dtype=torch.bool)
        trained = self.train_classes
        seen = seen_classes(
            _vocabulary(other),
            _vocabulary(self.trained)
            if trained is None else Vocabulary.from_spec(trained))
        return other().to(own), torch.tensor(seen, device=own.device)


def _vocabulary(provider: TextProvider) -> Vocabulary:
    """Get names and phrases of a provider."""
    record = getattr(provider, 'record', None)
    if record is not None:
        return Vocabulary(record.names, record.phrases)
    if provider.names is None:
        raise ValueError('To balance new classes the names of all classes '
                         'must be known: give `train_classes`, or the files '
                         'of `text` and `test_text`.')
    return Vocabulary.from_spec(list(provider.names))
