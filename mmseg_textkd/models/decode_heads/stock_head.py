# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Checks of the stock head that receives text."""
from typing import List, Optional, Union

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def check_stock_head(head: BaseDecodeHead) -> None:
    """Require a head whose classifier can be replaced.

    Args:
        head (BaseDecodeHead): The head, with its own ``conv_seg``.

    Raises:
        TypeError: If it has no 1x1 convolution as classifier.
        ValueError: If that has neither one logit for each class nor one for
            two.
    """
    name = type(head).__name__
    conv = getattr(head, 'conv_seg', None)
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1):
        raise TypeError(
            f'{name} cannot take text: its stock head has no 1x1 '
            f'convolution `conv_seg` as classifier (found {conv}).')
    channels = getattr(head, 'out_channels', head.num_classes)
    if channels != head.num_classes and not is_binary(head):
        raise ValueError(
            f'{name} cannot take text with out_channels={channels} for '
            f'num_classes={head.num_classes}: text needs one logit a class, '
            'or one for two classes. Leave `out_channels` unset.')


def is_binary(head: BaseDecodeHead) -> bool:
    """Whether a head has one logit for two classes.

    Args:
        head (BaseDecodeHead): The head.

    Returns:
        bool: True if its sigmoid is the probability of the second class.
    """
    return head.num_classes == 2 and getattr(head, 'out_channels', 2) == 1


def foldable_norm_cfg(norm_cfg: Optional[dict]) -> Optional[dict]:
    """Get the config of the head's norm if it is a batch norm.

    Args:
        norm_cfg (dict, optional): Config of the norm of the head.

    Returns:
        dict, optional: The same.
    """
    kind = (norm_cfg or {}).get('type')
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    folds = kind is not None and issubclass(kind, _BatchNorm)
    return norm_cfg if folds else None


def init_without_conv_seg(
        cfgs: Union[dict, List[dict], None]) -> Optional[List[dict]]:
    """Remove the initialization of ``conv_seg`` from an ``init_cfg``.

    It would also hit the batch norm, whose gain it would make 0.01.

    Args:
        cfgs (dict | list[dict], optional): ``init_cfg`` of the head.

    Returns:
        list[dict], optional: What is left of it.
    """
    if cfgs is None:
        return None
    kept = []
    for cfg in cfgs if isinstance(cfgs, list) else [cfgs]:
        cfg = dict(cfg)
        overrides = cfg.pop('override', None) or []
        if isinstance(overrides, dict):
            overrides = [overrides]
        overrides = [o for o in overrides if o.get('name') != 'conv_seg']
        if overrides:
            cfg['override'] = overrides
        if overrides or 'layer' in cfg or cfg['type'] == 'Pretrained':
            kept.append(cfg)
    return kept or None
