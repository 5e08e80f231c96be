# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextDPTHead, TextFCNHead, TextHeadMixin,
                           TextLightHamHead, TextPIDHead, TextSegformerHead)
from .layers import (LogitScale, PixelProjection, SpatialRegularization,
                     TextBranch, TextClassifier)
from .losses import (ChannelWiseDistillationLoss, LogitDistillationLoss,
                     SemanticStructureLoss, TextAlignmentLoss,
                     TextGuidedDistillationLoss,
                     TextSimilarityDistillationLoss)
from .segmentors import DistilledEncoderDecoder, FrozenTeacher

__all__ = [
    'ChannelWiseDistillationLoss', 'DistilledEncoderDecoder', 'FrozenTeacher',
    'LogitDistillationLoss', 'LogitScale', 'PixelProjection',
    'SemanticStructureLoss', 'SpatialRegularization', 'TextAlignmentLoss',
    'TextBranch', 'TextClassifier', 'TextDDRHead', 'TextDPTHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead',
    'TextGuidedDistillationLoss', 'TextHeadMixin', 'TextLightHamHead',
    'TextPIDHead', 'TextSegformerHead', 'TextSimilarityDistillationLoss'
]
