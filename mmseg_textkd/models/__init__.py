# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextFCNHead, TextHeadMixin, TextLightHamHead,
                           TextPIDHead, TextSegformerHead)
from .layers import LogitScale, PixelProjection, TextBranch, TextClassifier
from .losses import SemanticStructureLoss, TextAlignmentLoss

__all__ = [
    'LogitScale', 'PixelProjection', 'SemanticStructureLoss',
    'TextAlignmentLoss', 'TextBranch', 'TextClassifier', 'TextDDRHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead', 'TextHeadMixin',
    'TextLightHamHead', 'TextPIDHead', 'TextSegformerHead'
]
