# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .balance import balance_probabilities, seen_classes
from .balanced_text_classifier import BalancedTextClassifier
from .class_means import class_masks, class_means
from .logit_scale import LogitScale
from .lseg_text_classifier import LSegTextClassifier
from .pixel_projection import PixelProjection
from .score_map import ScoreMap
from .similarity import pixel_text_similarity, text_of_batch
from .spatial_regularization import SpatialRegularization
from .text_branch import TextBranch
from .text_classifier import TextClassifier
from .text_fusion import TextFusion

__all__ = [
    'BalancedTextClassifier', 'LSegTextClassifier', 'LogitScale',
    'PixelProjection', 'ScoreMap', 'SpatialRegularization', 'TextBranch',
    'TextClassifier', 'TextFusion', 'balance_probabilities', 'class_masks',
    'seen_classes', 'class_means', 'pixel_text_similarity', 'text_of_batch'
]
