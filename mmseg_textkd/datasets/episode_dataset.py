# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Optional, Sequence

from mmseg.datasets import BaseSegDataset


class EpisodeDataset(BaseSegDataset):
    """Base of few-shot datasets, with one class for each image.

    An episode is to segment one class in one image (the "query"); all else
    is the other. The episodes are those that `HSNet
    <https://arxiv.org/abs/2104.01538>`_ tests on, so that figures can be
    compared; its support images are not loaded, for text takes their place.

    Each sample has a ``class_id``, and says which value of the label map is
    the class (``foreground``; None: values from 128 on) and which one is
    ignored (``ignored``; None: none); see :class:`EpisodeLabels`. The
    classes are those of all folds, behind 'others', so that class k of the
    literature has text row k + 1.

    Args:
        class_ids (Sequence[int]): Classes, by their number in the literature,
            that the mean IoU is taken over.
        **kwargs: Arguments of ``BaseSegDataset``.
    """

    def __init__(self, class_ids: Sequence[int], **kwargs: Any) -> None:
        self.class_ids = list(class_ids)
        super().__init__(**kwargs)
        self._metainfo['class_ids'] = self.class_ids

    def episode(self,
                img_path: str,
                seg_map_path: str,
                class_id: int,
                foreground: Optional[int] = None,
                ignored: Optional[int] = None) -> dict:
        """Make the data info of one episode.

        Args:
            img_path (str): Path of the image.
            seg_map_path (str): Path of its label map.
            class_id (int): The class.
            foreground (int, optional): Its label. Defaults to None.
            ignored (int, optional): Label that is not scored. Defaults to
                None.

        Returns:
            dict: Sample information.
        """
        return dict(
            img_path=img_path,
            seg_map_path=seg_map_path,
            class_id=int(class_id),
            foreground=foreground,
            ignored=ignored,
            label_map=None,
            reduce_zero_label=False,
            seg_fields=[])


def check_fold(fold: int) -> int:
    """Require a fold of 0, 1, 2 or 3.

    Args:
        fold (int): The fold.

    Returns:
        int: The same.

    Raises:
        ValueError: If it is another one.
    """
    if fold not in (0, 1, 2, 3):
        raise ValueError(f'`fold` must be 0, 1, 2 or 3, but got {fold!r}.')
    return fold
