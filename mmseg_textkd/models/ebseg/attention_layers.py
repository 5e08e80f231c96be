# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Layers of DETR-like decoders in plain PyTorch.

MMSegmentation has them only through MMDetection and its compiled operators.
"""
import math
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionLayer(nn.Module):
    """Attention layer with residual connection and layer norm.

    Args:
        dims (int): Width C.
        num_heads (int): Number of heads.
    """

    def __init__(self, dims: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            dims, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dims)
        xavier_init(self)

    def forward(self,
                x: Tensor,
                x_position: Tensor,
                context: Optional[Tensor] = None,
                context_position: Optional[Tensor] = None,
                mask: Optional[Tensor] = None) -> Tensor:
        """Compute cross- or self-attention.

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
        assert context_position is not None
        out = self.attention(
            x + x_position,
            context + context_position,
            context,
            attn_mask=mask,
            need_weights=False)[0]
        return self.norm(x + out)


class DeformableAttention(nn.Module):
    """Multi-scale deformable self-attention, with residual and layer norm.

    Each pixel looks, in each level and head, at a few points that it chooses
    beside its own place. Source: `Deformable DETR
    <https://arxiv.org/abs/2010.04159>`_, equation 3, in plain PyTorch: a
    ``grid_sample`` for each level.

    Args:
        dims (int): Width C.
        num_heads (int): Number of heads.
        num_levels (int): Number of feature levels.
        num_points (int): Number of points in each level and head.
    """

    def __init__(self, dims: int, num_heads: int, num_levels: int,
                 num_points: int) -> None:
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        self.value = nn.Linear(dims, dims)
        self.offsets = nn.Linear(dims, 2 * math.prod(self.shape))
        self.weights = nn.Linear(dims, math.prod(self.shape))
        self.out = nn.Linear(dims, dims)
        self.norm = nn.LayerNorm(dims)
        xavier_init(self)
        for layer in (self.value, self.offsets, self.weights, self.out):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        # The points are on rays, one direction a head, 1, 2, ... pixels away.
        angle = 2 * math.pi * torch.arange(num_heads) / num_heads
        ray = torch.stack([angle.cos(), angle.sin()], dim=1)
        ray = ray / ray.abs().amax(dim=1, keepdim=True)
        steps = torch.arange(1, num_points + 1)
        start = (ray[:, None] * steps[:, None])[:, None]
        with torch.no_grad():
            self.offsets.bias.view(*self.shape,
                                   2).copy_(start.expand(*self.shape, 2))

    def forward(self, x: Tensor, position: Tensor,
                sizes: Sequence[Tuple[int, int]]) -> Tensor:
        """Compute self-attention over the pixels of all levels.

        Args:
            x (Tensor): Tokens of all levels, one after the other, shape
                (N, L, C).
            position (Tensor): Their positions, shape (1, L, C).
            sizes (Sequence[tuple[int, int]]): Height and width of each level.

        Returns:
            Tensor: Tokens with shape (N, L, C).
        """
        heads, levels, points = self.shape
        query = x + position
        # (levels, N·heads, L, points, 2) and (levels, N·heads, 1, L, points)
        offsets = self.offsets(query).unflatten(
            2, (heads, levels, points, 2)).permute(3, 0, 2, 1, 4,
                                                   5).flatten(1, 2)
        weights = self.weights(query).unflatten(
            2, (heads, levels * points)).softmax(dim=3).unflatten(
                3, (levels, points)).permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :,
                                                                          None]
        centers = torch.cat([_centers(size, x) for size in sizes])
        values = self.value(x).split([h * w for h, w in sizes], dim=1)
        total: Any = 0.
        for size, value, offset, weight in zip(sizes, values, offsets,
                                               weights):
            value = value.unflatten(2,
                                    (heads, -1)).permute(0, 2, 3, 1).flatten(
                                        0, 1).unflatten(2, size)
            place = centers[:, None] + offset / offset.new_tensor(size[::-1])
            found = F.grid_sample(value, 2 * place - 1, align_corners=False)
            total = total + (found * weight).sum(dim=3)
        out = total.unflatten(0, (len(x), heads)).flatten(1, 2).transpose(1, 2)
        return self.norm(x + self.out(out))


class FeedForward(nn.Module):
    """Feed-forward network with residual connection and layer norm.

    Args:
        dims (int): Width C.
        hidden (int): Width in between.
    """

    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.layers = mlp(dims, hidden, dims, 2)
        self.norm = nn.LayerNorm(dims)
        xavier_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token.

        Args:
            x (Tensor): Tokens with shape (N, Q, C).

        Returns:
            Tensor: Tokens with shape (N, Q, C).
        """
        return self.norm(x + self.layers(x))


def mlp(in_dims: int, hidden: int, out_dims: int,
        layers: int) -> nn.Sequential:
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
    """Compute sine positional encodings of a feature map.

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
        # Sine and cosine of a frequency are adjacent.
        axes.append(torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1))
    rows, columns = axes
    grid = torch.cat([
        rows[:, None].expand(-1, size[1], -1),
        columns.expand(size[0], -1, -1)
    ], 2)
    return grid.flatten(0, 1)[None].to(like)


def xavier_init(module: nn.Module) -> None:
    """Initialize all matrices of a module by Xavier's method.

    Args:
        module (nn.Module): The module.
    """
    for value in module.parameters():
        if value.dim() > 1:
            nn.init.xavier_uniform_(value)


def _centers(size: Tuple[int, int], like: Tensor) -> Tensor:
    """Centers (x, y) of pixels, in [0, 1], shape (h·w, 2)."""
    y, x = ((torch.arange(side, device=like.device) + .5) / side
            for side in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=2)
    return grid.flatten(0, 1).to(like)
