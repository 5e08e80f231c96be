# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmseg.models.decode_heads import DepthwiseSeparableFCNHead
from mmseg.registry import MODELS

from .text_head_mixin import TextHeadMixin


@MODELS.register_module()
class TextDepthwiseSeparableFCNHead(TextHeadMixin, DepthwiseSeparableFCNHead):
    """``DepthwiseSeparableFCNHead`` with text, for Fast-SCNN.

    All other arguments and behavior are those of the stock head; see
    :class:`TextHeadMixin` for what text adds.
    """
