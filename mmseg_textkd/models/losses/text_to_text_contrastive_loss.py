# Copyright (c) mmseg_textkd contributors. All rights reserved.
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class TextToTextContrastiveLoss(nn.Module):
    r"""Contrastive loss between learned and fixed class embeddings.

    With the cosines :math:`S_{ij} = \cos(l_i, f_j) / \tau` of learned and
    fixed embeddings of the K classes, the mean of two cross entropies:

    .. math::
        L = -\frac{1}{2K} \sum_k \left(
        \log \frac{\exp S_{kk}}{\sum_j \exp S_{kj}} +
        \log \frac{\exp S_{kk}}{\sum_j \exp S_{jk}} \right)

    Source: an option in the code of Lin, Chen and Wu, `Enhancing Real-Time
    Semantic Segmentation with Textual Knowledge of Pre-Trained VLM
    <https://doi.org/10.1109/APSIPAASC58517.2023.10317179>`_.

    Args:
        temperature (float): :math:`\tau`. Defaults to 0.07.
        loss_weight (float): Weight of the loss. Defaults to 1.0.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_text_to_text'.

    Raises:
        ValueError: If ``temperature`` is not positive.
    """

    # Of the text alone: a head calls it in stage 2, without pixels.
    of_text = True

    def __init__(self,
                 temperature: float = 0.07,
                 loss_weight: float = 1.0,
                 loss_name: str = 'loss_text_to_text') -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError('`temperature` must be positive, but got '
                             f'{temperature}.')
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self, learned: Tensor, fixed: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            learned (Tensor): Class embeddings of the prompts, shape (K, D),
                of any length.
            fixed (Tensor): Class embeddings that they start from, shape
                (K, D).

        Returns:
            Tensor: Scalar, float32 or wider.
        """
        with torch.autocast(learned.device.type, enabled=False):
            dtype = torch.promote_types(learned.dtype, torch.float32)
            learned = F.normalize(learned.to(dtype), dim=1)
            fixed = F.normalize(fixed.to(dtype), dim=1)
            similarity = learned @ fixed.T / self.temperature
            own = torch.arange(len(similarity), device=similarity.device)
            loss = (F.cross_entropy(similarity, own) +
                    F.cross_entropy(similarity.T, own)) / 2
            return self.loss_weight * loss
