# Copyright (c) mmseg_textkd contributors. All rights reserved.
from abc import ABCMeta, abstractmethod
from contextlib import contextmanager
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmseg.structures import SegDataSample
from torch import Tensor, nn


class NewClasses(NamedTuple):
    """Classes that a network is to be asked for.

    Attributes:
        names (tuple[str]): K names.
        phrases (tuple[tuple[str]]): The phrases of each.
        vectors (Tensor, optional): Their vectors, float32, shape (K, D);
            None for a network without text.
        trained (list[int | None]): For each the number of the class that the
            network was trained with, None for a new one.
        source (str): Where the vectors come from, in words.
    """
    names: Tuple[str, ...]
    phrases: Tuple[Tuple[str, ...], ...]
    vectors: Optional[Tensor]
    trained: List[Optional[int]]
    source: str


class OpenClassifier(metaclass=ABCMeta):
    """The part of a network that decides on classes, asked for others.

    What :class:`TextSegInferencer` must know of a kind of network: how it
    takes words, and which layer of its head gives a map for each class. That
    layer can be made for some of the classes, or for cosines in place of
    scores.

    Args:
        model (nn.Module): The segmentor, with its weights, in evaluation
            mode.
        names (Sequence[str]): The classes that it was trained with.

    Attributes:
        layer (str): Name of that layer in the head.
        logits (bool): Whether it gives logits, whose softmax are
            probabilities. If not, a score is one by itself.
        vectors (Tensor, optional): Vectors of the present classes, shape
            (K, D); None where there is no text.
    """

    layer = 'conv_seg'
    logits = True

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(names)
        self.vectors: Optional[Tensor] = None

    @abstractmethod
    def encode(self, classes: Any, **how: Any) -> NewClasses:
        """Find out what the network can know of classes; nothing changes.

        Args:
            classes: See :meth:`Vocabulary.from_spec`.
            **how: See :meth:`WordEncoder.encode`.

        Returns:
            NewClasses: The classes.

        Raises:
            ValueError: If it cannot know them, or they are no vocabulary.
        """

    @abstractmethod
    def take(self, found: NewClasses, new_bias: float = 0.) -> None:
        """Make them the classes of the network.

        Args:
            found (NewClasses): What :meth:`encode` has found.
            new_bias (float): Added to the logits of new classes. Defaults
                to 0.

        Raises:
            ValueError: If there is no such bias; nothing has changed then.
        """

    @abstractmethod
    def select(self, rows: Tensor) -> nn.Module:
        """Make the layer for some of the present classes.

        Args:
            rows (Tensor): Long tensor of n class numbers, which may repeat.

        Returns:
            nn.Module: A layer of n classes.
        """

    @abstractmethod
    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """Make a layer that gives cosines of pixels with classes.

        Args:
            rows (Sequence[int]): n class numbers.

        Returns:
            nn.Module: A layer of n maps.

        Raises:
            ValueError: If the network has no embeddings of pixels.
        """

    def install(self, layer: nn.Module, number: int) -> None:
        """Put the layer of other classes in, for good.

        Args:
            layer (nn.Module): The layer.
            number (int): Number of its classes.
        """
        setattr(self.model.decode_head, self.layer, layer)
        for module in (self.model.decode_head, self.model):
            module.num_classes = module.out_channels = number

    @contextmanager
    def replaced(self, layer: nn.Module, number: int) -> Iterator[nn.Module]:
        """Put another layer in, for a while.

        Args:
            layer (nn.Module): The layer.
            number (int): Number of its maps.

        Yields:
            nn.Module: The head.
        """
        head, model = self.model.decode_head, self.model
        kept = getattr(head, self.layer), model.out_channels
        setattr(head, self.layer, layer)
        model.out_channels = number
        try:
            yield head
        finally:
            setattr(head, self.layer, kept[0])
            model.out_channels = kept[1]

    def similarities(self, images: Tensor, samples: List[SegDataSample],
                     rows: List[int]) -> List[Tensor]:
        """Compare pixels with the text of classes.

        Args:
            images (Tensor): Preprocessed pictures with shape (N, 3, H, W).
            samples (list[SegDataSample]): Their N samples.
            rows (list[int]): n class numbers.

        Returns:
            list[Tensor]: For each picture cosines at its own size, shape
            (n, H, W).
        """
        # One map alone would be taken for a binary problem.
        padded = rows if len(rows) > 1 else rows * 2
        copies = [
            SegDataSample(metainfo=sample.metainfo) for sample in samples
        ]
        with self.replaced(self.cosine(padded), len(padded)), torch.no_grad():
            maps = self.model.inference(images, [s.metainfo for s in copies])
            done = self.model.postprocess_result(maps, copies)
        return [s.seg_logits.data[:len(rows)] for s in done]
