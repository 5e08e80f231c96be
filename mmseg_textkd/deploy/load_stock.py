# Copyright (c) mmseg_textkd contributors. All rights reserved.
import inspect
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS
from torch import nn

from ..models import TextHeadMixin
from ..models.input_channels import input_channels
from ..utils.checkpoint import (build_network, build_segmentor,
                                class_differences, load_strictly, non_finite,
                                read_checkpoint)
from ..utils.config import first_dataset, load_config, type_name
from .fold import fold_state_dict
from .stock_cfg import to_stock_cfg
from .verify import verify
from .words import united_cfg


def load_stock(
        config: str,
        checkpoint: Path,
        cfg_options: Optional[Dict] = None) -> Tuple[Config, nn.Module, Dict]:
    """Load a network for inference on the CPU, as a stock one.

    A text network is folded and compared with itself. One that does not fold,
    for it keeps a fusion (``use='inference'``) or a score map, is deployed as
    it is.

    Args:
        config (str): Path of its config.
        checkpoint (Path): Path of its checkpoint, with auxiliary heads or
            without.
        cfg_options (dict, optional): Settings of the config to override.
            Defaults to None.

    Returns:
        tuple[Config, nn.Module, dict]: Config, model in evaluation mode
        without auxiliary heads, and ``classes`` and ``palette``.

    Raises:
        FileNotFoundError: If there is no such config or checkpoint.
        ValueError: If the checkpoint is not of the network of the config, or
            the network does not fold, with what to do.
    """
    cfg = load_config(config, cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    head = cfg.model.decode_head
    if isinstance(head, list):
        raise ValueError('a cascade of decode heads is not supported.')
    kept = ((head.get('fusion') or {}).get('use') == 'inference'
            or type_name(cfg.model) == 'TextKD')
    kind = MODELS.get(head.type)
    # Not a class: `L2ConvSegHead`, which has no text any more.
    has_text = inspect.isclass(kind) and issubclass(kind, TextHeadMixin)
    saved = read_checkpoint(checkpoint)
    state = saved['state_dict']
    cfg = united_cfg(cfg, saved['meta'].get('dataset_meta'))
    text_state = any(k.endswith('.class_embeddings') for k in state)
    if text_state and not has_text and not kept:
        raise ValueError(f'{checkpoint} is the checkpoint of a text network, '
                         f'but {config} has no text: give its own config.')
    if has_text and not kept:
        cfg, state = _fold(cfg, state, checkpoint, text_state)
    model: Any = build_segmentor(cfg.model, state, checkpoint)
    odd = non_finite(model.state_dict())
    if odd:
        raise ValueError(f'{checkpoint}: {odd}.')
    # Windows would be another computation than that of the graph.
    model.test_cfg = ConfigDict(mode='whole')
    meta = complete_meta(
        dataset_meta(cfg, saved['meta'].get('dataset_meta')),
        model.decode_head.num_classes)
    return cfg, fix_bases(model), meta


def _fold(cfg: Config, state: Dict, checkpoint: Path,
          text_state: bool) -> Tuple[Config, Dict]:
    """Give the stock config and weights, for a checkpoint with text or not."""
    stock = to_stock_cfg(cfg, strip_auxiliary=True)
    if not text_state:  # folded before
        return stock, state
    model = build_network(cfg.model)
    load_strictly(model, state, checkpoint)
    state = fold_state_dict(model.eval(), strip_auxiliary=True)
    print(f'folded:\n{verify(model, stock, state)}')
    return stock, state


def fix_bases(model: nn.Module) -> nn.Module:
    """Draw the random bases of SegNeXt's head once instead of every time.

    Args:
        model (nn.Module): A network in evaluation mode; changed in place.

    Returns:
        nn.Module: The same.
    """
    heads: List[Any] = [
        m for m in model.modules() if getattr(m, 'rand_init', False)
    ]
    for head in heads:
        head.rand_init = False
    if heads:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            # It draws them when it first runs.
            model(torch.zeros(1, input_channels(model), 64, 64))
        print('The head draws random bases for every image; in the graph they '
              'are drawn once.')
    return model


def dataset_meta(cfg: Config, saved: Optional[Dict]) -> Dict:
    """Get classes and palette of a checkpoint or of its test set.

    Args:
        cfg (Config): The config.
        saved (dict, optional): ``meta['dataset_meta']`` of the checkpoint.

    Returns:
        dict: ``classes`` and, if it is known, ``palette``.

    Raises:
        ValueError: If neither names the classes, or they name others.
    """
    own = _metainfo(first_dataset(cfg))
    if not (saved or own):
        raise ValueError('neither the checkpoint nor a test_dataloader of '
                         'the config names the classes.')
    # One of several data sets has some of the words.
    several = 'label_spaces' in (saved or {})
    faults = [] if several else class_differences((saved or {}).get('classes'),
                                                  (own or {}).get('classes'))
    if faults:
        raise ValueError('\n  '.join([
            'the checkpoint is for other classes than the test_dataloader of '
            'the config, or in another order:', *faults
        ]))
    saved = saved or own or {}
    return {k: saved[k] for k in ('classes', 'palette') if k in saved}


def _metainfo(dataset: Dict) -> Optional[Dict]:
    """What a dataset tells of its classes, without its images."""
    kind = DATASETS.get(dataset['type']) if dataset else None
    if kind is None:
        return None
    try:
        found = DATASETS.build(dict(dataset, pipeline=[],
                                    lazy_init=True)).metainfo
    except Exception:  # of anybody's data set
        found = kind._load_metainfo(dataset.get('metainfo'))
    # The path of a file of names that is not here says nothing.
    return None if isinstance(found.get('classes'), str) else found


def complete_meta(meta: Dict, num_classes: int) -> Dict:
    """Check the number of classes, and draw colors if there are none.

    Args:
        meta (dict): As of :func:`dataset_meta`.
        num_classes (int): What the network has.

    Returns:
        dict: ``classes`` and ``palette`` (RGB), lists.

    Raises:
        ValueError: If the numbers differ.
    """
    classes = list(meta.get('classes') or [])
    if len(classes) != num_classes:
        raise ValueError(f'the network has {num_classes} classes, but the '
                         f'data set {len(classes)}: {classes}')
    palette = meta.get('palette')
    if not palette:
        palette = np.random.default_rng(42).integers(0, 256, (num_classes, 3))
    return dict(classes=classes, palette=np.asarray(palette).tolist())
