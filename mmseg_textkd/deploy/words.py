# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A trained text network as one of other words, ready to be folded."""
import copy
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS
from torch import Tensor, nn

from ..models.decode_heads import TextHeadMixin
from ..utils.config import as_list, dicts, first_dataset, type_name
from .stock_converter import StockConverter

# What a network for inference alone does not need.
TRAINING = ('train_dataloader', 'train_cfg', 'optim_wrapper',
            'param_scheduler', 'val_dataloader', 'val_cfg', 'val_evaluator',
            'tta_model', 'custom_hooks')


def text_head(model: Any) -> Any:
    """Get the decode head of a network, which must have text.

    Args:
        model (nn.Module): The segmentor.

    Returns:
        TextHeadMixin: The head.

    Raises:
        ValueError: If it has no text.
    """
    head = model.decode_head
    if not isinstance(head, TextHeadMixin):
        raise ValueError('other classes need a text head '
                         f'(TextHeadMixin), but this is a '
                         f'{type(head).__name__}.')
    return head


@torch.no_grad()
def set_words(model: nn.Module,
              cfg: Config,
              vectors: Tensor,
              trained: Sequence[Optional[int]],
              new_words: Optional[str] = None) -> None:
    """Make other words the classes of a text network, in place.

    A trained class keeps its bias, a new one gets the mean of all. Auxiliary
    heads go; in classifiers for losses alone inside the decode head, as
    DDRNet and PIDNet have them, a new word gets zeros. In the role
    'auxiliary' the classes can be chosen among the trained ones, as the
    classifier knows no text.

    Args:
        model (nn.Module): The segmentor, in evaluation mode.
        cfg (Config): Its config.
        vectors (Tensor): Vectors of K' words, unit rows with shape (K', D).
        trained (Sequence[int | None]): For each word the index of the class
            that it was in the training, None for a new one.
        new_words (str, optional): See :meth:`TextBranch.place_words`.
            Defaults to None.

    Raises:
        ValueError: If the network has no text or one logit that is not
            enough, has the role 'auxiliary' and a word is new, there are
            fewer than two words, or there is no such way.
    """
    head, number = text_head(model), len(trained)
    binary = model.out_channels == 1
    if number < 2 or binary and (number > 2 or head.role == 'auxiliary'):
        raise ValueError(
            f'{number} class(es) for a network of {model.out_channels} '
            'logit(s): give at least two, and of one logit, which is for two '
            "classes, just two, in the role 'classifier'.")
    if head.role == 'auxiliary':
        if None in trained:
            raise ValueError(
                "in the role 'auxiliary' the deployed classifier knows no "
                'text: only classes that were trained can be chosen. New '
                "words need role='classifier'.")
        stock = head.conv_seg
        rows = torch.tensor(trained, device=stock.weight.device)
        conv = nn.Conv2d(
            stock.in_channels, number, 1, bias=stock.bias
            is not None).to(stock.weight)
        for name, value in stock.named_parameters():
            getattr(conv, name).copy_(value[rows])
        head.conv_seg = conv
    else:
        branch = head.text_branch
        vectors = branch.place_words(vectors, trained, new_words)
        bias = branch.logit_bias
        if bias is not None:
            branch.logit_bias = nn.Parameter(
                torch.stack([
                    bias.mean() if row is None else bias[row]
                    for row in trained
                ]))
        branch.num_classes = number
        branch.text.replace(vectors)
    if not binary:
        _set_unused_rows(head, cfg.model.decode_head, trained)
    for module in (head, model):
        module.num_classes = number
        module.out_channels = 1 if binary else number
    if model.with_auxiliary_head:
        del model.auxiliary_head


def _set_unused_rows(head: Any, cfg: Dict,
                     trained: Sequence[Optional[int]]) -> None:
    """Let other classifiers in a head have a row for each word.

    Evaluation does not use them, but a checkpoint has them. Text gives no row
    for a new word: it gets zeros, which nobody takes for trained.
    """
    stock = StockConverter([], False).replace(cfg, 'model.decode_head')
    stock.pop('out_channels', None)
    # With one class more, what has a row for each is of another shape.
    stock['num_classes'] = head.num_classes + 1
    own = dict(head.named_parameters())
    for name, value in MODELS.build(stock).named_parameters():
        old, (place, _, key) = own.get(name), name.rpartition('.')
        if old is None or old.shape == value.shape or place == 'conv_seg':
            continue
        rows = [0 * old[0] if k is None else old[k] for k in trained]
        layer = head.get_submodule(place)
        setattr(layer, key, nn.Parameter(torch.stack(rows)))


