# Copyright (c) mmseg_textkd contributors. All rights reserved.
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from .control_embeddings import ControlEmbeddings
from .text_provider import TextProvider


@MODELS.register_module()
class LearnedEmbeddings(TextProvider):
    """Class embeddings that are weights, learned from the start.

    A control without language for every gain of fixed text: the classifier
    of ``ClassEmbeddings`` with the same width, norm and scale, which folds
    into the same convolution, but whose vectors the network chooses.
    ``PromptLearnerHook`` takes them for weights of the network, which learn
    in stage 1; in stage 2 they learn if its ``learn`` names them.

    Args:
        num_classes (int): Number of classes K. The head passes its own.
        dim (int): Width D. Defaults to 512.
        seed (int): Seed of the orthonormal vectors that it starts from, which
            are those of ``ControlEmbeddings(kind='random')``. Defaults to 0.

    Raises:
        ValueError: If there are more classes than dimensions.
    """

    def __init__(self,
                 num_classes: int,
                 dim: int = 512,
                 seed: int = 0) -> None:
        super().__init__(num_classes, dim)
        start = ControlEmbeddings('random', num_classes, dim, seed).compute()
        self.register_buffer('start', start, persistent=False)
        self.vectors = nn.Parameter(start.clone())
        self.fill(start)
        self.learning = True

    def forward(self, num_images: int = 1) -> Tensor:
        """Get the class embeddings.

        In evaluation too they are those of the weights: without a hook that
        keeps the buffer up to date they would be old ones.

        Args:
            num_images (int): Not used. Defaults to 1.

        Returns:
            Tensor: Unit rows, float32, with shape (K, D), with gradient.
        """
        with torch.autocast(self.vectors.device.type, enabled=False):
            return self.compute()

    def replace(self, vectors: Tensor) -> None:
        """Become the text of other classes, for evaluation alone.

        Args:
            vectors (Tensor): Unit rows with shape (K', D).
        """
        super().replace(vectors)
        self.vectors = nn.Parameter(self.class_embeddings.clone())

    def _load_from_state_dict(self, state_dict, prefix, *args,
                              **kwargs) -> None:
        """Load the weights; the buffer may be of earlier ones."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.vectors.isfinite().all():
            self.refresh()

    def compute(self) -> Tensor:
        """Normalize the vectors.

        Returns:
            Tensor: Unit rows, float32, with shape (K, D), with gradient.
        """
        return F.normalize(self.vectors, dim=1)

    def stop_learning(self) -> None:
        """Do nothing: the vectors are learned in stage 1."""

    @torch.no_grad()
    def distance_from_start(self) -> float:
        """Mean cosine distance of the vectors from those at the start.

        Returns:
            float: Mean over the classes of 1 - cosine.
        """
        cosine = (self.compute().double() * self.start.double()).sum(dim=1)
        return (1 - cosine).mean().clamp(min=0).item()
