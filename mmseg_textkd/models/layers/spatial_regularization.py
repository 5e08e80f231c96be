# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Callable, Dict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ('depthwise', 'bottleneck')
ACTIVATIONS: Dict[str, Callable[[Tensor], Tensor]] = {
    'lrelu': F.leaky_relu,
    'relu': F.relu,
    'tanh': torch.tanh,
}


class SpatialRegularization(nn.Module):
    r"""Spatial regularization blocks of LSeg, for any number of classes.

    A block filters every label map :math:`z_k` with the same 3x3 kernel
    :math:`w_d` (zero padding). The blocks of depth d = 1 ... N are

    .. math::
        \text{depthwise:}\quad z_k \leftarrow a(w_d * z_k + b_d)

        \text{bottleneck:}\quad
        z_k \leftarrow a(w_d * z_k + b_d + \max_j z_j)

    with no activation :math:`a` in the last one, whose outputs are logits and
    may be negative. Nothing belongs to a label: the number of labels may
    change at any time, and permuting them permutes the result.

    Each kernel starts as the identity. The activations being monotone, the
    blocks then leave the order of the labels at each pixel as it was, but for
    ties ('relu' cuts, 'tanh' saturates beyond logits of a few units).

    Source: `LSeg <https://arxiv.org/abs/2201.03546>`_, "spatial
    regularization". The start is ours.

    Args:
        kind (str): 'depthwise' or 'bottleneck'. Defaults to 'bottleneck'.
        depth (int): Number of blocks; 0 is the identity. Defaults to 2, the
            best of the article's ablation.
        activation (str): 'lrelu', 'relu' or 'tanh'. Defaults to 'lrelu'.

    Raises:
        ValueError: If an argument is not one of these.
    """

    def __init__(self,
                 kind: str = 'bottleneck',
                 depth: int = 2,
                 activation: str = 'lrelu') -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f'`kind` of the spatial regularization must be '
                             f'one of {KINDS}, but got {kind!r}.')
        if activation not in ACTIVATIONS:
            raise ValueError(
                '`activation` of the spatial regularization must be one of '
                f'{tuple(ACTIVATIONS)}, but got {activation!r}.')
        if not isinstance(depth, int) or depth < 0:
            raise ValueError('`depth` of the spatial regularization must be '
                             f'an int of at least 0, but got {depth!r}.')
        self.kind = kind
        self.depth = depth
        self.activation = activation
        # No nn.Conv2d: some heads initialize all of those at random.
        weight = torch.zeros(depth, 3, 3)
        weight[:, 1, 1] = 1
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(depth))

    def forward(self, logits: Tensor) -> Tensor:
        """Filter the logit maps.

        Args:
            logits (Tensor): Label maps with shape (N, K, H, W), any K >= 1.

        Returns:
            Tensor: The same shape and dtype.
        """
        labels = logits.shape[1]
        activate = ACTIVATIONS[self.activation]
        for i in range(self.depth):
            filtered = F.conv2d(
                logits,
                self.weight[i].to(logits).expand(labels, 1, 3, 3),
                self.bias[i].to(logits).expand(labels),
                padding=1,
                groups=labels)
            if self.kind == 'bottleneck':
                filtered = filtered + logits.amax(dim=1, keepdim=True)
            last = i == self.depth - 1
            logits = filtered if last else activate(filtered)
        return logits

    def extra_repr(self) -> str:
        """Describe the module for ``print``.

        Returns:
            str: Its settings.
        """
        return (f'kind={self.kind!r}, depth={self.depth}, '
                f'activation={self.activation!r}')
