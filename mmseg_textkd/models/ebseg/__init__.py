# Copyright (c) mmseg_textkd contributors. All rights reserved.
from ..layers.balance import balance_probabilities, seen_classes
from .clip_sam_neck import CLIPSAMNeck
from .ebseg import EBSeg
from .ebseg_head import EBSegHead
from .ebseg_loss import EBSegLoss
from .frozen_clip_vit import FrozenCLIPViT
from .frozen_sam_vit import FrozenSAMViT
from .mask_decoder import MaskDecoder

__all__ = [
    'CLIPSAMNeck', 'EBSeg', 'EBSegHead', 'EBSegLoss', 'FrozenCLIPViT',
    'FrozenSAMViT', 'MaskDecoder', 'balance_probabilities', 'seen_classes'
]
