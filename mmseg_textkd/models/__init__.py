# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextFCNHead, TextHeadMixin, TextLightHamHead,
                           TextPIDHead, TextSegformerHead)
from .layers import LogitScale, PixelProjection, TextBranch, TextClassifier
from .losses import (ChannelWiseDistillationLoss, LogitDistillationLoss,
                     TextAlignmentLoss, TextGuidedDistillationLoss,
                     TextSimilarityDistillationLoss)
from .segmentors import DistilledEncoderDecoder, FrozenTeacher

__all__ = [
    'ChannelWiseDistillationLoss', 'DistilledEncoderDecoder', 'FrozenTeacher',
    'LogitDistillationLoss', 'LogitScale', 'PixelProjection',
    'TextAlignmentLoss', 'TextBranch', 'TextClassifier', 'TextDDRHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead',
    'TextGuidedDistillationLoss', 'TextHeadMixin', 'TextLightHamHead',
    'TextPIDHead', 'TextSegformerHead', 'TextSimilarityDistillationLoss'
]
