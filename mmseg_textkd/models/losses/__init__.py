# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .mask_structure_loss import mask_structure_loss
from .text_alignment_loss import TextAlignmentLoss

__all__ = ['TextAlignmentLoss', 'mask_structure_loss']
