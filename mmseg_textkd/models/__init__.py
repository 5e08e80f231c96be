# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextFCNHead, TextHeadMixin, TextLightHamHead,
                           TextPIDHead, TextSegformerHead)
from .fusion import ContextAwareText, TwoWayBridge
from .layers import (LogitScale, PixelProjection, TextBranch, TextClassifier,
                     TextFusion)
from .losses import TextAlignmentLoss

__all__ = [
    'ContextAwareText', 'LogitScale', 'PixelProjection', 'TextAlignmentLoss',
    'TextBranch', 'TextClassifier', 'TextDDRHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead', 'TextFusion',
    'TextHeadMixin', 'TextLightHamHead', 'TextPIDHead', 'TextSegformerHead',
    'TwoWayBridge'
]
