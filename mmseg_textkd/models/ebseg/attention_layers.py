# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Parts of DETR-like decoders, in plain PyTorch.

MMSegmentation has them only through MMDetection and its compiled operators.
"""
import math
from typing import Optional, Tuple

import torch
from torch import Tensor, nn


class AttentionLayer(nn.Module):
    """Attention, residual, layer norm.

    Args:
        dims (int): Width C.
        num_heads (int): Number of heads.
    """

    def __init__(self, dims: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            dims, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dims)

    def forward(self,
                x: Tensor,
                x_position: Tensor,
                context: Optional[Tensor] = None,
                context_position: Optional[Tensor] = None,
                mask: Optional[Tensor] = None) -> Tensor:
        """Let tokens attend to others, or to themselves.

        Args:
            x (Tensor): Tokens with shape (N, Q, C).
            x_position (Tensor): Their positions, (N or 1, Q, C).
            context (Tensor, optional): Tokens with shape (N, L, C). Defaults
                to None: ``x``.
            context_position (Tensor, optional): Their positions, (N or 1, L,
                C). Defaults to None: ``x_position``.
            mask (Tensor, optional): Bool with shape (N·heads, Q, L), true
                where attention is forbidden. Defaults to None.

        Returns:
            Tensor: Tokens with shape (N, Q, C).
        """
        if context is None:
            context, context_position = x, x_position
        out = self.attention(
            x + x_position,
            context + context_position,
            context,
            attn_mask=mask,
            need_weights=False)[0]
        return self.norm(x + out)


class FeedForward(nn.Module):
    """Two linear layers, residual, layer norm.

    Args:
        dims (int): Width C.
        hidden (int): Width in between.
    """

    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.layers = mlp(dims, hidden, dims, 2)
        self.norm = nn.LayerNorm(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token.

        Args:
            x (Tensor): Tokens with shape (N, Q, C).

        Returns:
            Tensor: Tokens with shape (N, Q, C).
        """
        return self.norm(x + self.layers(x))


def mlp(in_dims: int, hidden: int, out_dims: int, layers: int) -> nn.Module:
    """Build a multi-layer perceptron with ReLU.

    Args:
        in_dims (int): Input width.
        hidden (int): Width in between.
        out_dims (int): Output width.
        layers (int): Number of linear layers.

    Returns:
        nn.Module: The perceptron.
    """
    dims = [in_dims, *[hidden] * (layers - 1), out_dims]
    parts = []
    for wide, narrow in zip(dims, dims[1:]):
        parts += [nn.Linear(wide, narrow), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts[:-1])


def sine_position(size: Tuple[int, int], dims: int, like: Tensor) -> Tensor:
    """Encode the places of a feature map by sines and cosines.

    Source: `DETR <https://arxiv.org/abs/2005.12872>`_, with coordinates in
    [0, 2π].

    Args:
        size (tuple[int, int]): Height h and width w.
        dims (int): Width C, a multiple of 4.
        like (Tensor): Whose device and dtype to take.

    Returns:
        Tensor: Encoding with shape (1, h·w, C).
    """
    quarter = torch.arange(dims // 4, device=like.device, dtype=torch.float)
    wave = 10000**(quarter * 4 / dims)
    axes = []
    for side in size:
        place = torch.arange(1, side + 1, device=like.device) / side
        angle = 2 * math.pi * place[:, None] / wave
        axes.append(torch.cat([angle.sin(), angle.cos()], dim=1))
    rows, columns = axes
    grid = torch.cat([
        rows[:, None].expand(-1, size[1], -1),
        columns.expand(size[0], -1, -1)
    ], 2)
    return grid.flatten(0, 1)[None].to(like)


def to_tokens(x: Tensor) -> Tensor:
    """Turn a map (N, C, h, w) into tokens.

    Args:
        x (Tensor): Features with shape (N, C, h, w).

    Returns:
        Tensor: Tokens with shape (N, h·w, C).
    """
    return x.flatten(2).transpose(1, 2)
