# Copyright (c) mmseg_textkd contributors. All rights reserved.
from collections import OrderedDict
from typing import Any, Dict, Sequence

import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger, print_log
from mmseg.registry import METRICS
from prettytable import PrettyTable


@METRICS.register_module()
class EpisodeIoUMetric(BaseMetric):
    r"""IoU of few-shot episodes, with one foreground class in each image.

    In percent, as few-shot work has them:

    - ``mIoU``: mean over the classes of the fold of the foreground's IoU,
      whose areas are added up over all episodes of the class;
    - ``FB-IoU``: mean of foreground and background IoU, whose areas are added
      up over all episodes.

    A class of the fold that is in no episode counts as 0, as it does
    there, and there is a warning.

    Source: `HSNet <https://arxiv.org/abs/2104.01538>`_, section 5.

    Args:
        ignore_index (int): Label that is not scored. Defaults to 255.
        **kwargs: Arguments of ``BaseMetric``.
    """

    def __init__(self, ignore_index: int = 255, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ignore_index = ignore_index

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the areas of a batch of episodes.

        Args:
            data_batch (dict): A batch of the data loader.
            data_samples (Sequence[dict]): Outputs of the model: labels and
                predictions 0 and 1, and the ``class_id``.

        Raises:
            ValueError: If there are other values, or sizes differ.
        """
        for sample in data_samples:
            label = sample['gt_sem_seg']['data'][0]
            pred = sample['pred_sem_seg']['data'][0].to(label)
            if label.shape != pred.shape:
                raise ValueError(
                    f'prediction and label have the sizes {tuple(pred.shape)} '
                    f'and {tuple(label.shape)}; put EpisodeLabels behind '
                    'Resize and LoadAnnotations in the pipeline.')
            scored = label != self.ignore_index
            label, pred = label[scored].long(), pred[scored].long()
            if len(label) and max(label.max(), pred.max()) > 1:
                raise ValueError(
                    'EpisodeIoUMetric is for labels and predictions 0 and 1 '
                    '(EpisodeLabels, LSegEpisodeHead), but found '
                    f'{max(label.max(), pred.max())}.')
            # Rows: label; columns: prediction.
            counts = torch.bincount(2 * label + pred, minlength=4).view(2, 2)
            same = counts.diagonal()
            union = counts.sum(0) + counts.sum(1) - same
            self.results.append(
                (int(sample['class_id']), same.tolist(), union.tolist()))

    def compute_metrics(self, results: list) -> Dict[str, float]:
        """Compute the metrics of all episodes.

        Args:
            results (list): Class, and intersection and union of background
                and foreground, of each episode.

        Returns:
            dict[str, float]: Metrics by name, in percent.

        Raises:
            ValueError: If an episode is of a class that is not of the fold.
        """
        classes = list(self.dataset_meta['class_ids'])
        names = self.dataset_meta['classes']
        areas = torch.zeros(len(classes), 2, 2, dtype=torch.float64)
        episodes = [0] * len(classes)
        for class_id, *both in results:
            if class_id not in classes:
                raise ValueError(f'an episode is of class {class_id}, but '
                                 f'those of the data set are {classes}.')
            place = classes.index(class_id)
            areas[place] += torch.tensor(both, dtype=torch.float64)
            episodes[place] += 1
        same, union = areas.unbind(1)
        iou = 100 * same[:, 1] / union[:, 1].clamp(min=1)
        of_both = same.sum(0) / union.sum(0)
        table = PrettyTable(['class', 'episodes', 'IoU'])
        for k, number, value in zip(classes, episodes, iou.tolist()):
            table.add_row([names[k + 1], number, f'{value:.2f}'])
        logger = MMLogger.get_current_instance()
        if len(classes) <= 100:
            print_log(f'episodes by class:\n{table}', logger)
        lost = [names[k + 1] for k, n in zip(classes, episodes) if not n]
        if lost:
            print_log(
                f'No episode is of {len(lost)} class(es), whose IoU counts '
                f'as 0: {", ".join(lost[:10])}', logger, 30)
        metrics = OrderedDict(
            mIoU=iou.mean(), **{'FB-IoU': 100 * of_both.mean()})
        return {k: round(v.item(), 2) for k, v in metrics.items()}
