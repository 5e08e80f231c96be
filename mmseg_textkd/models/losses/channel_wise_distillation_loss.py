# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class ChannelWiseDistillationLoss(nn.Module):
    r"""Channel-wise knowledge distillation loss.

    .. math::
        L = \frac{T^2}{N C} \sum_{n, c} \sum_{p \in V_n}
        \phi(y^T_{nc})_p \log \frac{\phi(y^T_{nc})_p}{\phi(y^S_{nc})_p},
        \qquad \phi(y)_p = \frac{\exp(y_p / T)}{\sum_{q \in V_n} \exp(y_q / T)}

    The softmax is over the pixels of a channel. In the paper V are all
    pixels; here ignored ones are left out, since images are padded in
    training. An image with no other pixel contributes 0. Computed in float32
    whatever the mode of training.

    Source: `Channel-wise Knowledge Distillation for Dense Prediction
    <https://arxiv.org/abs/2011.13256>`_, section 3, with its temperature and
    its weight for logits (for features it has 50).

    Args:
        on (str): What is compared, both as they are around the classifier
            ``conv_seg``: its 'logits' or the 'features' that enter it.
            Defaults to 'logits'.
        align (tuple[int, int], optional): Channels of the student and of the
            teacher where they differ: a 1x1 convolution, which learns and is
            dropped for release, brings the student's to the teacher's.
            Defaults to None.
        temperature (float): Temperature T. Defaults to 4.0.
        loss_weight (float): Weight of the loss. Defaults to 3.0.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_cwd'.

    Raises:
        ValueError: If ``on`` is unknown or the temperature not positive.
    """

    def __init__(self,
                 on: str = 'logits',
                 align: Optional[Tuple[int, int]] = None,
                 temperature: float = 4.,
                 loss_weight: float = 3.,
                 loss_name: str = 'loss_cwd') -> None:
        super().__init__()
        if on not in ('logits', 'features'):
            raise ValueError(
                f"`on` must be 'logits' or 'features', but got {on!r}.")
        if not temperature > 0:
            raise ValueError(
                f'`temperature` must be positive, but got {temperature}.')
        self.on = on
        self.align = None if align is None else nn.Conv2d(*align, 1)
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self,
                student: Tensor,
                teacher: Tensor,
                labels: Tensor,
                ignore_index: int = 255) -> Tensor:
        """Compute the loss.

        Args:
            student (Tensor): Logits or features, shape (N, C, H, W).
            teacher (Tensor): Those of the teacher, which get no gradient,
                with the same shape, or the channels that ``align`` gives.
            labels (Tensor): Long tensor with shape (N, H, W).
            ignore_index (int): Label of the pixels that are left out.
                Defaults to 255.

        Returns:
            Tensor: Scalar; 0 with a graph if every pixel is ignored.

        Raises:
            ValueError: If the numbers of channels differ.
        """
        if self.align is not None:
            student = self.align(student)
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f'ChannelWiseDistillationLoss on {self.on}: the student has '
                f'{student.shape[1]} channels and the teacher '
                f'{teacher.shape[1]}. Set align=(CHANNELS OF THE STUDENT, '
                f'{teacher.shape[1]}).')
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, torch.float32)
            valid = (labels != ignore_index).flatten(1)[:, None]
            # Not -inf: an image of ignored pixels alone would give NaN.
            lowest = torch.finfo(dtype).min
            maps = [
                F.log_softmax(
                    (value.to(dtype).flatten(2) / self.temperature).where(
                        valid, lowest),
                    dim=2) for value in (student, teacher.detach())
            ]
            divergence = F.kl_div(
                maps[0], maps[1], reduction='none',
                log_target=True).where(valid, 0)
            mean = divergence.sum(dim=2).mean()
            return self.loss_weight * self.temperature**2 * mean
