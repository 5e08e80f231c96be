# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .adapters import build_adapter
from .class_encoder import ClassEncoder, EncodedClasses
from .label_maps import predict_labels
from .model_zoo import find_model, released_models
from .text_seg_inferencer import TextSegInferencer

__all__ = [
    'ClassEncoder', 'EncodedClasses', 'TextSegInferencer', 'build_adapter',
    'find_model', 'predict_labels', 'released_models'
]
