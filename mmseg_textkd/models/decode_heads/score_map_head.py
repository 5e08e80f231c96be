# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import List

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class ScoreMapHead(BaseDecodeHead):
    r"""Auxiliary head of the alignment loss on a score map.

    Its logits are the scores divided by the temperature. They are resized to
    the labels and compared with them by the losses and the sampler of any
    decode head.

    Source: `Lin et al. <https://doi.org/10.1561/116.20240015>`_.

    Args:
        num_classes (int): Number of classes K.
        temperature (float): What the scores are divided by. Defaults to 0.07.
        **kwargs: As of ``BaseDecodeHead``.

    Raises:
        ValueError: If the temperature is not positive.
    """

    def __init__(self,
                 num_classes: int,
                 temperature: float = 0.07,
                 **kwargs) -> None:
        if not temperature > 0:
            raise ValueError('`temperature` must be positive, but got '
                             f'{temperature}.')
        kwargs = dict(
            dict(
                in_channels=num_classes,
                channels=num_classes,
                dropout_ratio=0,
                init_cfg=None,
                align_corners=False), **kwargs)
        super().__init__(num_classes=num_classes, **kwargs)
        del self.conv_seg
        self.temperature = temperature

    def forward(self, inputs: List[Tensor]) -> Tensor:
        """Turn scores into logits.

        Args:
            inputs (list[Tensor]): Feature maps, of which ``in_index`` is the
                score map with shape (N, K, H, W).

        Returns:
            Tensor: Logits with the same shape.
        """
        return self._transform_inputs(inputs) / self.temperature
