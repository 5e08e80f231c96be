# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .balanced_conv_seg import BalancedConvSeg
from .fold import fold, fold_state_dict
from .l2_conv_seg import L2ConvSeg, mean_lengths
from .stock_cfg import to_stock_cfg
from .verify import Report, verify

__all__ = [
    'BalancedConvSeg', 'L2ConvSeg', 'Report', 'fold', 'fold_state_dict',
    'mean_lengths', 'to_stock_cfg', 'verify'
]
