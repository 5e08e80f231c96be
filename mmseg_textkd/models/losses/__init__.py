# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .semantic_structure_loss import SemanticStructureLoss, structure_loss
from .text_alignment_loss import TextAlignmentLoss

__all__ = ['SemanticStructureLoss', 'TextAlignmentLoss', 'structure_loss']
