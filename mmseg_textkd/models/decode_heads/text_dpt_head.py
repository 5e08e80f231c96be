# Copyright (c) mmseg_textkd contributors. All rights reserved.
from mmseg.models.decode_heads import DPTHead
from mmseg.registry import MODELS

from .text_head_mixin import TextHeadMixin


@MODELS.register_module()
class TextDPTHead(TextHeadMixin, DPTHead):
    """``DPTHead`` with text; with a ViT, the network of LSeg.

    LSeg's head is this one with
    ``text_branch=dict(norm='l2', bias=False, regularization=dict())``, which
    every other text head takes too.

    All other arguments and behavior are those of the stock head; see
    :class:`TextHeadMixin` for what text adds.
    """
