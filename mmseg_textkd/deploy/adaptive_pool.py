# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any

import torch
from torch import Tensor, nn


class MatrixAdaptiveAvgPool2d(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, for exporters.

    ONNX has no such pooling. Exporters write one whose bins are those of the
    size at which they trace; these matrices follow the size of the input.

    Args:
        bins (tuple[int, int]): Number of bins in height and width.
    """

    def __init__(self, bins: 'tuple[int, int]') -> None:
        super().__init__()
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """Pool (N, C, H, W) to (N, C, *bins)."""
        rows, columns = (self._means(size, bins, x)
                         for size, bins in zip(x.shape[2:], self.bins))
        return rows @ x @ columns.T

    @staticmethod
    def _means(size: int, bins: int, x: Tensor) -> Tensor:
        """Compute the matrix (bins, size) that averages over each bin.

        Bin i reaches from floor(i * size / bins) to
        ceil((i + 1) * size / bins), as in torch.
        """
        i = torch.arange(bins, device=x.device)[:, None]
        position = torch.arange(size, device=x.device)[None]
        start = i * size // bins
        end = ((i + 1) * size + bins - 1) // bins
        inside = (position >= start) & (position < end)
        return inside.to(x.dtype) / (end - start).to(x.dtype)


def replace_adaptive_pools(model: nn.Module) -> None:
    """Replace every ``nn.AdaptiveAvgPool2d`` of several bins, in place.

    Args:
        model (nn.Module): The model.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.AdaptiveAvgPool2d):
            size: Any = module.output_size
            bins = (size, size) if isinstance(size, int) else tuple(size)
            if bins != (1, 1) and None not in bins:
                parent, _, child = name.rpartition('.')
                setattr(
                    model.get_submodule(parent), child,
                    MatrixAdaptiveAvgPool2d(bins))
