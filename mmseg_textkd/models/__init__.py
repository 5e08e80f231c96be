# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextDPTHead, TextFCNHead, TextHeadMixin,
                           TextLightHamHead, TextPIDHead, TextSegformerHead)
from .ebseg import (CLIPSAMNeck, EBSeg, EBSegHead, EBSegLoss, FrozenCLIPViT,
                    FrozenSAMViT, MaskDecoder)
from .fusion import ContextAwareText, TwoWayBridge
from .layers import (LogitScale, PixelProjection, SpatialRegularization,
                     TextBranch, TextClassifier, TextFusion)
from .losses import (ChannelWiseDistillationLoss, LogitDistillationLoss,
                     SemanticStructureLoss, TextAlignmentLoss,
                     TextGuidedDistillationLoss,
                     TextSimilarityDistillationLoss)
from .segmentors import DistilledEncoderDecoder, FrozenTeacher

__all__ = [
    'CLIPSAMNeck', 'ChannelWiseDistillationLoss', 'ContextAwareText',
    'DistilledEncoderDecoder', 'EBSeg', 'EBSegHead', 'EBSegLoss',
    'FrozenCLIPViT', 'FrozenSAMViT', 'FrozenTeacher', 'LogitDistillationLoss',
    'LogitScale', 'MaskDecoder', 'PixelProjection', 'SemanticStructureLoss',
    'SpatialRegularization', 'TextAlignmentLoss', 'TextBranch',
    'TextClassifier', 'TextDDRHead', 'TextDPTHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead', 'TextFusion',
    'TextGuidedDistillationLoss', 'TextHeadMixin', 'TextLightHamHead',
    'TextPIDHead', 'TextSegformerHead', 'TextSimilarityDistillationLoss',
    'TwoWayBridge'
]
