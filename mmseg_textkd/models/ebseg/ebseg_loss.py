# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmseg.registry import MODELS
from torch import Tensor, nn

from .mask_matching import MaskTargets, mask_targets, match_masks

Matches = List[Tuple[Tensor, Tensor]]


class LayerPrediction(NamedTuple):
    """Predictions of one decoder layer.

    Attributes:
        logits (Tensor): Class logits by embedding A, shape (N, Q, K + 1).
        attention (Tensor): Class logits by embedding B, same shape.
        masks (Tensor): Mask logits with shape (N, Q, H, W).
    """

    logits: Tensor
    attention: Tensor
    masks: Tensor


@MODELS.register_module()
class EBSegLoss(nn.Module):
    """Losses of EBSeg on matched queries.

    On every decoder layer: cross entropies of the classes by embeddings A and
    B, binary cross entropy and dice of the matched masks. On the last layer
    also the semantic structure consistency of embedding A. Masks are compared
    at the size of the predictions, at all pixels that are not ignored.
    Everything is in float32 or wider.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_ and its configs;
    `Mask2Former <https://arxiv.org/abs/2112.01527>`_ for matching and masks.

    Args:
        class_weight (float): Weight of the cross entropies, of A and of B
            each. Defaults to 1.5, EBSeg's 2 x 0.75.
        mask_weight (float): Weight of the binary cross entropy. Defaults to
            5.
        dice_weight (float): Weight of dice. Defaults to 5.
        ssc_weight (float): Weight of the structure loss. Defaults to 10.
        no_object_weight (float): Weight of "no object" among the classes.
            Defaults to 0.1.
        match_weights (Sequence[float]): Weights of class, binary cross
            entropy and dice in the matching. Defaults to (2, 5, 5).
    """

    def __init__(
        self,
        class_weight: float = 1.5,
        mask_weight: float = 5.,
        dice_weight: float = 5.,
        ssc_weight: float = 10.,
        no_object_weight: float = 0.1,
        match_weights: Sequence[float] = (2., 5., 5.)
    ) -> None:
        super().__init__()
        self.class_weight, self.no_object_weight = (class_weight,
                                                    no_object_weight)
        self.mask_weight, self.dice_weight = mask_weight, dice_weight
        self.ssc_weight = ssc_weight
        self.match_weights = tuple(match_weights)

    def forward(self,
                layers: Sequence[LayerPrediction],
                embeddings: Tensor,
                text: Tensor,
                labels: Tensor,
                ignore_index: int = 255) -> Dict[str, Tensor]:
        """Compute the losses.

        Args:
            layers (Sequence[LayerPrediction]): Predictions of all layers.
            embeddings (Tensor): Embeddings A of the last layer with their
                length, shape (N, Q, D).
            text (Tensor): Class embeddings with shape (K, D).
            labels (Tensor): Long tensor with shape (N, H', W').
            ignore_index (int): Label that is left out. Defaults to 255.

        Returns:
            dict[str, Tensor]: Losses by name; those of all layers but the
            last have a prefix ``d0.``, ``d1.``, ...

        Raises:
            ValueError: If there is a label outside [0, K).
        """
        size = layers[0].masks.shape[2], layers[0].masks.shape[3]
        targets = [
            mask_targets(label, size, len(text), ignore_index)
            for label in labels
        ]
        # Of all processes, or one with few masks would weigh them more.
        count = labels.new_tensor(
            sum(len(t.classes) for t in targets), dtype=torch.float)
        all_reduce(count, op='mean')
        count = count.clamp(min=1)
        losses: Dict[str, Tensor] = {}
        with torch.autocast(labels.device.type, enabled=False):
            for i, layer in enumerate(layers):
                prefix = f'd{i}.' if i < len(layers) - 1 else ''
                logits, attention, masks = (_float(x) for x in layer)
                matches = self._match(logits, masks, targets)
                own = self._mask_losses(masks, targets, matches, count)
                own['loss_cls'] = self._class_loss(logits, targets, matches)
                own['loss_cls_attention'] = self._class_loss(
                    attention, targets, matches)
                losses.update({prefix + k: v for k, v in own.items()})
            losses['loss_ssc'] = self.ssc_weight * mask_structure_loss(
                [e[rows] for e, (rows, _) in zip(embeddings, matches)], [
                    text[t.classes[columns]]
                    for t, (_, columns) in zip(targets, matches)
                ])
        return losses

    def _match(self, logits: Tensor, masks: Tensor,
               targets: List[MaskTargets]) -> Matches:
        """Match the queries of each image."""
        return [
            match_masks(logits[n], masks[n][:, t.valid], t, self.match_weights)
            for n, t in enumerate(targets)
        ]

    def _class_loss(self, logits: Tensor, targets: List[MaskTargets],
                    matches: Matches) -> Tensor:
        """Cross entropy, with "no object" as target of unmatched queries."""
        num_classes = logits.shape[2] - 1
        wanted = torch.full(
            logits.shape[:2], num_classes, device=logits.device)
        for row, target, (rows, columns) in zip(wanted, targets, matches):
            row[rows] = target.classes[columns]
        weight = logits.new_ones(num_classes + 1)
        weight[-1] = self.no_object_weight
        return self.class_weight * F.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), weight)

    def _mask_losses(self, masks: Tensor, targets: List[MaskTargets],
                     matches: Matches, count: Tensor) -> Dict[str, Tensor]:
        """Binary cross entropy and dice, mean over the true masks."""
        # An empty sum with a graph, for batches without any mask.
        bce = dice = masks[:0].sum()
        for mask, target, (rows, columns) in zip(masks, targets, matches):
            if not len(rows):
                continue
            logits = mask[rows][:, target.valid]
            wanted = target.masks[columns].to(logits)
            bce = bce + F.binary_cross_entropy_with_logits(
                logits, wanted, reduction='none').mean(dim=1).sum()
            prob = logits.sigmoid()
            overlap = 2 * (prob * wanted).sum(dim=1) + 1
            total = prob.sum(dim=1) + wanted.sum(dim=1) + 1
            dice = dice + (1 - overlap / total).sum()
        return dict(
            loss_mask=self.mask_weight * bce / count,
            loss_dice=self.dice_weight * dice / count)


def _float(x: Tensor) -> Tensor:
    """Convert to float32, or keep a wider type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mask_structure_loss(embeddings: Sequence[Tensor],
                        texts: Sequence[Tensor]) -> Tensor:
    r"""Semantic structure consistency over the masks of each image.

    .. math::
        L = \frac{1}{N} \sum_n \frac{1}{G_n^2} \sum_{i,j}
        (\langle e_i, e_j \rangle - \cos(t_i, t_j))^2

    over the :math:`G_n` masks of image n. The embeddings keep their length,
    so the diagonal draws it to 1. An image without masks counts as 0. In
    float32 or wider.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_, the SSC loss.

    Args:
        embeddings (Sequence[Tensor]): For each of N images the embeddings of
            the matched queries, shape (G, D).
        texts (Sequence[Tensor]): For each image the text embeddings of their
            true classes, shape (G, D).

    Returns:
        Tensor: Scalar; 0 with a graph if no image has a mask.
    """
    total: Any = 0.
    for own, text in zip(embeddings, texts):
        dtype = torch.promote_types(own.dtype, torch.float32)
        with torch.autocast(own.device.type, enabled=False):
            own, text = own.to(dtype), F.normalize(text.to(dtype), dim=1)
            error = (own @ own.T - text @ text.T)**2
            # Without masks the sum is an empty one: 0, with a graph.
            total = total + error.sum() / max(len(own), 1)**2
    return total / len(embeddings)
