# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..text_providers import build_text
from .similarity import pixel_text_similarity

NORMS = ('l2', 'rms')
INITS = ('zero', 'kaiming')
KEPT_AS_IT_IS = (
    "a score map with norm='l2' divides each pixel by its own length and does "
    'not fold into a convolution. Deploy it as it is: the text is a constant, '
    'CLIP is not needed (with the plugin, or as a graph without it: '
    "tools/deployment/deploy.py); or train with score_map=dict(norm='rms'"
    '), which folds where convolutions read the feature itself.')


class ScoreMap(BaseModule):
    r"""Score map of the similarities of pixel features and class text.

    .. math::
        s_k = \left\langle \frac{P f}{\lVert P f \rVert}, t_k \right\rangle

    Convolutions of the network read it beside their own input. Such a
    convolution over the concatenation of its input and the score map is the
    sum of the stock convolution and one over the K scores, which is the form
    it has here: every weight of the stock network keeps its name and shape.

    Source: `Lin et al. <https://doi.org/10.1561/116.20240015>`_, whose score
    map is a cosine (``norm='l2'``) without a projection.

    Args:
        in_channels (int): Channels C of the feature.
        num_classes (int): Number of classes K.
        text (dict): Config of the :class:`TextProvider`.
        convs (dict[str, nn.Conv2d]): The stock convolutions that read the
            score map, by their name in the network.
        projection (bool): Whether a 1x1 convolution P without bias brings
            the feature to the width D of the text. Without one D must be C.
            Defaults to False.
        norm (str): 'l2' divides each pixel by its length, as published.
            'rms' divides all pixels by one number, the root mean square of
            their lengths (in evaluation mode its running average): the score
            map is then linear in the feature and folds into the convolutions
            that read the same feature. Defaults to 'l2'.
        init (str): Weights on the scores at the start: 'zero', with which
            the network starts as the stock network that it is; 'kaiming',
            as published. Defaults to 'zero'.

    Raises:
        TypeError: If ``text`` is no config of a text provider.
        ValueError: If the widths do not fit, a convolution has groups, or
            ``norm`` or ``init`` is unknown.
    """

    def __init__(self,
                 in_channels: int,
                 num_classes: int,
                 text: dict,
                 convs: Dict[str, nn.Conv2d],
                 projection: bool = False,
                 norm: str = 'l2',
                 init: str = 'zero') -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(
                f'`norm` must be one of {NORMS}, but got {norm!r}.')
        if init not in INITS:
            raise ValueError(
                f'`init` must be one of {INITS}, but got {init!r}.')
        self.text = build_text(text, num_classes=num_classes)
        if not projection and self.text.dim != in_channels:
            raise ValueError(
                f'the text embeddings have width {self.text.dim}, but the '
                f'feature has {in_channels} channels. Use text of that width '
                '(CLIP RN50 has 1024), or set projection=True in '
                '`score_map`.')
        self.in_channels = in_channels
        self.projection = None
        if projection:
            self.projection = nn.Conv2d(
                in_channels, self.text.dim, 1, bias=False)
        self.norm = norm
        if norm == 'rms':
            self.register_buffer('length', torch.ones(()))
        # Whether it stays, as a frozen norm does; set by PromptLearnerHook.
        self.length_fixed = False
        self.convs = nn.ModuleDict({
            name.replace('.', '/'):
            self._make_conv(name, conv)
            for name, conv in convs.items()
        })
        self.init = init
        self._set_start()

    def _set_start(self) -> None:
        """Initialize the weights on the scores."""
        for weight in self.convs.parameters():
            if self.init == 'zero':
                nn.init.zeros_(weight)
            else:
                # As ConvModule: fan_out does not depend on the input
                # channels, so that this is also the init of the widened
                # convolution.
                nn.init.kaiming_normal_(
                    weight, mode='fan_out', nonlinearity='relu')

    def init_weights(self) -> None:
        """Initialize the weights, after those of all layers of the network."""
        super().init_weights()
        if self.init == 'zero':
            self._set_start()

    def _make_conv(self, name: str, conv: nn.Conv2d) -> nn.Conv2d:
        """Build the part of a convolution that reads the score map."""
        if conv.groups != 1 or conv.padding_mode != 'zeros':
            raise ValueError(
                f'{name} cannot read the score map: it has {conv.groups} '
                f'groups and padding_mode={conv.padding_mode!r}. Name an '
                'ordinary convolution.')
        shape: Dict[str, Any] = dict(
            kernel_size=conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation)
        return nn.Conv2d(
            self.text.num_classes, conv.out_channels, **shape, bias=False)

    def forward(self, feat: Tensor) -> Tensor:
        """Compute the score map.

        Args:
            feat (Tensor): Feature with shape (N, C, H, W).

        Returns:
            Tensor: Scores, float32 or wider, with shape (N, K, H, W); with
            ``norm='l2'`` in [-1, 1].

        Raises:
            ValueError: If the feature has other channels.
        """
        if feat.shape[1] != self.in_channels:
            raise ValueError(
                f'the feature of the score map has {feat.shape[1]} channels, '
                f'but in_channels={self.in_channels}. Set `in_channels` of '
                '`score_map` to the channels of the module that `feature` '
                'names, or name another module.')
        text = self.text(feat.shape[0])
        # Under AMP too: half precision does not resolve class names whose
        # cosines differ in the third digit.
        with torch.autocast(feat.device.type, enabled=False):
            dtype = torch.promote_types(feat.dtype, torch.float32)
            feat = feat.to(dtype)
            if self.projection is not None:
                feat = F.conv2d(feat, self.projection.weight.to(dtype))
            if self.norm == 'l2':
                feat = F.normalize(feat, dim=1)
            else:
                feat = feat / self._length(feat)
            return pixel_text_similarity(feat, text.to(dtype))

    def _length(self, feat: Tensor) -> Tensor:
        """Compute the root mean square of the lengths of pixel features."""
        if not self.training or self.length_fixed:
            return self.length.to(feat)
        length = feat.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
        with torch.no_grad():
            self.length.lerp_(length.to(self.length), 0.1)
        return length

    def read(self, name: str, scores: Tensor) -> Tensor:
        """Compute the output of a convolution for the score map.

        Args:
            name (str): Name of the stock convolution in the network.
            scores (Tensor): Score map with shape (N, K, H, W), of the size
                of the convolution's own input.

        Returns:
            Tensor: To add to the output of the stock convolution.
        """
        return self.convs[name.replace('.', '/')](scores)

    @torch.no_grad()
    def fold(self, name: str, weight: Tensor) -> Tensor:
        r"""Fold the score map into a convolution on the same feature.

        With the linear map :math:`M = T P / r` of ``norm='rms'`` and the
        weights V on the scores: :math:`W_{oc} + \sum_k V_{ok} M_{kc}` at
        each position of the kernel, in float64, cast once.

        Args:
            name (str): Name of the stock convolution in the network.
            weight (Tensor): Its weight with shape (O, C, h, w).

        Returns:
            Tensor: Weight of the same shape and dtype.

        Raises:
            ValueError: With ``norm='l2'``, which is not linear.
        """
        if self.norm != 'rms':
            raise ValueError(KEPT_AS_IT_IS)
        linear = self.text().double() / self.length.double()
        if self.projection is not None:
            linear = linear @ self.projection.weight.double().flatten(1)
        own = self.convs[name.replace('.', '/')].weight.double()
        folded = weight.double() + torch.einsum('okhw,kc->ochw', own, linear)
        return folded.to(weight.dtype)
