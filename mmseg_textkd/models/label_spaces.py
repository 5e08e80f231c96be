# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Logits of all words as logits of the classes of an image's data set."""
from contextlib import contextmanager
from typing import Any, Iterator, Optional, Sequence

import torch
from mmseg.models.decode_heads import STDCHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .layers.text_classifier import UNSEEN_LOGIT


def label_spaces_of(samples: Sequence[SegDataSample]) -> Optional[Tensor]:
    """Get the label spaces of a batch.

    Args:
        samples (Sequence[:obj:`SegDataSample`]): N samples.

    Returns:
        Tensor, optional: Long tensor with shape (N, K): for each of the K
        words the index of the word that it counts as, -1 for none. None if
        the samples are of no :class:`MultiDataset`.

    Raises:
        ValueError: If some samples have a label space and others have none.
    """
    found = [sample.metainfo.get('label_space') for sample in samples]
    if all(space is None for space in found):
        return None
    if any(space is None for space in found):
        raise ValueError('some images of a batch are of a MultiDataset, '
                         'others are not.')
    return torch.tensor(found)


def own_logits(logits: Tensor, spaces: Tensor) -> Tensor:
    r"""Compute the logits of the classes of each image's own data set.

    .. math::
        z'_c = \log \sum_{w:\, s_w = c} e^{z_w}

    for the words w that count as c in the label space s of the image. A
    softmax over them is one over the words of that data set alone, in which
    the probability of a class is the sum of those of its words.

    Args:
        logits (Tensor): Logits of K words, shape (N, K, H, W).
        spaces (Tensor): As of :func:`label_spaces_of`, shape (N, K).

    Returns:
        Tensor: float32 or wider, shape (N, K, H, W); words that are no class
        have a probability of 0 and no gradient.
    """
    spaces = spaces.to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    itself = spaces == torch.arange(spaces.shape[1], device=logits.device)
    own = logits.masked_fill(~itself[:, :, None, None], UNSEEN_LOGIT)
    for space in _wide(spaces, itself).unique(dim=0):
        images = (spaces == space).all(dim=1).nonzero().flatten()
        for word in space[space >= 0].unique():
            words = (space == word).nonzero().flatten()
            if len(words) > 1:
                of_words = logits[images][:, words]
                own = own.index_put((images, word.expand(len(images))),
                                    of_words.logsumexp(dim=1))
    return own


def _wide(spaces: Tensor, itself: Tensor) -> Tensor:
    """The label spaces in which a word counts as another one."""
    return spaces[((spaces >= 0) & ~itself).any(dim=1)]


def refuse_label_spaces(model: nn.Module,
                        samples: Sequence[SegDataSample]) -> None:
    """Refuse images of a :class:`MultiDataset` where each would be compared
    with the words of all data sets.

    Args:
        model (nn.Module): The segmentor.
        samples (Sequence[:obj:`SegDataSample`]): The samples of the batch.

    Raises:
        ValueError: If the samples have label spaces.
    """
    if label_spaces_of(samples) is not None:
        raise ValueError(
            f'{type(model).__name__} would train each image of a MultiDataset '
            'against the words of all data sets. Use '
            "type='MultiDatasetEncoderDecoder' with a text head, or one data "
            'set.')


@contextmanager
def own_label_spaces(model: nn.Module,
                     samples: Sequence[SegDataSample]) -> Iterator[None]:
    """Let all decode heads of a model compute losses in the own label spaces.

    Every head with K classes, stock or with text, decode or auxiliary, gets
    the logits of :func:`own_logits` in its ``loss_by_feat``: what it does
    there (losses, sampler, accuracy) is as if there were no other words.

    Args:
        model (nn.Module): The segmentor.
        samples (Sequence[:obj:`SegDataSample`]): The samples of the batch. If
            they are of no :class:`MultiDataset`, nothing changes.

    Yields:
        None: Until the losses are computed.

    Raises:
        ValueError: If a head has another number of classes.
    """
    spaces = label_spaces_of(samples)
    if spaces is None:
        yield
        return
    heads = {
        name: head
        for name, head in model.named_modules()
        # Others predict boundaries.
        if isinstance(head, BaseDecodeHead) and not isinstance(head, STDCHead)
        and head.num_classes > min(2, spaces.shape[1] - 1)
    }
    for name, head in heads.items():
        if head.num_classes != spaces.shape[1]:
            raise ValueError(
                f'{name} has num_classes={head.num_classes}, but the data '
                f'sets have {spaces.shape[1]} words together. Set '
                '`num_classes` of all heads to that number.')
    for head in heads.values():
        # On the instance, in front of the method of its class.
        head.loss_by_feat = _OwnLossByFeat(head, spaces)
    try:
        yield
    finally:
        for head in heads.values():
            del head.loss_by_feat


class _OwnLossByFeat:
    """``loss_by_feat`` of a head that is given logits of the own classes."""

    def __init__(self, head: BaseDecodeHead, spaces: Tensor) -> None:
        self.function, self.spaces = head.loss_by_feat, spaces
        self.align_corners = head.align_corners
        itself = spaces == torch.arange(spaces.shape[1])
        self.sums = len(_wide(spaces, itself)) > 0

    def __call__(self, seg_logits: Any, batch_data_samples: Any) -> Any:
        size = batch_data_samples[0].gt_sem_seg.shape[-2:]
        return self.function(self._own(seg_logits, size), batch_data_samples)

    def _own(self, logits: Any, size: Sequence[int]) -> Any:
        if isinstance(logits, (list, tuple)):
            return type(logits)(self._own(part, size) for part in logits)
        if logits.dim() != 4 or logits.shape[1] != self.spaces.shape[1]:
            return logits  # boundaries
        if self.sums:
            # As at inference, where probabilities are those of the resized
            # logits; without sums the order makes no difference.
            logits = resize(
                logits,
                size=size,
                mode='bilinear',
                align_corners=self.align_corners)
        return own_logits(logits, self.spaces)
