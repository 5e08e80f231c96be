# Copyright (c) mmseg_textkd contributors. All rights reserved.
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from .prompt_learner import PromptLearner


@MODELS.register_module()
class ResidualPromptLearner(PromptLearner):
    r"""Learnable offset of every class embedding.

    :math:`T_k = \mathrm{normalize}(t_k + \alpha x_k)` with :math:`x_k = 0`
    at the start, so that the switch to stage 2 changes nothing by itself.
    It needs no text tower: vectors alone are enough.

    Source: `Task Residual for Tuning Vision-Language Models
    <https://arxiv.org/abs/2211.10277>`_, equation 5.

    Args:
        embeddings (dict): Config of the fixed provider to start from.
        num_classes (int): Number of classes K. The head passes its own.
        scale (float): :math:`\alpha`, the fixed scale of the offset. Defaults
            to 0.5, as in the paper.
    """

    def __init__(self,
                 embeddings: dict,
                 num_classes: int,
                 scale: float = 0.5) -> None:
        super().__init__(embeddings, num_classes)
        if not scale > 0:
            raise ValueError(f'`scale` must be positive, but got {scale}: '
                             'with 0 the offset could not learn.')
        self.scale = float(scale)
        self.offset = nn.Parameter(torch.zeros(num_classes, self.dim))

    def compute(self) -> Tensor:
        """Add the offsets to the fixed vectors.

        Returns:
            Tensor: Unit rows, float32, with shape (K, D).
        """
        return F.normalize(self.base + self.scale * self.offset, dim=1)
