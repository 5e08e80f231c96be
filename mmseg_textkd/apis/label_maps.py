# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Label maps for any number of classes, in bounded memory."""
import weakref
from typing import List, NamedTuple, Optional, Tuple

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_textkd.deploy import BalancedConvSeg, L2ConvSeg
from mmseg_textkd.models.layers.balance import balance_logarithms
from .open_classifier import OpenClassifier

# Values of logits at a time: 128 MiB as float32.
BUDGET = 2**25
# Classes at a time, at the resolution of the features, to sum them up.
BLOCK = 256


class _Best(NamedTuple):
    """What is known of a picture after some of the classes.

    Attributes:
        label (Tensor): Class of the largest logit so far, shape (H, W).
        logit (Tensor): That logit.
        total (Tensor, optional): Logarithm of the sum of the exponentials of
            all.
    """
    label: Tensor
    logit: Tensor
    total: Optional[Tensor]


class _SomeOfAll(nn.Module):
    """Some classes of a classifier that cannot do without the others.

    Args:
        whole (nn.Module): The classifier.
        rows (Tensor): Long tensor of the numbers of the classes.
    """

    def __init__(self, whole: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.whole, self.rows = whole, rows

    def forward(self, feat: Tensor) -> Tensor:
        """Classify, and take the classes; shape (N, n, H, W)."""
        return self.whole(feat)[:, self.rows]


class _SomeBalanced(nn.Module):
    """Some classes of a :class:`BalancedConvSeg`, as they are among all.

    Args:
        whole (BalancedConvSeg): The classifier.
        rows (Tensor): Long tensor of the numbers of the classes.
    """

    def __init__(self, whole: BalancedConvSeg, rows: Tensor) -> None:
        super().__init__()
        self.whole, self.seen = whole, whole.seen[rows]
        self.both = nn.ModuleList(
            select_classes(conv, rows)
            for conv in (whole.supervised, whole.image))

    def forward(self, feat: Tensor) -> Tensor:
        """Score the classes; shape (N, n, H, W)."""
        logs = (conv(feat) - total
                for conv, total in zip(self.both, self._totals(feat)))
        return balance_logarithms(*logs, self.seen, self.whole.alpha,
                                  self.whole.beta)

    def _totals(self, feat: Tensor) -> List[Tensor]:
        """Logarithms of the sums over all classes, twice (N, 1, H, W).

        They are the same for all parts, which share the whole.
        """
        known = self.whole.totals
        if known is not None and known[0]() is feat:
            return known[1]
        convs = self.whole.supervised, self.whole.image
        totals = [feat.new_full((), float('-inf'))] * 2
        for rows in torch.arange(len(self.whole.seen)).split(BLOCK):
            rows = rows.to(feat.device)
            totals = [
                torch.logaddexp(
                    total,
                    select_classes(conv,
                                   rows)(feat).logsumexp(dim=1, keepdim=True))
                for total, conv in zip(totals, convs)
            ]
        self.whole.totals = weakref.ref(feat), totals
        return totals


def select_classes(conv_seg: nn.Module, rows: Tensor) -> nn.Module:
    """Take some of the classes of a classifier.

    Args:
        conv_seg (nn.Module): A convolution, a :class:`L2ConvSeg` or a
            :class:`BalancedConvSeg`.
        rows (Tensor): Long tensor of n class numbers, which may repeat.

    Returns:
        nn.Module: A classifier of n classes; what does not depend on the
        class is shared with the first.
    """
    if isinstance(conv_seg, BalancedConvSeg):
        return _SomeBalanced(conv_seg, rows)
    if isinstance(conv_seg, L2ConvSeg):
        if not isinstance(conv_seg.regularization, nn.Identity):
            # Its blocks mix the labels.
            return _SomeOfAll(conv_seg, rows)
        length, product = conv_seg.length, conv_seg.product
        chosen = L2ConvSeg(product.in_channels, len(rows), length.out_channels)
        chosen.length, chosen.product = length, select_classes(product, rows)
        chosen.logit_bias = nn.Parameter(conv_seg.logit_bias.detach()[rows])
        return chosen
    weight, bias = conv_seg.weight.detach(), conv_seg.bias
    chosen = nn.Conv2d(
        conv_seg.in_channels, len(rows), 1, bias=bias is not None)
    chosen.weight = nn.Parameter(weight[rows])
    if bias is not None:
        chosen.bias = nn.Parameter(bias.detach()[rows])
    return chosen


@torch.no_grad()
def predict_labels(classifier: OpenClassifier,
                   inputs: Tensor,
                   data_samples: List[SegDataSample],
                   threshold: Optional[float] = None,
                   other: Optional[int] = None,
                   budget: int = BUDGET) -> List[SegDataSample]:
    """Predict the label map, a part of the classes after the other.

    It is what the model's ``predict`` gives, but logits of all classes at full
    resolution, 80 GB for 10,000 classes of a picture of 1024x2048, are never
    there at once. The network runs once, unless it slides over the picture.

    Args:
        classifier (OpenClassifier): That of the network.
        inputs (Tensor): Preprocessed pictures with shape (N, 3, H, W).
        data_samples (list[SegDataSample]): Their N samples.
        threshold (float, optional): Pixels whose most probable class has a
            lower probability, in the softmax over all classes or, where
            there are no logits, by its score, get the label ``other``.
            Defaults to None.
        other (int, optional): That label. Defaults to None.
        budget (int): Number of logits at a time. Some three times as much is
            allocated for them. Defaults to 2 ** 25.

    Returns:
        list[SegDataSample]: The samples with ``pred_sem_seg``, int64, and no
        logits.
    """
    model, device = classifier.model, inputs.device
    num_classes = model.out_channels
    # What a threshold on a softmax needs besides the largest logit.
    sum_up = threshold is not None and classifier.logits
    best: List[Optional[_Best]] = [None] * len(inputs)
    pixels = max(
        len(inputs) * h * w
        for h, w in (inputs.shape[2:], *(s.ori_shape for s in data_samples)))
    kept: List[Tuple[tuple, Tensor]] = []
    for rows in torch.arange(num_classes).split(max(2, budget // pixels)):
        # One logit alone would be taken for a binary problem.
        padded = rows if len(rows) > 1 else rows.repeat(2)
        layer = classifier.select(padded.to(device))
        with classifier.replaced(layer, len(padded)) as head:
            logits = _logits(model, head, layer, inputs, data_samples, kept,
                             len(rows) < num_classes)
            done = model.postprocess_result(logits, data_samples)
        for i, sample in enumerate(done):
            values = sample.seg_logits.data[:len(rows)]
            best[i] = _merge(best[i], values, int(rows[0]), sum_up)
            del sample.seg_logits
    for sample, found in zip(data_samples, best):
        label = found.label
        if threshold is not None:
            sure = found.logit
            if sum_up:
                sure = (found.logit - found.total).exp()
            label = label.masked_fill(sure < threshold, other)
        sample.pred_sem_seg = PixelData(data=label[None])
    return data_samples


def _logits(model: nn.Module, head: nn.Module, layer: nn.Module,
            inputs: Tensor, samples: List[SegDataSample],
            kept: List[Tuple[tuple, Tensor]], again: bool) -> Tensor:
    """Logits of the classes of the present layer, at input size.

    Args:
        model (nn.Module): The model.
        head (nn.Module): Its head.
        layer (nn.Module): The layer of the head that gives them.
        inputs (Tensor): Its input.
        samples (list[SegDataSample]): Their samples.
        kept (list): What the layer took and gave in the first run; empty
            before, and if it cannot be used again.
        again (bool): Whether more classes follow.
    """
    metas = [s.metainfo for s in samples]
    if kept:
        return head.predict_by_feat(layer(*kept[0][0]), metas)
    handle = layer.register_forward_hook(
        lambda module, args, output: kept.append((args, output)))
    try:
        logits = model.inference(inputs, metas)
    finally:
        handle.remove()
    # The features serve all classes where they are classified once, and
    # nothing but the resizing comes after.
    usable = again and len(kept) == 1 and model.test_cfg.mode == 'whole'
    if not (usable
            and torch.equal(head.predict_by_feat(kept[0][1], metas), logits)):
        kept.clear()
    return logits


def _merge(best: Optional[_Best], logits: Tensor, first: int,
           sum_up: bool) -> _Best:
    """Take further classes into account.

    Args:
        best (_Best, optional): What was found before.
        logits (Tensor): Logits of further classes, shape (n, H, W).
        first (int): Number of the first of them.
        sum_up (bool): Whether ``total`` is needed.
    """
    top, label = logits.max(dim=0)
    total = logits.logsumexp(dim=0) if sum_up else None
    if best is None:
        return _Best(label + first, top, total)
    # Of equal ones the first, as argmax does.
    better = top > best.logit
    return _Best(
        torch.where(better, label + first, best.label),
        torch.where(better, top, best.logit),
        torch.logaddexp(best.total, total) if sum_up else None)
