# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, Mapping, Optional, Tuple

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmseg_textkd.models import TextClassifier, TextHeadMixin, TextKD
from mmseg_textkd.models.layers.text_fusion import CANNOT_FOLD
from ..utils.checkpoint import build_network, non_finite
from .l2_conv_seg import fold_with_length, fuse_l2
from .stock_cfg import to_stock_cfg
from .words import united_cfg


def fold_state_dict(
        model: nn.Module,
        strip_auxiliary: bool = False,
        keep_l2: bool = False,
        lengths: Optional[Mapping[str, float]] = None) -> Dict[str, Tensor]:
    """Fold the text of a network into the weights of the stock network.

    In the role 'classifier' projection, norm, class embeddings, scale and
    bias become the head's own ``conv_seg``, in float64, cast once; in the
    role 'auxiliary' the text branch is left out. Auxiliary heads are treated
    as the decode head is; ``distill_losses``, a fusion for training only,
    and the image projection of a :class:`BalancedTextClassifier`, are left
    out. The score map of a :class:`TextKD` goes into the convolutions that
    read it. The weights of a model without text come back as they are, so
    folding twice is folding once.

    Args:
        model (nn.Module): The model, or a head, in evaluation mode. Left as
            it is.
        strip_auxiliary (bool): Whether to leave out auxiliary heads, which
            only training needs. Defaults to False.
        keep_l2 (bool): Whether classifiers with ``norm='l2'`` become
            :class:`L2ConvSeg`. Defaults to False.
        lengths (Mapping[str, float], optional): Lengths by the name of the
            classifier, as of :func:`mean_lengths`. Classifiers with
            ``norm='l2'`` are folded as if all pixel embeddings had that
            length, which is an approximation. Defaults to None.

    Returns:
        dict[str, Tensor]: Copies, on the CPU, that fit the stock config
        (:func:`to_stock_cfg`) with ``strict=True``.

    Raises:
        RuntimeError: In training mode, or if class embeddings are missing.
        ValueError: If a weight is not finite, a fusion is used at inference,
            with ``norm='l2'`` where neither way out has been chosen, or with
            regularization blocks, which only ``keep_l2`` supports.
    """
    if model.training:
        raise RuntimeError('only a model in evaluation mode can be folded; '
                           'call `.eval()` first.')
    left_out: Tuple[str, ...] = ('distill_losses.', )
    if strip_auxiliary:
        left_out += ('auxiliary_head.', )
    state = {
        k: v
        for k, v in (model.fold() if isinstance(model, TextKD) else model.
                     state_dict()).items() if not k.startswith(left_out)
    }
    for name, head in model.named_modules():
        prefix = f'{name}.' if name else ''
        if not isinstance(head, TextHeadMixin) or prefix.startswith(left_out):
            continue
        text: Tuple[str,
                    ...] = (f'{prefix}text_branch.', f'{prefix}text_losses.')
        if head.role == 'classifier':
            text += (f'{prefix}conv_seg.', )
        state = {k: v for k, v in state.items() if not k.startswith(text)}
        if head.role == 'classifier':
            own = _fold(head.conv_seg, f'{prefix}conv_seg', keep_l2, lengths)
            state.update({f'{prefix}conv_seg.{k}': v for k, v in own.items()})
    odd = non_finite(state)
    if odd:
        raise ValueError(f'{odd}. The training has diverged; take an earlier '
                         'checkpoint.')
    return {k: v.detach().cpu().clone() for k, v in state.items()}


def fold(model: nn.Module,
         cfg: Config,
         strip_auxiliary: bool = False) -> nn.Module:
    """Make the stock model that predicts as a text model does.

    The balancing of a :class:`BalancedTextClassifier` is left out.

    Args:
        model (nn.Module): The model with text, in evaluation mode.
        cfg (Config): Its config.
        strip_auxiliary (bool): Whether to leave out auxiliary heads. Defaults
            to False.

    Returns:
        nn.Module: The stock model, in evaluation mode, on the device and with
        the ``dataset_meta`` of the model. Its ``cfg`` is the stock config.

    Raises:
        RuntimeError: As of :func:`fold_state_dict`.
        ValueError: As of :func:`fold_state_dict` and :func:`to_stock_cfg`.
    """
    state = fold_state_dict(model, strip_auxiliary)
    cfg = united_cfg(cfg, getattr(model, 'dataset_meta', None))
    stock_cfg = to_stock_cfg(cfg, strip_auxiliary)
    stock = build_network(stock_cfg.model)
    stock.load_state_dict(state, strict=True)
    stock.cfg = stock_cfg
    if hasattr(model, 'dataset_meta'):
        stock.dataset_meta = model.dataset_meta
    return stock.to(next(model.parameters())).eval()


@torch.no_grad()
def _fold(classifier: TextClassifier, name: str, keep_l2: bool,
          lengths: Optional[Mapping[str, float]]) -> Dict[str, Tensor]:
    """Weights of the ``conv_seg`` that a text classifier folds into."""
    if classifier.fuses_at_inference:
        kind = type(classifier.fusion).__name__
        raise ValueError(f'{name} has a {kind}, which {CANNOT_FOLD}')
    norm, blocks = classifier.projection.norm, classifier.regularization
    if norm == 'l2' and keep_l2:
        return fuse_l2(classifier)
    if blocks is not None and blocks.depth:
        raise ValueError(
            f'{name} has spatial regularization blocks, which use '
            'neighboring pixels and other labels and do not fold into a 1x1 '
            "convolution. With norm='l2' they can be kept, in a small module "
            'that needs the plugin at inference (keep_l2=True; `--l2 keep` of '
            'tools/model_converters/textkd2mmseg.py). '
            f'Here norm={norm!r} and keep_l2={keep_l2}.')
    if norm != 'l2':
        return classifier.as_conv().state_dict()
    lengths = lengths or {}
    if name in lengths:
        conv = fold_with_length(classifier, lengths[name])
        return conv.to(classifier.projection.conv.weight).state_dict()
    raise ValueError(
        f"{name} has norm='l2', which divides each pixel by its own length "
        'and does not fold into a convolution. Choose: keep the norm, as a '
        'small module that needs the plugin at inference (keep_l2=True; '
        '`--l2 keep` of tools/model_converters/textkd2mmseg.py, whose output '
        'deploys), or fold approximately, with a mean length for all '
        'pixels and a measured disagreement (lengths=...; `--l2 '
        'approximate`; auxiliary heads, which do not run then, must be '
        "stripped). Trained with norm='bn' it would fold exactly.")
