# Copyright (c) mmseg_textkd contributors. All rights reserved.
import io

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine import fileio
from mmseg.registry import TRANSFORMS
from PIL import Image


@TRANSFORMS.register_module()
class EpisodeLabels(BaseTransform):
    """Convert the label map of an episode to 1 for its class and 0 else.

    Put it behind ``Resize`` and ``LoadAnnotations``. As in few-shot work it
    is scored at the size of the network's input: the label map is brought to
    that by nearest neighbors, and predictions are not resized to the size of
    the image.

    Required Keys:

    - gt_seg_map
    - img_shape
    - class_id, foreground, ignored (see :class:`EpisodeDataset`)

    Modified Keys:

    - gt_seg_map
    - ori_shape

    Args:
        ignore_index (int): Label of what is not scored. Defaults to 255.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Convert the label map of one episode.

        Args:
            results (dict): Result dict of the pipeline.

        Returns:
            dict: The same dict.
        """
        labels, value = results['gt_seg_map'], results['foreground']
        if value is None:  # a mask, stored as gray, colors or a palette
            data = io.BytesIO(fileio.get(results['seg_map_path']))
            labels = np.array(Image.open(data).convert('L'))
        mine = labels >= 128 if value is None else labels == value
        mine = mine.astype(np.uint8)
        if results['ignored'] is not None:
            mine[labels == results['ignored']] = self.ignore_index
        mine = F.interpolate(
            torch.from_numpy(mine)[None, None].float(),
            size=results['img_shape'][:2],
            mode='nearest')
        results['gt_seg_map'] = mine[0, 0].byte().numpy()
        results['ori_shape'] = results['img_shape'][:2]
        return results

    def __repr__(self) -> str:
        return (f'{self.__class__.__name__}('
                f'ignore_index={self.ignore_index})')
