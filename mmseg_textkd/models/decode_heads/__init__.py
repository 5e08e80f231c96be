# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .lseg_dpt_head import LSegDPTHead
from .lseg_episode_head import LSegEpisodeHead
from .score_map_head import ScoreMapHead
from .text_ddr_head import TextDDRHead
from .text_depthwise_separable_fcn_head import TextDepthwiseSeparableFCNHead
from .text_dpt_head import TextDPTHead
from .text_fcn_head import TextFCNHead
from .text_head_mixin import TextHeadMixin
from .text_light_ham_head import TextLightHamHead
from .text_pid_head import TextPIDHead
from .text_segformer_head import TextSegformerHead

__all__ = [
    'LSegDPTHead', 'LSegEpisodeHead', 'ScoreMapHead', 'TextDDRHead',
    'TextDepthwiseSeparableFCNHead', 'TextDPTHead', 'TextFCNHead',
    'TextHeadMixin', 'TextLightHamHead', 'TextPIDHead', 'TextSegformerHead'
]
