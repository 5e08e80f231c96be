# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .zero_shot_iou_metric import ZeroShotIoUMetric

__all__ = ['ZeroShotIoUMetric']
