# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmseg.models.decode_heads import DDRHead
from mmseg.registry import MODELS

from .text_head_mixin import TextHeadMixin


@MODELS.register_module()
class TextDDRHead(TextHeadMixin, DDRHead):
    """``DDRHead`` with text in its context branch, for DDRNet.

    All other arguments and behavior are those of the stock head; see
    :class:`TextHeadMixin` for what text adds.
    """
