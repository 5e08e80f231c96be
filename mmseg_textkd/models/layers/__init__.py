# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .logit_scale import LogitScale
from .pixel_projection import PixelProjection
from .similarity import pixel_text_similarity
from .text_branch import TextBranch
from .text_classifier import TextClassifier
from .text_fusion import TextFusion

__all__ = [
    'LogitScale', 'PixelProjection', 'TextBranch', 'TextClassifier',
    'TextFusion', 'pixel_text_similarity'
]
