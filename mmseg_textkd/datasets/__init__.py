# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .camvid import CamVidDataset
from .check_labels import CheckLabels
from .hide_classes import HideClasses
from .toy_scenes import ToyScenesDataset

__all__ = ['CamVidDataset', 'CheckLabels', 'HideClasses', 'ToyScenesDataset']
