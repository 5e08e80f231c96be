# Copyright (c) mmseg_textkd contributors. All rights reserved.
import warnings
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers import LogitScale, class_masks, text_of_batch

TARGETS = ('raw', 'centered', 'standardized')
OLD_TARGETS = dict(centred='centered', standardised='standardized')


@MODELS.register_module()
class SemanticStructureLoss(nn.Module):
    r"""Match similarities of class prototypes to those of the class names.

    .. math::
        L = \frac{1}{|P|} \sum_{(a, b) \in P}
        (s \cos(p_a, p_b) - \mathrm{sim}(t_a, t_b))^2

    The prototype :math:`p_k` is the mean of all pixel embeddings of the batch
    that are labeled k, and P holds the pairs of classes that are present.
    Everything is computed in float32 whatever the mode of training. The text
    is the target: it gets no gradient.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_, the loss of semantic
    structure consistency, there on the embeddings of matched masks, of one
    image, with the diagonal and raw cosines of the text.

    Args:
        target (str): What of the text is compared. 'raw': its cosines.
            'centered': the cosines of the class embeddings less their mean
            over all classes. Raw cosines of CLIP lie between 0.7 and 0.95,
            which embeddings behind a batch norm, whose mean is zero, cannot
            reach. 'standardized': raw cosines, but both matrices are brought
            to mean 0 and deviation 1 over the pairs; the loss is then
            :math:`2 (1 - r)` of Pearson's r and needs three classes.
            Defaults to 'centered'.
        off_diagonal (bool): Whether to leave out the pairs of a class with
            itself. Defaults to True.
        scale (dict, optional): Arguments of :class:`LogitScale`, the factor s
            on the cosines of the prototypes. Defaults to None: 1.
        min_pixels (int): Pixels, at the resolution of the embeddings, from
            which on a class is present. Defaults to 10.
        gather (bool): Whether prototypes are means over the pixels of all
            ranks. Defaults to False.
        momentum (float, optional): Remember the prototypes of earlier batches
            (of all ranks), as moving averages with this momentum: a class
            that is present is also compared with all that have been.
            Defaults to None: only pairs of the batch.
        shape (tuple[int, int], optional): Number of classes K and width D of
            the embeddings; ``momentum`` needs them. Defaults to None.
        loss_weight (float): Weight of the loss. Defaults to 1.0.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_structure'.

    Raises:
        ValueError: If an argument is out of range or does not fit another.
    """

    memory: Optional[Tensor]

    # No gradient goes to the text: prompts learn nothing by it.
    trains_text = False

    def __init__(self,
                 target: str = 'centered',
                 off_diagonal: bool = True,
                 scale: Optional[dict] = None,
                 min_pixels: int = 10,
                 gather: bool = False,
                 momentum: Optional[float] = None,
                 shape: Optional[Tuple[int, int]] = None,
                 loss_weight: float = 1.0,
                 loss_name: str = 'loss_structure') -> None:
        super().__init__()
        if target in OLD_TARGETS:
            warnings.warn(f'target={target!r} is deprecated: call it '
                          f'{OLD_TARGETS[target]!r}.')
            target = OLD_TARGETS[target]
        if target not in TARGETS:
            raise ValueError(
                f'`target` must be one of {TARGETS}, but got {target!r}.')
        if target == 'standardized' and scale is not None:
            raise ValueError("target='standardized' takes any factor away "
                             'again; leave `scale` out.')
        if min_pixels < 1:
            raise ValueError(
                f'`min_pixels` must be at least 1, but got {min_pixels}.')
        if (momentum is None) != (shape is None):
            raise ValueError('`momentum` needs `shape`, the number of classes '
                             'and the width of the embeddings, and only it; '
                             f'got momentum={momentum}, shape={shape}.')
        if momentum is not None and not 0 <= momentum < 1:
            raise ValueError(
                f'`momentum` must lie in [0, 1), but got {momentum}.')
        self.target = target
        self.off_diagonal = off_diagonal
        self.scale = None if scale is None else LogitScale(**scale)
        self.min_pixels = min_pixels
        self.gather = gather or momentum is not None
        self.momentum = momentum
        # Unit rows; zero for a class that has not been seen.
        self.register_buffer('memory',
                             None if shape is None else torch.zeros(shape))
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
            text (Tensor): Class embeddings, shape (K, D), (N, K, D) or
                (1, R, K, D).
            labels (Tensor): Long tensor with shape (N, H, W), of values in
                [0, K) or ``ignore_index``. Where H, W differ from h, w the
                nearest labels are taken.
            ignore_index (int): Label of the pixels that are left out.
                Defaults to 255.

        Returns:
            Tensor: Scalar; 0 with a graph if fewer than two classes are
            present.
        """
        if labels.shape[1:] != embeddings.shape[2:]:
            labels = F.interpolate(
                labels[:, None].float(),
                size=embeddings.shape[2:],
                mode='nearest')[:, 0].long()
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            text = self._text(text.detach().to(dtype))
            prototypes, present = self._prototypes(
                embeddings.to(dtype), labels, len(text), ignore_index)
            known, prototypes = self._remember(prototypes, present)
            # At least one of a pair must be present, or nothing learns.
            pairs = known[:, None] & known & (present[:, None] | present)
            pairs = pairs & (known.sum() > 1)
            if self.off_diagonal:
                pairs.fill_diagonal_(False)
            return self.loss_weight * self._compare(prototypes, text, pairs)

    def _text(self, text: Tensor) -> Tensor:
        """Get one class embedding for each class of the batch."""
        if text.dim() == 3 and self.gather and get_world_size() > 1:
            # Each rank has drawn text for its own images.
            text = F.normalize(text, dim=2).sum(dim=0)
            all_reduce(text)
        return text_of_batch(text)

    def _prototypes(self, embeddings: Tensor, labels: Tensor, num_classes: int,
                    ignore_index: int) -> Tuple[Tensor, Tensor]:
        """Compute unit prototypes (K, D) and the present classes (K, )."""
        masks = class_masks(labels, num_classes, ignore_index)
        masks = masks.flatten(0, 1).to(embeddings)  # (P, K)
        counts = masks.count_nonzero(dim=0)
        sums = masks.T @ embeddings.permute(0, 2, 3, 1).flatten(0, 2)
        if self.gather and get_world_size() > 1:
            all_reduce(counts)
            total = sums.detach().clone()
            all_reduce(total)
            # The values are those of all ranks, the gradient goes to the own
            # pixels. DDP divides it by the number of ranks.
            sums = sums * get_world_size()
            sums = sums + (total - sums).detach()
        # The direction of the sum is that of the mean.
        return F.normalize(sums, dim=1), counts >= self.min_pixels

    def _remember(self, prototypes: Tensor,
                  present: Tensor) -> Tuple[Tensor, Tensor]:
        """Fill absent classes from the memory, and update it."""
        if self.memory is None or self.momentum is None:
            return present, prototypes
        if self.memory.shape != prototypes.shape:
            raise ValueError(
                f'`shape` is {tuple(self.memory.shape)}, but there are '
                '(classes, width) = '
                f'{tuple(prototypes.shape)}. Set `shape` to that.')
        memory = self.memory.to(prototypes)
        seen = memory.any(dim=1)
        filled = prototypes.where(present[:, None], memory)
        if self.training:
            with torch.no_grad():
                mixed = F.normalize(
                    torch.lerp(prototypes, memory, self.momentum), dim=1)
                mixed = mixed.where(seen[:, None], prototypes)
                self.memory.copy_(mixed.where(present[:, None], memory))
        return present | seen, filled

    def _compare(self, prototypes: Tensor, text: Tensor,
                 pairs: Tensor) -> Tensor:
        """Compute the loss over the pairs."""
        if self.target == 'centered':
            text = F.normalize(text - text.mean(dim=0), dim=1)
        ours, theirs = prototypes @ prototypes.T, text @ text.T
        if self.scale is not None:
            ours = self.scale() * ours
        if self.target == 'standardized':
            ours, theirs = (standardize(m, pairs) for m in (ours, theirs))
        return structure_loss(ours, theirs, pairs)


def structure_loss(similarities_a: Tensor, similarities_b: Tensor,
                   pairs: Tensor) -> Tensor:
    """Mean squared difference of two similarity matrices.

    Args:
        similarities_a (Tensor): Float tensor with shape (P, P).
        similarities_b (Tensor): Float tensor with shape (P, P).
        pairs (Tensor): Bool tensor with shape (P, P), the pairs to compare.

    Returns:
        Tensor: Scalar; 0 with a graph if there is no pair.
    """
    squares = (similarities_a - similarities_b).square()
    return squares.where(pairs, 0).sum() / pairs.sum().clamp(min=1)


def standardize(matrix: Tensor, pairs: Tensor) -> Tensor:
    """Standardize the selected entries of a matrix to mean 0 and deviation 1.

    Args:
        matrix (Tensor): Float tensor with shape (P, P).
        pairs (Tensor): Bool tensor with shape (P, P), the selected pairs.

    Returns:
        Tensor: The matrix, shape (P, P). Of one pair there is no deviation;
        it becomes 0.
    """
    number = pairs.sum().clamp(min=1)
    matrix = matrix - matrix.where(pairs, 0).sum() / number
    variance = matrix.square().where(pairs, 0).sum() / number
    # Of one pair there is no deviation; its difference to the mean is 0.
    return matrix * (variance + 1e-8).rsqrt()
