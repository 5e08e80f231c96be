# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .label_maps import predict_labels
from .open_classifier import NewClasses, OpenClassifier
from .text_seg_inferencer import TextSegInferencer
from .word_encoder import WordEncoder

__all__ = [
    'NewClasses', 'OpenClassifier', 'TextSegInferencer', 'WordEncoder',
    'predict_labels'
]
