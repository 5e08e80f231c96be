# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextDPTHead, TextFCNHead, TextHeadMixin,
                           TextLightHamHead, TextPIDHead, TextSegformerHead)
from .layers import (LogitScale, PixelProjection, SpatialRegularization,
                     TextBranch, TextClassifier)
from .losses import SemanticStructureLoss, TextAlignmentLoss

__all__ = [
    'LogitScale', 'PixelProjection', 'SemanticStructureLoss',
    'SpatialRegularization', 'TextAlignmentLoss', 'TextBranch',
    'TextClassifier', 'TextDDRHead', 'TextDPTHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead', 'TextHeadMixin',
    'TextLightHamHead', 'TextPIDHead', 'TextSegformerHead'
]
