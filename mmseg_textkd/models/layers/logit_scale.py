# Copyright (c) mmseg_textkd contributors. All rights reserved.
import math

import torch
from torch import Tensor, nn


class LogitScale(nn.Module):
    r"""Positive factor on similarities, learned as its logarithm.

    A fixed :math:`1/0.07` leaves a cross entropy that no network can remove,
    because the embeddings of CLIP's class names are close together; so it is
    learned by default, and kept from running away as in CLIP.

    Source: `Learning Transferable Visual Models From Natural Language
    Supervision <https://arxiv.org/abs/2103.00020>`_, section 2.5.

    Args:
        init (float): Start value of the factor. Defaults to 1 / 0.07.
        learnable (bool): Whether it is learned. Defaults to True.
        max_scale (float): Upper bound of the factor. Defaults to 100.

    Raises:
        ValueError: If not 0 < init <= max_scale.
    """

    def __init__(self,
                 init: float = 1 / 0.07,
                 learnable: bool = True,
                 max_scale: float = 100.) -> None:
        super().__init__()
        if not 0 < init <= max_scale:
            raise ValueError('the scale must start in (0, max_scale], but got '
                             f'init={init}, max_scale={max_scale}.')
        self.max_log_scale = math.log(max_scale)
        log_scale = torch.tensor(math.log(init))
        self.learnable = learnable
        if learnable:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer('log_scale', log_scale)

    def forward(self) -> Tensor:
        """Get the factor.

        Returns:
            Tensor: Scalar, float32, at most ``max_scale``.
        """
        if self.training and self.learnable:
            # In place, as CLIP does: a clamp in the graph would take the
            # gradient away for good once the bound has been passed.
            with torch.no_grad():
                self.log_scale.clamp_(max=self.max_log_scale)
            return self.log_scale.float().exp()
        return self.log_scale.float().clamp(max=self.max_log_scale).exp()

    def extra_repr(self) -> str:
        """Describe the module for ``print``.

        Returns:
            str: Its settings.
        """
        return (f'learnable={self.learnable}, '
                f'max_scale={math.exp(self.max_log_scale):g}')
