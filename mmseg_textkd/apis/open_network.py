# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""From config and checkpoint to a network that takes words."""
import os
from inspect import isclass
from pathlib import Path
from typing import Dict, Optional, Sequence, Tuple, Union

from mmengine.config import Config
from mmseg.registry import MODELS
from torch import nn

from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.models import EBSeg, TextHeadMixin
from mmseg_textkd.utils.checkpoint import build_segmentor, read_checkpoint
from .ebseg_classifier import EBSegClassifier
from .folded_classifier import FoldedClassifier
from .open_classifier import OpenClassifier
from .text_head_classifier import TextHeadClassifier


def load_network(cfg: Config, checkpoint: Path) -> Tuple[nn.Module, Dict]:
    """Build a network without auxiliary heads, and load it strictly.

    Args:
        cfg (Config): Config of a text network, or of the stock network that
            it has been folded into, or of an EBSeg. Its ``model`` is changed
            to what is built.
        checkpoint (Path): Its weights.

    Returns:
        tuple[nn.Module, dict]: The network, and ``meta`` of the checkpoint.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is damaged or of another network.
    """
    saved = read_checkpoint(checkpoint)
    state = saved['state_dict']
    if isinstance(cfg.model.decode_head, list):
        raise ValueError('a cascade of decode heads is not supported.')
    kind = MODELS.get(cfg.model.decode_head.type)
    has_text = any(k.endswith('.class_embeddings') for k in state)
    if not has_text and isclass(kind) and issubclass(kind, TextHeadMixin):
        cfg.model = to_stock_cfg(cfg, strip_auxiliary=True).model
    # Other classes of a config of EBSeg; here they come by their names.
    cfg.model.decode_head.pop('test_text', None)
    model = build_segmentor(cfg.model, state, checkpoint)
    model.cfg = cfg
    return model, saved['meta']


def classifier_of(
        model: nn.Module,
        names: Sequence[str],
        cache_dir: Optional[Union[str, os.PathLike]] = None) -> OpenClassifier:
    """Tell how a network takes words, by its kind.

    Args:
        model (nn.Module): Of :func:`load_network`, in evaluation mode.
        names (Sequence[str]): The classes that it was trained with.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.text_cache.default_cache_dir`.

    Returns:
        OpenClassifier: That of the network.
    """
    if isinstance(model, EBSeg):
        kind = EBSegClassifier
    elif isinstance(model.decode_head, TextHeadMixin):
        kind = TextHeadClassifier
    else:
        return FoldedClassifier(model, names)
    text = model.cfg.model.decode_head.text
    return kind(model, text, names, cache_dir)
