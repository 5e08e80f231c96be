# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .text_alignment_loss import TextAlignmentLoss

__all__ = ['TextAlignmentLoss']
