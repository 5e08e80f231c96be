# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Replacements of ``mmcv.ops`` for an mmcv without compiled ops.

MMSegmentation 1.2.2 imports two functions from ``mmcv.ops`` whether or not a
network needs them. Both are given here for real, in plain PyTorch, so that
nothing of MMSegmentation that uses them computes something else. Everything
else that MMSegmentation takes from ``mmcv.ops`` it guards itself with
``except ModuleNotFoundError``; :func:`__getattr__` answers in that form.

:func:`mmseg_textkd.compat.apply` puts this module into ``sys.modules``; it is
never imported where mmcv has ops of its own.
"""
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['point_sample', 'sigmoid_focal_loss']


def point_sample(input: Tensor,
                 points: Tensor,
                 align_corners: bool = False,
                 **kwargs: Any) -> Tensor:
    """Sample a feature map at points, as ``mmcv.ops.point_sample``.

    Args:
        input (Tensor): Feature map with shape (N, C, H, W).
        points (Tensor): Places (x, y) in [0, 1] x [0, 1] of the image, with
            shape (N, P, 2) or (N, Hgrid, Wgrid, 2).
        align_corners (bool): As in ``grid_sample``. Defaults to False.
        **kwargs: The other arguments of ``grid_sample``.

    Returns:
        Tensor: Values with shape (N, C, P) or (N, C, Hgrid, Wgrid).
    """
    flat = points.dim() == 3
    if flat:
        points = points.unsqueeze(2)
    output = F.grid_sample(
        input, points * 2.0 - 1.0, align_corners=align_corners, **kwargs)
    return output.squeeze(3) if flat else output


def sigmoid_focal_loss(input: Tensor,
                       target: Tensor,
                       gamma: float = 2.0,
                       alpha: float = 0.25,
                       weight: Optional[Tensor] = None,
                       reduction: str = 'mean') -> Tensor:
    """Sigmoid focal loss, as ``mmcv.ops.sigmoid_focal_loss``.

    From `Focal Loss for Dense Object Detection
    <https://arxiv.org/abs/1708.02002>`_, equation 5, with one binary problem
    per class.

    Args:
        input (Tensor): Logits with shape (N, C).
        target (Tensor): Class indices (int64) with shape (N, ); C means that
            no class is present.
        gamma (float): The focusing exponent. Defaults to 2.0.
        alpha (float): Weight of the positives; the negatives have
            1 - alpha. Defaults to 0.25.
        weight (Tensor, optional): Weight of every class with shape (C, ),
            chosen by the target of the row. Defaults to None.
        reduction (str): 'none', 'mean' (over the N rows) or 'sum'.
            Defaults to 'mean'.

    Returns:
        Tensor: With shape (N, C) for 'none', otherwise a scalar.

    Raises:
        ValueError: If ``reduction`` is none of the three.
    """
    if reduction not in ('none', 'mean', 'sum'):
        raise ValueError(
            f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    # The extra column is the target C, "no class"; it is cut off again.
    positive = F.one_hot(target, input.size(1) + 1)[:, :-1].type_as(input)
    prob = input.sigmoid()
    # logsigmoid stays finite where log(sigmoid) would be -inf.
    loss = -(
        positive * alpha * (1 - prob).pow(gamma) * F.logsigmoid(input) +
        (1 - positive) * (1 - alpha) * prob.pow(gamma) * F.logsigmoid(-input))
    if weight is not None:
        # "No class" has no weight of its own: the neutral one.
        padded = torch.cat([weight, weight.new_ones(1)])
        loss = loss * padded[target][:, None]
    if reduction == 'none':
        return loss
    return loss.sum() / input.size(0) if reduction == 'mean' else loss.sum()


def __getattr__(name: str) -> Any:
    """Raise for any other op, which needs a full mmcv.

    Args:
        name (str): Name that was looked for.

    Raises:
        AttributeError: For names like ``__path__``, which Python's own
            import machinery asks for.
        ModuleNotFoundError: For all others; an ``ImportError`` would pass by
            the guards in MMSegmentation.
    """
    if name.startswith('__') and name.endswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    raise ModuleNotFoundError(
        f"mmcv.ops.{name} needs mmcv's compiled ops, which are not installed: "
        'install the full mmcv instead of mmcv-lite',
        name='mmcv._ext')
