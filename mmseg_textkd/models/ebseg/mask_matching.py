# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Ground-truth masks of label maps and their matching with queries."""
from typing import NamedTuple, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskTargets(NamedTuple):
    """Masks of one image, one for each class in it.

    Attributes:
        classes (Tensor): Long tensor with shape (G, ).
        masks (Tensor): Float tensor of 0 and 1 with shape (G, P), P being the
            number of pixels that are not ignored.
        valid (Tensor): Bool with shape (H, W), false where ignored.
    """

    classes: Tensor
    masks: Tensor
    valid: Tensor


def mask_targets(labels: Tensor,
                 size: Tuple[int, int],
                 num_classes: int,
                 ignore_index: int = 255) -> MaskTargets:
    """Convert a label map to masks at the size of the predictions.

    Args:
        labels (Tensor): Long tensor with shape (H', W').
        size (tuple[int, int]): Size of the predictions, H and W.
        num_classes (int): Number of classes K.
        ignore_index (int): Label that is left out. Defaults to 255.

    Returns:
        MaskTargets: The masks; none (G = 0) if every pixel is ignored.

    Raises:
        ValueError: If there is another label outside [0, K).
    """
    small = F.interpolate(labels[None, None].float(), size, mode='nearest')
    small = small[0, 0].long()
    valid = small != ignore_index
    pixels = small[valid]
    classes = pixels.unique()
    if len(classes) and not 0 <= int(classes[0]) <= int(
            classes[-1]) < num_classes:
        raise ValueError(
            f'There are labels {classes.tolist()}, but num_classes='
            f'{num_classes} and ignore_index={ignore_index}.')
    masks = (pixels == classes[:, None]).float()
    return MaskTargets(classes, masks, valid)


def pairwise_mask_costs(logits: Tensor,
                        masks: Tensor) -> Tuple[Tensor, Tensor]:
    """Compute the matching costs of all predicted and true masks.

    Args:
        logits (Tensor): Mask logits with shape (Q, P).
        masks (Tensor): True masks, 0 or 1, with shape (G, P).

    Returns:
        tuple[Tensor, Tensor]: Mean binary cross entropy and dice loss, both
        with shape (Q, G).
    """
    masks = masks.to(logits)
    positive, negative = F.softplus(-logits), F.softplus(logits)
    bce = (positive @ masks.T + negative @ (1 - masks).T) / logits.shape[1]
    prob = logits.sigmoid()
    overlap = 2 * prob @ masks.T
    total = prob.sum(dim=1)[:, None] + masks.sum(dim=1)
    return bce, 1 - (overlap + 1) / (total + 1)


@torch.no_grad()
def match_masks(
    class_logits: Tensor,
    mask_logits: Tensor,
    targets: MaskTargets,
    weights: Sequence[float] = (2., 5., 5.)
) -> Tuple[Tensor, Tensor]:
    """Match queries with true masks at the lowest total cost.

    Source: `DETR <https://arxiv.org/abs/2005.12872>`_, section 3.1, with the
    costs of `Mask2Former <https://arxiv.org/abs/2112.01527>`_.

    Args:
        class_logits (Tensor): Logits with shape (Q, K + 1).
        mask_logits (Tensor): Mask logits with shape (Q, P), at the pixels
            that are not ignored.
        targets (MaskTargets): G true masks.
        weights (Sequence[float]): Weights of class probability, binary cross
            entropy and dice. Defaults to (2, 5, 5).

    Returns:
        tuple[Tensor, Tensor]: Numbers of queries and of the masks that they
        are assigned to, long tensors of length min(Q, G).
    """
    device = mask_logits.device
    if not len(targets.classes):
        empty = torch.zeros(0, dtype=torch.long, device=device)
        return empty, empty
    from scipy.optimize import linear_sum_assignment
    bce, dice = pairwise_mask_costs(mask_logits, targets.masks)
    prob = class_logits.softmax(dim=1)[:, targets.classes]
    cost = -weights[0] * prob + weights[1] * bce + weights[2] * dice
    # A run with one bad step shall fail in its loss, not in here.
    cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
    rows, columns = linear_sum_assignment(cost.double().cpu().numpy())
    return (torch.as_tensor(rows, device=device),
            torch.as_tensor(columns, device=device))
