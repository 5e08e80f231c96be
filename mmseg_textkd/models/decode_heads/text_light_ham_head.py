# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmseg.models.decode_heads import LightHamHead
from mmseg.registry import MODELS

from .text_head_mixin import TextHeadMixin


@MODELS.register_module()
class TextLightHamHead(TextHeadMixin, LightHamHead):
    """``LightHamHead`` with text, for SegNeXt.

    All other arguments and behavior are those of the stock head; see
    :class:`TextHeadMixin` for what text adds.
    """
