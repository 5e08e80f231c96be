# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .text_ddr_head import TextDDRHead
from .text_depthwise_separable_fcn_head import TextDepthwiseSeparableFCNHead
from .text_fcn_head import TextFCNHead
from .text_head_mixin import TextHeadMixin
from .text_pid_head import TextPIDHead

__all__ = [
    'TextDDRHead', 'TextDepthwiseSeparableFCNHead', 'TextFCNHead',
    'TextHeadMixin', 'TextPIDHead'
]
