# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Initialization of a text classifier from a trained stock classifier."""
from typing import Any, Iterable, Iterator, NamedTuple, Tuple

import torch
import torch.nn.functional as F
from mmseg.models import BaseSegmentor
from torch import Tensor

from .decode_heads.text_head_mixin import TextHeadMixin
from .layers import TextClassifier
from .record_calls import record_calls


class StockComparison(NamedTuple):
    """Difference between a text classifier and a stock one, over all pixels.

    Attributes:
        max_difference (float): Largest difference of two logits.
        mean_difference (float): Mean absolute difference of the logits.
        max_logit (float): Largest absolute logit of the stock classifier.
        agreement (float): Share of the pixels with the same class, in [0, 1].
        pixels (int): Number of pixels, at the resolution of the features.
    """
    max_difference: float
    mean_difference: float
    max_logit: float
    agreement: float
    pixels: int


@torch.no_grad()
def init_from_stock(classifier: TextClassifier,
                    weight: Tensor,
                    bias: Tensor,
                    features: Iterable[Tensor] = ()) -> float:
    r"""Initialize a text classifier to predict as a stock classifier.

    The projection is the least-squares solution of least norm,
    :math:`P = T^+ W / s`, with the pseudo-inverse :math:`T^+` of the class
    embeddings and the scale s, in float64. It is exact where the rows of T
    are linearly independent, for then :math:`T T^+ = I`. With the mean
    :math:`\mu` and variance :math:`\sigma^2` of :math:`P f` over all pixels
    of ``features``, :math:`\gamma = \sqrt{\sigma^2 + \epsilon}` and
    :math:`\beta = \mu` undo the batch norm: in evaluation mode for any
    statistics, in training mode as far as those of a batch are like them.
    The biases are taken over; without biases,
    :math:`T^+ b / s` is added to :math:`\beta`.

    Args:
        classifier (TextClassifier): Changed in place; its text stays.
        weight (Tensor): Stock weight W with shape (K, C, 1, 1).
        bias (Tensor): Stock bias b with shape (K, ).
        features (Iterable[Tensor], optional): Inputs of the classifier
            in training, each with shape (N, C, H, W). Needed with
            ``norm='bn'``, else not used. Defaults to ().

    Returns:
        float: The relative residual of the least squares,
        :math:`\|s T P - W\| / \|W\|`: 0 up to rounding if the text can
        express the stock classifier, else the part of it that it cannot.

    Raises:
        ValueError: If the classifier cannot be initialized so, the shapes
            differ, something is not finite, or features are needed and there
            are none. The classifier is then as it was.
    """
    projection = classifier.projection
    conv, bn = projection.conv, projection.bn
    if projection.norm == 'l2':
        raise ValueError(
            "norm='l2' divides each pixel by its own length, so that it "
            "cannot start from a stock classifier, which is affine; use "
            "norm='bn', role='auxiliary', or plain `load_from`, which leaves "
            'the text classifier random.')
    if not projection.learned:
        raise ValueError(
            'without a projection (project=False) there is nothing that could '
            'be set so that it predicts as a stock classifier.')
    if bn is not None and not (bn.affine and bn.track_running_stats):
        raise ValueError(
            'a batch norm without weight and bias, or without running '
            'statistics, cannot be undone; leave `affine` and '
            "`track_running_stats` out of the text branch's `norm_cfg`.")
    expected = (classifier.text.num_classes, conv.in_channels, 1, 1)
    if tuple(weight.shape) != expected or bias.shape != weight.shape[:1]:
        raise ValueError(
            'the stock classifier has a weight of shape '
            f'{tuple(weight.shape)} and a bias of shape {tuple(bias.shape)}, '
            f'but the text classifier needs {expected} and {expected[:1]}.')

    text = classifier.scale().double() * classifier.text().double()
    target, bias = weight.to(text).flatten(1), bias.to(text)
    if classifier.logit_bias is None:
        target = torch.cat([target, bias[:, None]], dim=1)
    # Directions below the precision of float32 are dropped: equal rows.
    limit = max(text.shape) * torch.finfo(torch.float32).eps
    solution = torch.linalg.pinv(text, rtol=limit) @ target
    residual = (text @ solution - target).norm() / target.norm()
    kernel = solution[:, :conv.in_channels, None, None].to(conv.weight)
    shift = solution[:, conv.in_channels:].sum(dim=1)
    mean = var = torch.zeros_like(shift)
    if bn is not None:
        mean, var = _moments(F.conv2d(f, kernel) for f in features)
    if not all(v.isfinite().all() for v in (solution, bias, mean, var)):
        raise ValueError('NaN or infinity in the weights of the stock '
                         'classifier or in its features.')

    conv.weight.copy_(kernel)
    if classifier.logit_bias is not None:
        classifier.logit_bias.copy_(bias)
    if bn is None:
        assert conv.bias is not None
        conv.bias.copy_(shift)
    else:
        bn.running_mean.copy_(mean)
        bn.running_var.copy_(var)
        bn.weight.copy_((var + bn.eps).sqrt())
        bn.bias.copy_(mean + shift)
    return residual.item()


