# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS

from .text_head_mixin import TextHeadMixin


@MODELS.register_module()
class TextFCNHead(TextHeadMixin, FCNHead):
    """``FCNHead`` with text.

    It is the head of BiSeNetV1, BiSeNetV2, STDC, CGNet, ERFNet and ICNet.

    All other arguments and behavior are those of the stock head; see
    :class:`TextHeadMixin` for what text adds.
    """
