# Copyright (c) mmseg_textkd contributors. All rights reserved.
import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """Check label maps after loading and name the file of a bad one.

    Without it a label beyond the classes ends in a CUDA assertion that names
    no file (while training) or is silently left out of the scores (while
    testing: the metric's histogram drops it), and a label map of another size
    than its image shifts every pixel.

    Put it directly behind ``LoadAnnotations``. Behind ``Resize`` it is right
    too, where MMSegmentation's test pipelines load the label map in the
    original size. Where no label map has been loaded, for an image of one's
    own, nothing is checked.

    Required Keys:

    - gt_seg_map, img, ori_shape, seg_map_path, img_path (optional)

    Args:
        num_classes (int): Number of classes K; labels 0 to K - 1 are good.
        ignore_index (int): Label that is good besides. Defaults to 255.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(
                f'num_classes must be positive, but got {num_classes}')
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Check the label map of one sample.

        Args:
            results (dict): Result dict of the pipeline.

        Returns:
            dict: The same dict, unchanged.

        Raises:
            ValueError: If the label map is no H×W array of the image's size
                or holds labels beyond the classes.
        """
        if 'gt_seg_map' not in results:
            # `inference_model` takes `LoadAnnotations` out of the pipeline.
            return results
        seg_map = results['gt_seg_map']
        where = f'Label map {results.get("seg_map_path", "of a sample")}'
        if seg_map.ndim != 2:
            raise ValueError(
                f'{where} has shape {seg_map.shape} instead of one label per '
                'pixel (H, W). Is it a color image of the labels?')
        self._check_size(seg_map, results, where)

        bad = (seg_map < 0) | (seg_map >= self.num_classes)
        bad &= seg_map != self.ignore_index
        if bad.any():
            values = np.unique(seg_map[bad]).tolist()
            raise ValueError(
                f'{where} holds labels beyond the {self.num_classes} classes: '
                f'{values[:10]}{" ..." if len(values) > 10 else ""} in '
                f'{int(bad.sum())} of {bad.size} pixels; allowed are 0 to '
                f'{self.num_classes - 1} and {self.ignore_index} (ignored)')
        return results

    @staticmethod
    def _check_size(seg_map: np.ndarray, results: dict, where: str) -> None:
        """Compare the size with that of the loaded or the current image."""
        sizes = []
        if 'ori_shape' in results:
            sizes.append(tuple(results['ori_shape'][:2]))
        if 'img' in results:
            sizes.append(tuple(results['img'].shape[:2]))
        if sizes and seg_map.shape not in sizes:
            raise ValueError(
                f'{where} is {seg_map.shape[1]}x{seg_map.shape[0]} but its '
                f'image {results.get("img_path", "")} is {sizes[0][1]}x'
                f'{sizes[0][0]} (width x height)')

    def __repr__(self) -> str:
        return (f'{self.__class__.__name__}(num_classes={self.num_classes}, '
                f'ignore_index={self.ignore_index})')
