# Copyright (c) mmseg_textkd contributors. All rights reserved.
import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn


def pixel_divergence(student: Tensor,
                     teacher: Tensor,
                     valid: Tensor,
                     temperature: float = 1.) -> Tensor:
    r"""Mean over pixels of :math:`T^2\, KL(\sigma(z^T/T), \sigma(z^S/T))`.

    Args:
        student (Tensor): Logits with shape (N, K, H, W), float32 or wider.
        teacher (Tensor): Logits with the same shape. They get a gradient
            unless they are detached.
        valid (Tensor): Bool tensor with shape (N, H, W): the pixels that
            count.
        temperature (float): Temperature T of both softmaxes over the classes.
            Defaults to 1.0.

    Returns:
        Tensor: Scalar; 0 with a graph if no pixel counts.
    """
    student = F.log_softmax(student / temperature, dim=1)
    teacher = F.log_softmax(teacher.to(student) / temperature, dim=1)
    divergence = F.kl_div(
        student, teacher, reduction='none', log_target=True).sum(dim=1)
    total = divergence.where(valid, 0).sum()
    return temperature**2 * total / valid.sum().clamp(min=1)


@MODELS.register_module()
class LogitDistillationLoss(nn.Module):
    r"""Let a network predict, pixel by pixel, what its teacher predicts.

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
        self._loss_name = loss_name

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

    @property
    def loss_name(self) -> str:
        """str: Name of the loss in the log."""
        return self._loss_name
