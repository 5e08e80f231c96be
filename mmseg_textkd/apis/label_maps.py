# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Prediction of label maps for many classes in bounded memory."""
import weakref
from typing import TYPE_CHECKING, List, Optional, Tuple

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_textkd.deploy import BalancedConvSeg, L2ConvSeg
from mmseg_textkd.models.layers.balance import balance_log_probabilities

if TYPE_CHECKING:
    from .adapters import NetworkAdapter

# Values of logits at a time: 128 MiB as float32.
BUDGET = 2**25
# Classes at a time, at the resolution of the features, to sum them up.
BLOCK = 256


class _SelectOutputs(nn.Module):
    """Selected outputs of a classifier whose classes depend on each other.

    Args:
        whole (nn.Module): The classifier.
        rows (Tensor): Long tensor of class indices.
    """

    def __init__(self, whole: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.whole, self.rows = whole, rows

    def forward(self, feat: Tensor) -> Tensor:
        """Compute the logits of the selected classes, shape (N, n, H, W)."""
        return self.whole(feat)[:, self.rows]


class _SelectBalanced(nn.Module):
    """Selected classes of a :class:`BalancedConvSeg`, normalized over all.

    Args:
        whole (BalancedConvSeg): The classifier.
        rows (Tensor): Long tensor of class indices.
    """

    def __init__(self, whole: BalancedConvSeg, rows: Tensor) -> None:
        super().__init__()
        self.whole, self.seen = whole, whole.seen[rows]
        self.both = nn.ModuleList(
            select_classes(conv, rows)
            for conv in (whole.supervised, whole.image))

    def forward(self, feat: Tensor) -> Tensor:
        """Compute the scores of the selected classes, shape (N, n, H, W)."""
        logs = (conv(feat) - total
                for conv, total in zip(self.both, self._totals(feat)))
        return balance_log_probabilities(*logs, self.seen, self.whole.alpha,
                                         self.whole.beta)

    def _totals(self, feat: Tensor) -> List[Tensor]:
        """Log-sum-exp over all classes of both classifiers, (N, 1, H, W) each.

        They are the same for all parts, which share the whole.
        """
        known = self.whole.totals
        if known is not None and known[0]() is feat:
            return known[1]
        convs = self.whole.supervised, self.whole.image
        totals = [feat.new_full((), float('-inf'))] * 2
        for rows in torch.arange(len(self.whole.seen)).split(BLOCK):
            parts = (
                select_classes(conv, rows.to(feat.device))(feat)
                for conv in convs)
            totals = [
                torch.logaddexp(total, part.logsumexp(dim=1, keepdim=True))
                for total, part in zip(totals, parts)
            ]
        self.whole.totals = weakref.ref(feat), totals
        return totals


def select_classes(conv_seg: nn.Module, rows: Tensor) -> nn.Module:
    """Build a classifier of some of the classes.

    Args:
        conv_seg (nn.Module): A convolution, a :class:`L2ConvSeg` or a
            :class:`BalancedConvSeg`.
        rows (Tensor): Long tensor of n class indices, which may repeat.

    Returns:
        nn.Module: A classifier of n classes; what does not depend on the
        class is shared with the first.
    """
    if isinstance(conv_seg, BalancedConvSeg):
        return _SelectBalanced(conv_seg, rows)
    if isinstance(conv_seg, L2ConvSeg):
        if not isinstance(conv_seg.regularization, nn.Identity):
            # Its blocks mix the labels.
            return _SelectOutputs(conv_seg, rows)
        length, product = conv_seg.length, conv_seg.product
        chosen = L2ConvSeg(product.in_channels, len(rows), length.out_channels)
        chosen.length, chosen.product = length, select_classes(product, rows)
        chosen.logit_bias = nn.Parameter(conv_seg.logit_bias.detach()[rows])
        return chosen
    chosen = nn.Conv2d(
        conv_seg.in_channels, len(rows), 1, bias=conv_seg.bias is not None)
    for name, value in conv_seg.named_parameters():
        setattr(chosen, name, nn.Parameter(value.detach()[rows]))
    return chosen


@torch.no_grad()
def predict_labels(adapter: 'NetworkAdapter',
                   inputs: Tensor,
                   data_samples: List[SegDataSample],
                   threshold: Optional[float] = None,
                   other: Optional[int] = None,
                   budget: int = BUDGET) -> List[SegDataSample]:
    """Predict label maps, some classes at a time.

    It is what the model's ``predict`` gives, but logits of all classes at full
    resolution, 80 GB for 10,000 classes of an image of 1024x2048, are never
    there at once. The network runs once, unless it slides over the image.

    Args:
        adapter (NetworkAdapter): That of the network.
        inputs (Tensor): Preprocessed images with shape (N, 3, H, W).
        data_samples (list[SegDataSample]): Their N samples.
        threshold (float, optional): Pixels whose most probable class has a
            lower probability, in the softmax over all classes or, where
            there are no logits, by its score, get the label ``other``. Of a
            binary network the probability from which on a pixel is of the
            class. Defaults to None: the head's own.
        other (int, optional): That label. Defaults to None.
        budget (int): Number of logits at a time. Some three times as much is
            allocated for them. Defaults to 2 ** 25.

    Returns:
        list[SegDataSample]: The samples with ``pred_sem_seg``, int64, and no
        logits.
    """
    model = adapter.model
    metas = [s.metainfo for s in data_samples]
    if adapter.binary:
        return _predict_binary(model, inputs, data_samples, threshold)
    # What a threshold on a softmax needs besides the largest logit.
    sum_up = threshold is not None and adapter.logits
    pixels = max(
        len(inputs) * h * w
        for h, w in (inputs.shape[2:], *(s.ori_shape for s in data_samples)))
    blocks = torch.arange(model.out_channels).split(max(2, budget // pixels))
    best: List = [None] * len(inputs)
    features = None
    for rows in blocks:
        # One logit alone would be taken for a binary problem.
        padded = rows if len(rows) > 1 else rows.repeat(2)
        layer = adapter.select(padded.to(inputs.device))
        with adapter.replaced(layer, len(padded)) as head:
            if features is not None:
                logits = head.predict_by_feat(layer(*features), metas)
            elif len(blocks) == 1:
                logits = model.inference(inputs, metas)
            else:
                logits, features = _first_logits(model, layer, inputs, metas)
            done = model.postprocess_result(logits, data_samples)
        for i, sample in enumerate(done):
            values = sample.seg_logits.data[:len(rows)]
            top, label = values.max(dim=0)
            total = values.logsumexp(dim=0) if sum_up else None
            label += rows[0]
            if best[i] is not None:
                # Of equal ones the first, as argmax does.
                better = top > best[i][0]
                label = label.where(better, best[i][1])
                top = top.where(better, best[i][0])
                total = torch.logaddexp(best[i][2], total) if sum_up else None
            best[i] = top, label, total
            del sample.seg_logits
    for sample, (top, label, total) in zip(data_samples, best):
        if threshold is not None:
            sure = (top - total).exp() if sum_up else top
            label = label.masked_fill(sure < threshold, other)
        sample.pred_sem_seg = PixelData(data=label[None])
    return data_samples


def _predict_binary(model: nn.Module, inputs: Tensor,
                    data_samples: List[SegDataSample],
                    threshold: Optional[float]) -> List[SegDataSample]:
    """Predict labels 0 and 1 as the model does, by a threshold."""
    head = model.decode_head
    own = head.threshold
    try:
        head.threshold = own if threshold is None else threshold
        logits = model.inference(inputs, [s.metainfo for s in data_samples])
        done = model.postprocess_result(logits, data_samples)
    finally:
        head.threshold = own
    for sample in done:
        sample.pred_sem_seg = PixelData(data=sample.pred_sem_seg.data.long())
        del sample.seg_logits
    return done


def _first_logits(model: nn.Module, layer: nn.Module, inputs: Tensor,
                  metas: List[dict]) -> Tuple[Tensor, Optional[tuple]]:
    """Run the network, and return the features if they suit all classes.

    Args:
        model (nn.Module): The model.
        layer (nn.Module): The layer of its head that classifies.
        inputs (Tensor): Preprocessed images.
        metas (list[dict]): Their meta information.

    Returns:
        tuple[Tensor, tuple | None]: Logits at input size; what the layer
        took, where it is called once and only resizing follows.
    """
    calls: List[Tuple[tuple, Tensor]] = []
    handle = layer.register_forward_hook(
        lambda module, args, output: calls.append((args, output)))
    try:
        logits = model.inference(inputs, metas)
    finally:
        handle.remove()
    if len(calls) == 1 and model.test_cfg.mode == 'whole':
        (features, maps), = calls
        resized = model.decode_head.predict_by_feat(maps, metas)
        if torch.equal(resized, logits):
            return logits, features
    return logits, None
