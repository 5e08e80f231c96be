# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .decode_heads import (TextDDRHead, TextDepthwiseSeparableFCNHead,
                           TextFCNHead, TextHeadMixin, TextLightHamHead,
                           TextPIDHead, TextSegformerHead)
from .ebseg import (CLIPSAMNeck, EBSeg, EBSegHead, EBSegLoss, FrozenCLIPViT,
                    FrozenSAMViT, MaskDecoder)
from .layers import LogitScale, PixelProjection, TextBranch, TextClassifier
from .losses import TextAlignmentLoss

__all__ = [
    'CLIPSAMNeck', 'EBSeg', 'EBSegHead', 'EBSegLoss', 'FrozenCLIPViT',
    'FrozenSAMViT', 'MaskDecoder', 'LogitScale', 'PixelProjection',
    'TextAlignmentLoss', 'TextBranch', 'TextClassifier', 'TextDDRHead',
    'TextDepthwiseSeparableFCNHead', 'TextFCNHead', 'TextHeadMixin',
    'TextLightHamHead', 'TextPIDHead', 'TextSegformerHead'
]
