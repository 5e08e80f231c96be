# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Sequence, Union

import torch
import torch.nn.functional as F
from mmseg.models.losses.utils import get_class_weight
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..label_spaces import label_spaces_of, own_logits
from ..layers import LogitScale, pixel_text_similarity


@MODELS.register_module()
class TextAlignmentLoss(nn.Module):
    r"""Cross entropy of pixel-text cosines, which is InfoNCE over classes.

    .. math::
        L = -\frac{1}{\sum_p w_{y_p}} \sum_p w_{y_p} \log
        \frac{\exp(s \cos(e_p, t_{y_p}))}{\sum_k \exp(s \cos(e_p, t_k))}

    over the pixels p that are not ignored. Similarities, softmax and sum are
    computed in float32 whatever the mode of training.

    Source: `DenseCLIP <https://arxiv.org/abs/2112.01518>`_, section 3.2 (the
    pixel-text matching loss), with a learned temperature.

    Args:
        scale (dict, optional): Arguments of :class:`LogitScale`. Defaults to
            None: learned, from 1 / 0.07.
        class_weight (Sequence[float] | str, optional): Weight of each class,
            or a file of them. Defaults to None.
        upsample (bool): Whether to compare at the resolution of the labels,
            with bilinear similarities, instead of the features' own.
            Defaults to False.
        loss_weight (float): Weight of the loss. Defaults to 1.0.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_text_align'.
    """

    def __init__(self,
                 scale: Optional[dict] = None,
                 class_weight: Optional[Union[Sequence[float], str]] = None,
                 upsample: bool = False,
                 loss_weight: float = 1.0,
                 loss_name: str = 'loss_text_align') -> None:
        super().__init__()
        self.scale = LogitScale(**(scale or {}))
        self.class_weight = get_class_weight(class_weight)
        self.full_resolution = upsample
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self,
                embeddings: Tensor,
                text: Tensor,
                labels: Tensor,
                ignore_index: int = 255,
                **kwargs) -> Tensor:
        """Compute the loss.

        Args:
            embeddings (Tensor): Pixel embeddings, shape (N, D, h, w), of any
                length.
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).
            labels (Tensor): Long tensor with shape (N, H, W), of values in
                [0, K) or ``ignore_index``. Where H, W differ from h, w the
                similarities are resized to them.
            ignore_index (int): Label of the pixels that are left out.
                Defaults to 255.
            **kwargs: ``batch_data_samples``, whose label spaces count where
                they are of a :class:`MultiDataset`.

        Returns:
            Tensor: Scalar; 0 with a graph if every pixel is ignored.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            embeddings = F.normalize(embeddings.to(dtype), dim=1)
            text = F.normalize(text.to(dtype), dim=-1)
            logits = self.scale() * pixel_text_similarity(embeddings, text)
            if logits.shape[2:] != labels.shape[1:]:
                logits = resize(
                    logits,
                    size=labels.shape[1:],
                    mode='bilinear',
                    align_corners=False)
            spaces = label_spaces_of(kwargs.get('batch_data_samples') or [])
            if spaces is not None:
                logits = own_logits(logits, spaces)
            return self.loss_weight * self._cross_entropy(
                logits, labels, ignore_index)

    def _cross_entropy(self, logits: Tensor, labels: Tensor,
                       ignore_index: int) -> Tensor:
        class_weight = None
        if self.class_weight is not None:
            class_weight = logits.new_tensor(self.class_weight)
        losses = F.cross_entropy(
            logits,
            labels,
            weight=class_weight,
            ignore_index=ignore_index,
            reduction='none')
        valid = labels != ignore_index
        pixel_weight = valid.to(losses)
        if class_weight is not None:
            pixel_weight = class_weight[labels.where(valid, 0)] * pixel_weight
        # A batch without a valid pixel gives 0, not 0 / 0, and keeps the
        # graph: under DDP each rank must have a gradient.
        tiny = torch.finfo(losses.dtype).tiny
        return losses.sum() / pixel_weight.sum().clamp(min=tiny)