def to_words_cfg(cfg: Config,
                 words: Sequence[str],
                 palette: Optional[Sequence[Sequence[int]]] = None) -> Config:
    """Make the config of a network for a list of words.

    Where that is the list of the data set, or of one of a
    :class:`MultiDataset`, the new config trains and tests on that one. Else
    it is for inference alone: ``test_dataloader``, from which
    MMSegmentation's inferencer takes the pipeline, names no data.

    Args:
        cfg (Config): Config of a network.
        words (Sequence[str]): K' words.
        palette (Sequence[Sequence[int]], optional): A color for each word.
            Defaults to None.

    Returns:
        Config: The new config.
    """
    cfg = copy.deepcopy(cfg)
    number = cfg.model.decode_head.num_classes
    for head in [
            cfg.model.decode_head, *as_list(cfg.model.get('auxiliary_head'))
    ]:
        if head.num_classes == number:
            if head.get('text'):  # which gives its width
                head.text.setdefault('num_classes', number)
            head.num_classes = len(words)
            if head.get('out_channels') == number:
                del head.out_channels
    if type_name(cfg.model) == 'MultiDatasetEncoderDecoder':
        cfg.model.type = 'EncoderDecoder'
    loaders = [
        cfg[f'{split}_dataloader'] for split in ('train', 'val', 'test')
        if cfg.get(f'{split}_dataloader')
    ]
    chosen = [_choose(loader.dataset, words) for loader in loaders]
    if loaders and None not in chosen:
        for loader, dataset in zip(loaders, chosen):
            loader['dataset'] = dataset
            if type_name(loader.get('sampler')) == 'BalancedDatasetSampler':
                loader['sampler'] = dict(type='InfiniteSampler', shuffle=True)
        for key in ('val_evaluator', 'test_evaluator'):
            metrics = as_list(cfg.get(key))
            if any(type_name(m) == 'DatasetIoUMetric' for m in metrics):
                cfg[key] = dict(type='IoUMetric', iou_metrics=['mIoU'])
                # It was that of a data set, as in 'camvid/mIoU'.
                hooks = cfg.get('default_hooks') or {}
                if (hooks.get('checkpoint') or {}).get('save_best'):
                    hooks['checkpoint']['save_best'] = 'mIoU'
        return cfg
    meta: Dict[str, Any] = dict(classes=tuple(words))
    if palette is not None:
        meta['palette'] = [list(color) for color in palette]
    if cfg.get('test_dataloader'):
        cfg.test_dataloader['dataset'] = dict(
            type='BaseSegDataset',
            # To be filled in for a test, which says that they do not exist.
            data_root='DATA_ROOT',
            data_prefix=dict(img_path='IMAGES', seg_map_path='LABELS'),
            metainfo=meta,
            pipeline=first_dataset(cfg)['pipeline'])
        cfg.test_cfg = dict(type='TestLoop')
        cfg.test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
        cfg.test_dataloader.pop('sampler', None)
        cfg.test_dataloader['sampler'] = dict(
            type='DefaultSampler', shuffle=False)
    for key in TRAINING:
        cfg.pop(key, None)
    return cfg


def united_cfg(cfg: Config, meta: Optional[Mapping[str, Any]]) -> Config:
    """Make the config of a network of several data sets one of its words.

    Args:
        cfg (Config): Config of a network.
        meta (Mapping, optional): ``dataset_meta`` of the trained network.

    Returns:
        Config: The new config; the old one where there is one data set, or
        the words are not known.
    """
    classes = (meta or {}).get('classes')
    several = any(
        type_name(part) in ('MultiDataset', 'MultiDatasetEncoderDecoder')
        for part in dicts(cfg))
    if not (several and classes):
        return cfg
    return to_words_cfg(cfg, classes, (meta or {}).get('palette'))


def _choose(dataset: Dict, words: Sequence[str]) -> Optional[Dict]:
    """The data set, or that of several, whose classes are these words."""
    several = type_name(dataset) == 'MultiDataset'
    renamed = dataset.get('words') or {}
    parts: List[Any] = [(None, dataset)]
    if several:
        parts = list(zip(dataset['names'], dataset['datasets']))
    for name, part in parts:
        kind = DATASETS.get(part['type'])
        if renamed.get(name) or not hasattr(kind, '_load_metainfo'):
            continue
        meta = kind._load_metainfo(part.get('metainfo'))
        if tuple(meta.get('classes') or ()) == tuple(words):
            return part
    return None
