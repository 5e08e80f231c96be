# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmseg.models.decode_heads import SegformerHead
from mmseg.registry import MODELS

from .text_head_mixin import TextHeadMixin


@MODELS.register_module()
class TextSegformerHead(TextHeadMixin, SegformerHead):
    """``SegformerHead`` with text, for SegFormer.

    All other arguments and behavior are those of the stock head; see
    :class:`TextHeadMixin` for what text adds.
    """
