# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, List, Sequence

import numpy as np
import torch
from mmengine.logging import MMLogger, print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor


@METRICS.register_module()
class ZeroShotIoUMetric(IoUMetric):
    r"""IoU of the seen and of the unseen classes.

    All classes compete at every pixel ("generalized" zero-shot). Beside what
    ``IoUMetric`` gives, in percent:

    - ``mIoU_seen``, ``mIoU_unseen``: means over the classes of each kind;
      a class that is neither in the labels nor in the predictions has no IoU
      and does not count, as in ``mIoU``;
    - ``hIoU``: their harmonic mean :math:`2su / (s + u)`;
    - ``FB-IoU``: mean of foreground and background IoU, where each image
      counts once for every unseen class that is in its labels, this class as
      foreground and all the others as background, and the areas are added up
      before they are divided. It is that of the few-shot literature, for one
      prediction of all classes instead of one per class.

    Source: hIoU: Xian et al., `Semantic Projection Network for Zero- and
    Few-Label Semantic Segmentation`, CVPR 2019; FB-IoU: Rakelly et al.,
    `Conditional Networks for Few-Shot Semantic Segmentation`, ICLRW 2018, as
    `HSNet <https://arxiv.org/abs/2104.01538>`_ computes it.

    Args:
        unseen (Sequence[str]): Names of the classes that had no labels in
            training; all others are seen.
        iou_metrics (list[str]): As for ``IoUMetric``; 'mIoU' must be there.
            Defaults to ['mIoU'].
        **kwargs: Other arguments of ``IoUMetric``.

    Raises:
        ValueError: If no class is unseen, one is named twice, or 'mIoU' is
            not among the metrics.
    """

    def __init__(self,
                 unseen: Sequence[str],
                 iou_metrics: Sequence[str] = ('mIoU', ),
                 **kwargs) -> None:
        if isinstance(unseen, str) or not unseen:
            raise ValueError('`unseen` must be a list of class names with at '
                             f'least one, but got {unseen!r}.')
        if len(set(unseen)) != len(unseen):
            raise ValueError(f'`unseen` names a class twice: {list(unseen)}.')
        if isinstance(iou_metrics, str):
            iou_metrics = [iou_metrics]
        if 'mIoU' not in iou_metrics:
            raise ValueError("`iou_metrics` must contain 'mIoU', but got "
                             f'{list(iou_metrics)}.')
        super().__init__(iou_metrics=list(iou_metrics), **kwargs)
        self.unseen = tuple(unseen)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the areas of a batch.

        Args:
            data_batch (dict): A batch of the data loader.
            data_samples (Sequence[dict]): Outputs of the model.

        Raises:
            ValueError: If the dataset does not have the unseen classes, or no
                others.
        """
        self._is_unseen()  # at the first batch, not after the last
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> Dict[str, float]:
        """Compute the metrics of all images.

        Args:
            results (list): Areas of each image: intersection, union,
                prediction and label, each with shape (K, ).

        Returns:
            dict[str, float]: Metrics by name, in percent.
        """
        metrics = super().compute_metrics(results)
        if self.format_only:
            return metrics
        areas = [torch.stack(column).double() for column in zip(*results)]
        totals = [area.sum(dim=0) for area in areas]
        iou = self.total_area_to_metrics(*totals, ['mIoU'],
                                         self.nan_to_num)['IoU']
        unseen = self._is_unseen()
        of_unseen = _nanmean(iou[unseen])
        of_seen = _nanmean(iou[~unseen])
        both = of_seen + of_unseen
        own = dict(
            mIoU_seen=of_seen,
            mIoU_unseen=of_unseen,
            # Not 0 / 0; NaN stays NaN.
            hIoU=0. if both == 0 else 2 * of_seen * of_unseen / both)
        own['FB-IoU'] = self._fb_iou(areas, torch.from_numpy(unseen))
        own = {k: np.round(v * 100, 2) for k, v in own.items()}
        print_log(
            f'unseen classes: {", ".join(self.unseen)}; ' +
            ', '.join(f'{k}: {v:.2f}' for k, v in own.items()),
            logger=MMLogger.get_current_instance())
        return dict(metrics, **own)

    def _is_unseen(self) -> np.ndarray:
        """Get the mask of unseen classes, bool with shape (K, )."""
        classes = list(self.dataset_meta['classes'])
        unknown = [name for name in self.unseen if name not in classes]
        if unknown:
            raise ValueError(
                f'ZeroShotIoUMetric: the dataset has no classes {unknown}; '
                f'correct `unseen` of the evaluator. It has {classes}.')
        if len(self.unseen) == len(classes):
            raise ValueError('ZeroShotIoUMetric: all classes of the dataset '
                             'are unseen; some must be seen.')
        return np.array([name in self.unseen for name in classes])

    @staticmethod
    def _fb_iou(areas: List[Tensor], unseen: Tensor) -> float:
        """Compute the mean IoU of foreground and background.

        Args:
            areas (list[Tensor]): Intersection, union, prediction and label,
                each with shape (images, K).
            unseen (Tensor): Bool tensor with shape (K, ).

        Returns:
            float: In [0, 1]; NaN if no unseen class is in the labels.
        """
        intersect, union, _, label = areas
        pixels = label.sum(dim=1, keepdim=True)
        counts = unseen & (label > 0)
        foreground = (intersect[counts].sum() / union[counts].sum())
        # Background is what neither has, or, for the union, not both have.
        background = ((pixels - union)[counts].sum() /
                      (pixels - intersect)[counts].sum())
        return ((foreground + background) / 2).item()


def _nanmean(values: np.ndarray) -> float:
    """Mean without NaN; NaN, without a warning, of no values."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float('nan')
