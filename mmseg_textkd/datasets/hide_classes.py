# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class HideClasses(BaseTransform):
    """Set the labels of some classes to the ignored label.

    For zero-shot protocols: the images stay as they are, but nothing says
    where the hidden classes are. Put it directly behind ``LoadAnnotations``
    (which renumbers labels) in the training pipeline, in front of all that
    looks at labels, such as ``RandomCrop`` with ``cat_max_ratio``.

    Required Keys:

    - gt_seg_map

    Modified Keys:

    - gt_seg_map

    Args:
        classes (Sequence[int]): Indices of the classes, as in the labels.
        ignore_index (int): Label that they get. Defaults to 255.

    Raises:
        ValueError: If a class is no index of its own, or there is none.
    """

    def __init__(self,
                 classes: Sequence[int],
                 ignore_index: int = 255) -> None:
        odd = [k for k in classes if not isinstance(k, int) or k < 0]
        if odd or not classes or ignore_index in classes:
            raise ValueError(
                '`classes` of HideClasses must be indices of classes, at '
                f'least one and not {ignore_index}, but got {list(classes)}.')
        self.classes = tuple(classes)
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Set the labels of the classes in one label map.

        Args:
            results (dict): Result dict of the pipeline.

        Returns:
            dict: The same dict, with a new label map.
        """
        labels = results['gt_seg_map']
        hidden = np.isin(labels, self.classes)
        results['gt_seg_map'] = np.where(hidden,
                                         labels.dtype.type(self.ignore_index),
                                         labels)
        return results

    def __repr__(self) -> str:
        return (f'{self.__class__.__name__}(classes={self.classes}, '
                f'ignore_index={self.ignore_index})')
