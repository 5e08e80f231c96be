# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = ('bn', 'l2', 'none')


class PixelProjection(BaseModule):
    """Projection of a head's features to the space of the text embeddings.

    A 1x1 convolution C -> D and a norm. With batch normalization, which is an
    affine map in evaluation mode, everything up to the logits is affine in
    the features and folds into one convolution. An L2 norm is not.

    Args:
        in_channels (int): Channels C of the head's features.
        dim (int): Width D of the text embeddings.
        norm (str): 'bn', 'l2' (as in LSeg) or 'none'. Defaults to 'bn'.
        norm_cfg (dict, optional): Config of the batch norm, as the host head
            has it. Only BN and SyncBN fold. Defaults to None: BN.
        learned (bool): Whether the convolution is learned. Else it is the
            identity and only the norm is left. Defaults to True.

    Raises:
        ValueError: If the norm is unknown, or an identity would have to
            change the number of channels.
    """

    def __init__(self,
                 in_channels: int,
                 dim: int,
                 norm: str = 'bn',
                 norm_cfg: Optional[dict] = None,
                 learned: bool = True) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(
                f'`norm` must be one of {NORMS}, but got {norm!r}.')
        self.norm = norm
        # A bias before a batch norm has no effect.
        self.conv = nn.Conv2d(in_channels, dim, 1, bias=norm != 'bn')
        if not learned:
            if dim != in_channels:
                raise ValueError(
                    'without a projection the class embeddings must have the '
                    f'width of the features, {in_channels}, but have {dim}.')
            self.conv.requires_grad_(False)
        self.learned = learned
        self._set_start()
        self.bn: Any = None
        if norm == 'bn':
            self.bn = build_norm_layer(norm_cfg or dict(type='BN'), dim)[1]
            if not isinstance(self.bn, _BatchNorm):
                raise ValueError(
                    "norm='bn' needs BN or SyncBN in `norm_cfg`, but got "
                    f'{norm_cfg}; another norm does not fold into a '
                    'convolution.')

    def _set_start(self) -> None:
        """Set a convolution that is not learned to the identity."""
        if not self.learned:
            nn.init.dirac_(self.conv.weight)
            if self.conv.bias is not None:
                nn.init.zeros_(self.conv.bias)

    def init_weights(self) -> None:
        """Initialize the weights, after those of all layers of the head."""
        super().init_weights()
        self._set_start()

    def forward(self, feat: Tensor) -> Tensor:
        """Project the features.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).

        Returns:
            Tensor: Pixel embeddings with shape (N, D, H, W).
        """
        embedding = self.conv(feat)
        if self.bn is not None:
            return self.bn(embedding)
        if self.norm == 'l2':
            # float32: the sum of squares overflows in half precision.
            return F.normalize(embedding.float(), dim=1)
        return embedding

    def affine(self, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        r"""Get convolution and norm as one affine map.

        With :math:`g = \gamma / \sqrt{\sigma^2 + \epsilon}`:
        :math:`f \mapsto \mathrm{diag}(g) P f + g \odot (p_b - \mu) + \beta`,
        in evaluation mode.

        Args:
            dtype (torch.dtype): What to compute in.

        Returns:
            tuple[Tensor, Tensor]: Weight (D, C) and shift (D, ).

        Raises:
            ValueError: If the norm has no running statistics.
        """
        weight = self.conv.weight.to(dtype).flatten(1)
        shift = weight.new_zeros(len(weight))
        if self.conv.bias is not None:
            shift = self.conv.bias.to(dtype)
        if self.bn is None:
            return weight, shift
        if self.bn.running_var is None:
            raise ValueError(
                'a batch norm without running statistics takes those of each '
                'image, which does not fold: leave `track_running_stats` out '
                "of the text branch's `norm_cfg`.")
        gain = (self.bn.running_var.to(dtype) + self.bn.eps).rsqrt()
        offset = torch.zeros_like(gain)
        if self.bn.affine:
            gain = gain * self.bn.weight.to(dtype)
            offset = self.bn.bias.to(dtype)
        shift = gain * (shift - self.bn.running_mean.to(dtype)) + offset
        return gain[:, None] * weight, shift

    @torch.no_grad()
    def fold(self, rows: Tensor, bias: Optional[Tensor] = None) -> nn.Conv2d:
        r"""Fold the projection and products with vectors into a convolution.

        With the affine map A, a (see :meth:`affine`): :math:`W = V A` and
        :math:`B = V a + b`, in float64, cast once.

        Args:
            rows (Tensor): Vectors V that the embeddings are multiplied with,
                shape (K, D).
            bias (Tensor, optional): Added to the products b, shape (K, ).
                Defaults to None.

        Returns:
            nn.Conv2d: C -> K, 1x1, with the dtype of the projection.
        """
        weight, shift = self.affine(torch.float64)
        rows = rows.double()
        shift = rows @ shift
        if bias is not None:
            shift = shift + bias.double()
        folded = nn.Conv2d(
            self.conv.in_channels,
            len(rows),
            1,
            device=self.conv.weight.device,
            dtype=self.conv.weight.dtype)
        folded.weight.copy_((rows @ weight)[:, :, None, None])
        assert folded.bias is not None
        folded.bias.copy_(shift)
        return folded
