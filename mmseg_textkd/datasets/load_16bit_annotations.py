# Copyright (c) mmseg_textkd contributors. All rights reserved.
import mmcv
import mmengine.fileio as fileio
import numpy as np
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Load16BitAnnotations(LoadAnnotations):
    """Load label maps of more than 256 classes.

    ``LoadAnnotations`` casts labels to 8 bits: 300 becomes 44, and 65535,
    which is ignored in such data, becomes class 255, or class 255 what is
    ignored. Say ``ignore_index=65535`` to whatever looks at the labels, the
    evaluator above all. Label maps are 16-bit TIFF or PNG with the labels 0
    to K - 1, as MaskFormer's and SAN's preparations of ADE20K-847 and PASCAL
    Context-459 write them.

    Required Keys:

    - seg_map_path (optional), seg_fields

    Added Keys:

    - gt_seg_map (np.int32, shape (H, W)), not for an image without
      ``seg_map_path``

    Args:
        **kwargs: As of ``LoadAnnotations``.
    """

    def transform(self, results: dict) -> dict:
        """Load the label map of one sample.

        Args:
            results (dict): Result dict of the pipeline.

        Returns:
            dict: The same dict, with the label map if there is one.

        Raises:
            ValueError: If the label map is in color or of 8 bits, or the
                dataset renumbers labels, which MMSegmentation does with 255.
        """
        # MMSegmentation takes `LoadAnnotations` out of the pipeline for a
        # image of one's own, but does not know this transform.
        if 'seg_map_path' not in results:
            return results
        return super().transform(results)

    def _load_seg_map(self, results: dict) -> None:
        path = results['seg_map_path']
        if (self.reduce_zero_label or results.get('reduce_zero_label')
                or results.get('label_map')):
            raise ValueError(
                'Load16BitAnnotations takes labels as they are: set neither '
                '`reduce_zero_label` nor a part of the classes in the '
                'dataset, and store the labels 0 to K - 1.')
        labels = mmcv.imfrombytes(
            fileio.get(path, backend_args=self.backend_args),
            flag='unchanged',
            backend=self.imdecode_backend).squeeze()
        if (labels.ndim != 2 or labels.dtype.itemsize < 2
                or labels.dtype.kind not in 'iu'):
            raise ValueError(
                f'Label map {path} has shape {labels.shape} and type '
                f'{labels.dtype} instead of one 16-bit number per pixel. Is '
                'it a color image, or were the labels cut to 8 bits?')
        results['gt_seg_map'] = labels.astype(np.int32)
        results['seg_fields'].append('gt_seg_map')
