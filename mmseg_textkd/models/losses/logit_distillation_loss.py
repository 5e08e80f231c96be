# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn


def pixel_divergence(student: Tensor,
                     teacher: Tensor,
                     valid: Tensor,
                     temperature: float = 1.) -> Tensor:
    r"""Mean over pixels of :math:`T^2\, KL(\sigma(z^T/T), \sigma(z^S/T))`.

    One logit for two classes stands for 0 and itself, whose softmax is its
    sigmoid.

    Args:
        student (Tensor): Logits with shape (N, K, H, W), float32 or wider.
        teacher (Tensor): Logits of the same classes. They get a gradient
            unless they are detached.
        valid (Tensor): Bool tensor with shape (N, H, W): the pixels that
            count.
        temperature (float): Temperature T of both softmaxes over the classes.
            Defaults to 1.0.

    Returns:
        Tensor: Scalar; 0 with a graph if no pixel counts.
    """
    student, teacher = [
        F.log_softmax(
            (F.pad(logits, (0, 0, 0, 0, 1, 0))
             if logits.shape[1] == 1 else logits).to(student) / temperature,
            dim=1) for logits in (student, teacher)
    ]
    divergence = F.kl_div(
        student, teacher, reduction='none', log_target=True).sum(dim=1)
    total = divergence.where(valid, 0).sum()
    return temperature**2 * total / valid.sum().clamp(min=1)


@MODELS.register_module()
class LogitDistillationLoss(nn.Module):
    r"""Kullback-Leibler divergence from the teacher's predictions by pixel.

    .. math::
        L = \frac{T^2}{|V|} \sum_{p \in V} \sum_k \sigma(z^T_p / T)_k
        \log \frac{\sigma(z^T_p / T)_k}{\sigma(z^S_p / T)_k}

    over the pixels V that are not ignored. The factor :math:`T^2` keeps the
    size of the gradient. Computed in float32 whatever the mode of training.

    MMSegmentation's ``KLDivLoss`` is not used: it passes probabilities where
    their logarithms belong, and is not zero for equal logits.

    Source: `Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`_, section 2.

    Args:
        temperature (float): Temperature T. Defaults to 4.0.
        loss_weight (float): Weight of the loss. Defaults to 1.0.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_kd'.

    Raises:
        ValueError: If the temperature is not positive.
    """

    def __init__(self,
                 temperature: float = 4.,
                 loss_weight: float = 1.,
                 loss_name: str = 'loss_kd') -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(
                f'`temperature` must be positive, but got {temperature}.')
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
            student (Tensor): Logits with shape (N, K, H, W).
            teacher (Tensor): Logits with the same shape. They get no
                gradient.
            labels (Tensor): Long tensor with shape (N, H, W).
            ignore_index (int): Label of the pixels that are left out.
                Defaults to 255.

        Returns:
            Tensor: Scalar; 0 with a graph if every pixel is ignored.
        """
        with torch.autocast(student.device.type, enabled=False):
            dtype = torch.promote_types(student.dtype, torch.float32)
            return self.loss_weight * pixel_divergence(
                student.to(dtype), teacher.detach(), labels != ignore_index,
                self.temperature)


def teacher_logits(batch_data_samples: Sequence, size: Sequence[int],
                   num_classes: int) -> Tensor:
    """Get the logits of a segmentation teacher from the data samples.

    Args:
        batch_data_samples (Sequence[:obj:`SegDataSample`]): N samples, with
            ``teacher.logits``, as ``DistilledEncoderDecoder`` sets them.
        size (Sequence[int]): Height h and width w to resize them to.
        num_classes (int): Number of classes K.

    Returns:
        Tensor: Float32 or wider, without gradient, shape (N, K, h, w).

    Raises:
        ValueError: If there are none, or for another number of classes.
    """
    if not batch_data_samples or not all('logits' in s.get('teacher', ())
                                         for s in batch_data_samples):
        raise ValueError(
            'the data samples have no logits of a teacher. Set '
            "model=dict(type='DistilledEncoderDecoder', teacher=dict("
            'config=..., checkpoint=...)) in the config.')
    logits = torch.stack([s.teacher.logits for s in batch_data_samples])
    if logits.shape[1] == 1 and num_classes == 2:
        # One logit stands for 0 and itself.
        logits = F.pad(logits, (0, 0, 0, 0, 1, 0))
    if logits.shape[1] != num_classes:
        raise ValueError(f'the teacher has {logits.shape[1]} classes, but the '
                         f'text {num_classes}.')
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return resize(
        logits.detach().to(dtype),
        size=tuple(size),
        mode='bilinear',
        align_corners=False)