@torch.no_grad()
def compare_with_stock(classifier: TextClassifier, weight: Tensor,
                       bias: Tensor,
                       features: Iterable[Tensor]) -> StockComparison:
    """Measure the difference between a text classifier and a stock one.

    Args:
        classifier (TextClassifier): In training mode the batch norm takes the
            statistics of each batch, and its running ones move.
        weight (Tensor): Stock weight with shape (K, C, 1, 1).
        bias (Tensor): Stock bias with shape (K, ).
        features (Iterable[Tensor]): Inputs of both, each with shape
            (N, C, H, W).

    Returns:
        StockComparison: The comparison.

    Raises:
        ValueError: If there are no features.
    """
    largest, total, max_logit, equal, pixels = 0., 0., 0., 0, 0
    for feat in features:
        stock = F.conv2d(feat, weight.to(feat), bias.to(feat))
        ours = classifier(feat)
        difference = (ours - stock).abs()
        largest = max(largest, difference.max().item())
        total += difference.double().mean(dim=1).sum().item()
        max_logit = max(max_logit, stock.abs().max().item())
        equal += (ours.argmax(dim=1) == stock.argmax(dim=1)).sum().item()
        pixels += stock[:, 0].numel()
    if not pixels:
        raise ValueError('there are no images to compare on.')
    return StockComparison(largest, total / pixels, max_logit, equal / pixels,
                           pixels)


def head_features(model: BaseSegmentor, head: TextHeadMixin,
                  batches: Iterable[dict], padded: bool) -> Iterator[Tensor]:
    """Compute the inputs of the main classifier of a head.

    Args:
        model (BaseSegmentor): The segmentor, in training or evaluation mode.
        head (TextHeadMixin): One of its decode or auxiliary heads.
        batches (Iterable[dict]): Batches of a data loader.
        padded (bool): Whether images are padded as in training.

    Yields:
        Tensor: Features of one batch with shape (N, C, H, W), no gradient.
    """
    others = []
    if model.with_auxiliary_head:
        others = list(model.auxiliary_head.modules())
    for batch in batches:
        inputs = model.data_preprocessor(batch, padded)['inputs']
        with torch.no_grad(), record_calls(head.conv_seg) as calls:
            if any(head is other for other in others):
                head(model.extract_feat(inputs))
            else:
                model(inputs)
        yield from (feat for feat, _ in calls)


def _moments(batches: Iterable[Tensor]) -> Tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over all pixels, in float64.

    Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
    1983: batches are merged exactly, none counts more for coming last.
    """
    count = 0
    mean: Any = 0.
    var: Any = 0.
    for batch in batches:
        values = batch.double().transpose(0, 1).flatten(1)
        own_var, own_mean = torch.var_mean(values, dim=1, correction=0)
        share = values.shape[1] / (count + values.shape[1])
        step = own_mean - mean
        mean = mean + share * step
        var = (1 - share) * (var + share * step**2) + share * own_var
        count += values.shape[1]
    if not count:
        raise ValueError("norm='bn' needs features to take statistics of, "
                         'but there are none.')
    return mean, var
