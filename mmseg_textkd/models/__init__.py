# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (LSegDPTHead, LSegEpisodeHead, ScoreMapHead,
                           TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextDPTHead, TextFCNHead, TextHeadMixin,
                           TextLightHamHead, TextPIDHead, TextSegformerHead)
from .ebseg import (CLIPSAMNeck, EBSeg, EBSegHead, EBSegLoss, FrozenCLIPViT,
                    FrozenSAMViT, MaskDecoder)
from .fusion import ContextAwareText, TwoWayBridge
from .layers import (BalancedTextClassifier, LogitScale, LSegTextClassifier,
                     PixelProjection, ScoreMap, SpatialRegularization,
                     TextBranch, TextClassifier, TextFusion)
from .losses import (ChannelWiseDistillationLoss,
                     ImageEmbeddingDistillationLoss, LogitDistillationLoss,
                     SemanticStructureLoss, TextAlignmentLoss,
                     TextGuidedDistillationLoss,
                     TextSimilarityDistillationLoss)
from .segmentors import (DistilledEncoderDecoder, FrozenCLIPTeacher,
                         FrozenTeacher, MultiDatasetEncoderDecoder, TextKD)

__all__ = [
    'BalancedTextClassifier', 'CLIPSAMNeck', 'ChannelWiseDistillationLoss',
    'ContextAwareText', 'DistilledEncoderDecoder', 'EBSeg', 'EBSegHead',
    'EBSegLoss', 'FrozenCLIPTeacher', 'FrozenCLIPViT', 'FrozenSAMViT',
    'FrozenTeacher', 'ImageEmbeddingDistillationLoss', 'LSegDPTHead',
    'LSegEpisodeHead', 'LSegTextClassifier', 'LogitDistillationLoss',
    'LogitScale', 'MaskDecoder', 'MultiDatasetEncoderDecoder',
    'PixelProjection', 'ScoreMap', 'ScoreMapHead', 'SemanticStructureLoss',
    'SpatialRegularization', 'TextAlignmentLoss', 'TextBranch',
    'TextClassifier', 'TextDDRHead', 'TextDPTHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead', 'TextFusion',
    'TextGuidedDistillationLoss', 'TextKD', 'TextHeadMixin',
    'TextLightHamHead', 'TextPIDHead', 'TextSegformerHead',
    'TextSimilarityDistillationLoss', 'TwoWayBridge'
]
