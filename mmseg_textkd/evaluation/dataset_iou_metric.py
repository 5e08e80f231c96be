# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict, Mapping, Optional, Sequence

import torch
from mmseg.registry import METRICS

from ..models.label_spaces import own_logits
from .confusion_iou_metric import ConfusionIoUMetric


@METRICS.register_module()
class DatasetIoUMetric(ConfusionIoUMetric):
    """IoU of one data set of several, among its own classes.

    One for each data set of a :class:`MultiDataset` scores them all in one
    validation. Pixels get that class of the own data set whose words are the
    most probable together; images of other data sets are passed over.

    Args:
        dataset (str): Name of the data set.
        prefix (str, optional): Before the names of the metrics, as in
            'camvid/mIoU'. Defaults to None: the name of the data set.
        **kwargs: As of ``IoUMetric``.

    Raises:
        ValueError: If there is no such data set, or no image of it.
    """

    def __init__(self,
                 dataset: str,
                 prefix: Optional[str] = None,
                 **kwargs: Any) -> None:
        super().__init__(prefix=prefix or dataset, **kwargs)
        self.dataset = dataset

    @property
    def dataset_meta(self) -> Optional[dict]:
        """dict, optional: ``classes`` of the own data set."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, meta: Mapping[str, Any]) -> None:
        spaces = meta.get('label_spaces') or {}
        if self.dataset not in spaces:
            raise ValueError(
                f'DatasetIoUMetric is for the data set {self.dataset!r}, but '
                f'the data loader has {list(spaces) or "no MultiDataset"}.')
        own = spaces[self.dataset]
        self.space = torch.tensor(own['space'])
        words = list(meta['classes'])
        self.rows = torch.tensor([words.index(w) for w in own['words']])
        palette = meta.get('palette')
        self._dataset_meta = dict(
            classes=tuple(own['words']),
            palette=palette and [palette[row] for row in self.rows.tolist()])

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the areas of the images of the own data set.

        Args:
            data_batch (dict): A batch of the data loader.
            data_samples (Sequence[dict]): Outputs of the model.

        Raises:
            ValueError: If the model gives no logits of all words.
        """
        for sample in data_samples:
            if sample.get('dataset') != self.dataset:
                # In its place: results of several processes are interleaved.
                self.results.append(None)
                continue
            logits = sample.get('seg_logits', {}).get('data')
            if logits is None or len(logits) != len(self.space):
                raise ValueError(
                    f'DatasetIoUMetric needs the logits of all '
                    f'{len(self.space)} words, but the model gives '
                    f'{None if logits is None else tuple(logits.shape)}.')
            rows = self.rows.to(logits.device)
            own = own_logits(logits[None], self.space[None])[0, rows]
            sample = dict(
                sample,
                pred_sem_seg=dict(data=own.argmax(dim=0, keepdim=True)))
            if not self.format_only:
                labels = sample['gt_sem_seg']['data']
                # Not by the label that is ignored, which may be negative.
                known = labels != self.ignore_index
                to_own = labels.new_full(
                    (max(len(self.space),
                         int(labels.max()) + 1), ), self.ignore_index)
                to_own[rows.to(labels.device)] = torch.arange(
                    len(rows), device=labels.device, dtype=labels.dtype)
                own = torch.full_like(labels, self.ignore_index)
                own[known] = to_own[labels[known]]
                sample['gt_sem_seg'] = dict(data=own)
            super().process(data_batch, [sample])

    def compute_metrics(self, results: list) -> Dict[str, float]:
        """Compute the metrics of the own data set.

        Args:
            results (list): Areas of each image, None for one of another data
                set.

        Returns:
            dict[str, float]: Metrics by name, in percent.

        Raises:
            ValueError: If no image is of this data set.
        """
        results = [areas for areas in results if areas is not None]
        if not results and not self.format_only:
            raise ValueError(f'no image is of the data set {self.dataset!r}.')
        return super().compute_metrics(results)
