# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers import LogitScale, pixel_text_similarity
from .logit_distillation_loss import pixel_divergence, teacher_logits


@MODELS.register_module()
class TextSimilarityDistillationLoss(nn.Module):
    r"""Match pixel-text similarity maps with the class maps of a teacher.

    .. math::
        L = \frac{T^2}{|V|} \sum_{p \in V} KL\left(\sigma(z^T_p / T),\;
        \sigma(s \cos(e_p, t_\cdot) / T)\right)

    over the pixels V that are not ignored. The K names of the classes are the
    common space, in which a pixel is its similarities to them: teacher and
    student may differ in width, and the teacher may be a stock network, for a
    linear classifier is nothing but similarities to K vectors. With a text
    network as teacher its logits are its pixel-text similarities. Computed in
    float32 whatever the mode of training. The text is given: it gets no
    gradient.

    Args:
        scale (dict, optional): Arguments of :class:`LogitScale`, the factor s
            on the student's cosines. Defaults to None: learned, from 1/0.07.
        temperature (float): Temperature T. Defaults to 1.0.
        loss_weight (float): Weight of the loss. Defaults to 1.0.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_text_similarity'.

    Raises:
        ValueError: If the temperature is not positive.
    """

    # No gradient goes to the text: prompts learn nothing by it.
    trains_text = False

    def __init__(self,
                 scale: Optional[dict] = None,
                 temperature: float = 1.,
                 loss_weight: float = 1.,
                 loss_name: str = 'loss_text_similarity') -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(
                f'`temperature` must be positive, but got {temperature}.')
        self.scale = LogitScale(**(scale or {}))
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self,
                embeddings: Tensor,
                text: Tensor,
                labels: Tensor,
                ignore_index: int = 255,
                batch_data_samples: Sequence = (),
                **kwargs) -> Tensor:
        """Compute the loss.

        Args:
            embeddings (Tensor): Pixel embeddings, shape (N, D, h, w), of any
                length.
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).
            labels (Tensor): Long tensor with shape (N, h, w).
            ignore_index (int): Label of the pixels that are left out.
                Defaults to 255.
            batch_data_samples (Sequence[:obj:`SegDataSample`]): With the
                logits of the teacher.

        Returns:
            Tensor: Scalar; 0 with a graph if every pixel is ignored.

        Raises:
            ValueError: As of :func:`teacher_logits`.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            text = F.normalize(text.detach().to(dtype), dim=-1)
            cosines = pixel_text_similarity(
                F.normalize(embeddings.to(dtype), dim=1), text)
            teacher = teacher_logits(batch_data_samples, cosines.shape[2:],
                                     cosines.shape[1])
            return self.loss_weight * pixel_divergence(
                self.scale() * cosines, teacher, labels != ignore_index,
                self.temperature)
