# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .channel_wise_distillation_loss import ChannelWiseDistillationLoss
from .image_embedding_distillation_loss import ImageEmbeddingDistillationLoss
from .logit_distillation_loss import LogitDistillationLoss
from .semantic_structure_loss import SemanticStructureLoss, structure_loss
from .text_alignment_loss import TextAlignmentLoss
from .text_guided_distillation_loss import TextGuidedDistillationLoss
from .text_similarity_distillation_loss import TextSimilarityDistillationLoss
from .text_to_text_contrastive_loss import TextToTextContrastiveLoss

__all__ = [
    'ChannelWiseDistillationLoss', 'ImageEmbeddingDistillationLoss',
    'LogitDistillationLoss', 'SemanticStructureLoss', 'TextAlignmentLoss',
    'TextGuidedDistillationLoss', 'TextSimilarityDistillationLoss',
    'TextToTextContrastiveLoss', 'structure_loss'
]
