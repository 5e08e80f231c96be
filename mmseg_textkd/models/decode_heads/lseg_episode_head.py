# Copyright (c) mmseg_textkd contributors. All rights reserved.
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Union

import torch
from mmseg.registry import MODELS
from torch import Tensor

from .lseg_dpt_head import LSegDPTHead


@MODELS.register_module()
class LSegEpisodeHead(LSegDPTHead):
    """Head of LSeg for few-shot episodes, with one class for each image.

    The text has a row for 'others' and one for each class; which one is asked
    for is the ``class_id`` of an image (:class:`EpisodeDataset`), k for row
    k + 1. The weights are those of :class:`LSegDPTHead`.

    Args:
        text_branch (dict): Arguments of :class:`LSegTextClassifier`.
        num_classes (int): Of an image, always 2; the ``num_classes`` of
            ``text`` is the number of its rows. Defaults to 2.
        **kwargs: Other arguments of :class:`LSegDPTHead`.

    Raises:
        ValueError: If ``num_classes`` is not 2, or with text losses, a fusion
            or phrases, which know no episodes.
    """

    def __init__(self,
                 *,
                 text_branch: Optional[dict] = None,
                 num_classes: int = 2,
                 **kwargs: Any) -> None:
        if num_classes != 2:
            raise ValueError('an image of an episode has 2 classes, but got '
                             f'num_classes={num_classes}.')
        branch = dict(text_branch or {}, type='LSegTextClassifier')
        super().__init__(text_branch=branch, num_classes=2, **kwargs)
        if self._has_extra or self.text_branch.text.phrase_bank is not None:
            raise ValueError(
                'LSegEpisodeHead takes no `text_losses`, no `fusion` and no '
                'SynonymSampler: they would compare the two classes of an '
                'image with the text of all.')

    def loss(self, inputs: Union[Tensor, Sequence[Tensor]],
             *args) -> Dict[str, Tensor]:
        """Compute the losses of a batch of episodes.

        Args:
            inputs (Tensor | Sequence[Tensor]): Features of the backbone.
            *args: The data samples, a list of :obj:`SegDataSample` with
                ``class_id`` and labels 0 and 1; the training config.

        Returns:
            dict[str, Tensor]: Losses by name.
        """
        metas = [sample.metainfo for sample in args[0]]
        with self._episode(metas):
            return super().loss(inputs, *args)

    def predict(self, inputs: Sequence[Tensor], batch_img_metas: List[dict],
                test_cfg: dict) -> Tensor:
        """Predict a batch of episodes.

        Args:
            inputs (Sequence[Tensor]): Features of the backbone.
            batch_img_metas (list[dict]): Information on each image, with its
                ``class_id``.
            test_cfg (dict): The test config.

        Returns:
            Tensor: Logits of others and class with shape (N, 2, H, W).
        """
        with self._episode(batch_img_metas):
            return super().predict(inputs, batch_img_metas, test_cfg)

    @contextmanager
    def _episode(self, metas: List[dict]) -> Iterator[None]:
        """Set the classes of a batch of images.

        Raises:
            KeyError: If an image has no class.
            ValueError: If the text has no row for it.
        """
        try:
            classes = [int(meta['class_id']) for meta in metas]
        except KeyError:
            raise KeyError(
                'LSegEpisodeHead needs the `class_id` of each image: have it '
                "packed, PackSegInputs(meta_keys=(..., 'class_id'))."
            ) from None
        rows = self.text_branch.text.num_classes
        if not all(0 <= k < rows - 1 for k in classes):
            raise ValueError(f'the text has the others and {rows - 1} classes,'
                             f' but the images have {classes}.')
        self.text_branch.episode = torch.tensor(classes)
        try:
            yield
        finally:
            self.text_branch.episode = None
