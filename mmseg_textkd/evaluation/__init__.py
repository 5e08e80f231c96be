# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .confusion_iou_metric import ConfusionIoUMetric
from .dataset_iou_metric import DatasetIoUMetric
from .episode_iou_metric import EpisodeIoUMetric
from .label_map_names import label_map_names
from .video_consistency_metric import VideoConsistencyMetric
from .zero_shot_iou_metric import ZeroShotIoUMetric

__all__ = [
    'ConfusionIoUMetric', 'DatasetIoUMetric', 'EpisodeIoUMetric',
    'VideoConsistencyMetric', 'ZeroShotIoUMetric', 'label_map_names'
]
