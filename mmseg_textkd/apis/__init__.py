# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .label_maps import predict_labels
from .new_classes import NewClasses, WordEncoder
from .text_seg_inferencer import TextSegInferencer

__all__ = ['NewClasses', 'TextSegInferencer', 'WordEncoder', 'predict_labels']
