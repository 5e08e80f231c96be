# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from mmengine.dist import get_world_size
from mmengine.logging import MMLogger, print_log
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS
from torch import Tensor

from mmseg_textkd.datasets.video_frames import frame_order


@METRICS.register_module()
class VideoConsistencyMetric(IoUMetric):
    r"""Whether the classes of a video stay right from frame to frame.

    Beside what ``IoUMetric`` gives, in percent:

    - ``mVC_C`` for each number C of consecutive frames: of the pixels whose
      label stays the same over C frames, the share that is right in all of
      them; mean over all windows of C frames of all videos;
    - ``wIoU``: mean of the IoU of the classes, weighted by their pixels.

    Frames must come in their order, video by video, in one process. The
    frames of a video lie in one folder, unless ``video`` tells them apart by
    their names. Ignored pixels have no label.

    Source: `VSPW <https://openaccess.thecvf.com/content/CVPR2021/html/
    Miao_VSPW_A_Large-scale_Dataset_for_Video_Scene_Parsing_in_the_Wild_
    CVPR_2021_paper.html>`_, section 5 (there also "weighted IoU").

    Args:
        windows (Sequence[int]): The numbers C. Defaults to (8, 16).
        correct (bool): Whether predictions have to be right. If not, it is
            enough that they stay the same, as the evaluation script that was
            published with VSPW counts. Defaults to True.
        video (str, optional): Regular expression whose first group is, in the
            path of a frame, the name of its video, such as
            ``r'([^/]+)_[^/]+$'`` for CamVid. Defaults to None: the folder.
        **kwargs: As of ``IoUMetric``.

    Raises:
        ValueError: If a number is less than 2.
    """

    def __init__(self,
                 windows: Sequence[int] = (8, 16),
                 correct: bool = True,
                 video: Optional[str] = None,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not windows or min(windows) < 2:
            raise ValueError('`windows` must be numbers of frames of at least '
                             f'2, but are {list(windows)}.')
        self.windows = tuple(windows)
        self.correct = correct
        self.video = re.compile(video) if video else None
        self._forget()

    def _forget(self) -> None:
        """Begin with the first video."""
        self._videos: List[str] = []
        self._path = ''
        # Of the frame before: label, prediction, and for each pixel since how
        # many frames the label stays, and is met.
        self._before: Optional[Tuple[Tensor, Tensor, Tensor, Tensor]] = None

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count one batch of frames.

        Args:
            data_batch (dict): A batch of the data loader.
            data_samples (Sequence[dict]): Outputs of the model.

        Raises:
            RuntimeError: If there are several processes.
            ValueError: If frames come out of order or change size.
        """
        if get_world_size() > 1:
            raise RuntimeError('VideoConsistencyMetric needs all frames of a '
                               'video in one process; test on one device.')
        for sample in data_samples:
            super().process(data_batch, [sample])
            if self.format_only:
                continue
            label = sample['gt_sem_seg']['data'].squeeze().cpu()
            predicted = sample['pred_sem_seg']['data'].squeeze().cpu()
            counts = self._count(sample['img_path'], label,
                                 predicted.to(label))
            self.results[-1] = (*self.results[-1], counts)

    def name_video(self, path: str) -> str:
        """Name the video of a frame.

        Args:
            path (str): Path of the frame.

        Returns:
            str: What ``video`` finds in it, or its folder.

        Raises:
            ValueError: If ``video`` finds nothing.
        """
        if self.video is None:
            return osp.dirname(path)
        match = self.video.search(path)
        if match is None:
            raise ValueError(f'{path} does not fit the `video` pattern '
                             f'{self.video.pattern!r}.')
        return match[1]

    def _count(self, path: str, label: Tensor,
               predicted: Tensor) -> List[Tuple[int, int]]:
        """Pixels that stay, and that are right, over each window."""
        video = self.name_video(path)
        if not self._videos or video != self._videos[-1]:
            if video in self._videos:
                raise ValueError(f'{path}: frames of other videos came '
                                 'between those of its own; do not shuffle.')
            self._videos.append(video)
            self._before = None
        elif frame_order(path) <= frame_order(self._path):
            raise ValueError(f'{path} comes behind {self._path}: frames must '
                             'come in their order.')
        self._path = path
        valid = label != self.ignore_index
        good = valid & (label == predicted) if self.correct else valid
        stays, met = valid.int(), good.int()
        if self._before is not None:
            old_label, old_predicted, old_stays, old_met = self._before
            if old_label.shape != label.shape:
                raise ValueError(
                    f'{path} has the size {tuple(label.shape)}, but the frame '
                    f'before it {tuple(old_label.shape)}.')
            same = valid & (label == old_label)
            stays = torch.where(same, old_stays + 1, stays)
            if self.correct:
                met = torch.where(same & good, old_met + 1, met)
            else:
                kept = same & (predicted == old_predicted)
                met = torch.where(kept, old_met + 1, met)
        self._before = label, predicted, stays, met
        return [(int((stays >= c).sum()), int((met >= c).sum()))
                for c in self.windows]

    def compute_metrics(self, results: list) -> Dict[str, float]:
        """Compute the metrics of all frames.

        Args:
            results (list): Of each frame the four areas, and the pixels that
                stay and that are right.

        Returns:
            dict[str, float]: Metrics by name, in percent; ``mVC_C`` is NaN if
            no video has C frames.
        """
        self._forget()
        if self.format_only:
            return super().compute_metrics(results)
        areas = [result[:4] for result in results]
        metrics = super().compute_metrics(areas)
        same, union, _, label = (
            sum(column).double() for column in zip(*areas))
        weight = label / label.sum()
        iou = same / union.clamp(min=1)
        found = {'wIoU': 100 * (weight * iou).sum().item()}
        for k, window in enumerate(self.windows):
            shares = [
                good / stay for *_, counts in results
                for stay, good in (counts[k], ) if stay
            ]
            found[f'mVC_{window}'] = 100 * np.mean(
                shares) if shares else float('nan')
        found = {key: round(float(value), 2) for key, value in found.items()}
        print_log(', '.join(f'{k}: {v}' for k, v in found.items()),
                  MMLogger.get_current_instance())
        return dict(metrics, **found)
