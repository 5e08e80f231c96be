# Copyright (c) mmseg_textkd contributors. All rights reserved.
import math
from typing import Dict, Sequence

import numpy as np
import torch
from mmengine.dist import get_world_size
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

SUMMARY = ('mIoU', 'mAcc', 'aAcc')


@METRICS.register_module()
class ConfusionIoUMetric(IoUMetric):
    """``IoUMetric`` that also returns confusions and metrics of each class.

    ``result`` has no confusions where several processes tested: each has
    those of its own images, some of them twice.
    """
    confusion = 0

    def evaluate(self, size: int) -> Dict[str, float]:
        """Evaluate, and begin anew in each process."""
        metrics = super().evaluate(size)
        self.confusion = 0
        return metrics

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the areas and the confusions of a batch."""
        super().process(data_batch, data_samples)
        if self.format_only:
            return
        number = len(self.dataset_meta['classes'])
        for sample in data_samples:
            predicted = sample['pred_sem_seg']['data'].squeeze().cpu().long()
            truth = sample['gt_sem_seg']['data'].squeeze().cpu().long()
            valid = (truth != self.ignore_index) & (truth < number)
            index = number * truth[valid] + predicted[valid]
            self.confusion = self.confusion + torch.bincount(
                index, minlength=number**2).view(number, number)

    def compute_metrics(self, results: list) -> Dict[str, float]:
        """Compute the metrics of each class, in percent, and their means."""
        if self.format_only:
            return super().compute_metrics(results)
        areas = [sum(column) for column in zip(*results)]
        by_class = self.total_area_to_metrics(*areas, self.metrics,
                                              self.nan_to_num, self.beta)
        metrics = super().compute_metrics(results)
        self.result = dict(
            images=len(results),
            classes=list(self.dataset_meta['classes']),
            # Rounded as it rounds them; a class that is nowhere has none.
            IoU=[
                None if math.isnan(v) else round(v, 2)
                for v in np.round(by_class['IoU'] * 100, 2).tolist()
            ],
            confusion=None
            if get_world_size() > 1 else self.confusion.tolist(),
            **{key: round(float(metrics[key]), 2)
               for key in SUMMARY})
        return metrics
