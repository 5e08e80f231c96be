# Copyright (c) mmseg_textkd contributors. All rights reserved.
import inspect
import logging
import re
from typing import Dict

from mmengine.config import Config
from mmengine.fileio import exists, list_from_file
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..utils.config import as_list, dicts, type_name
from .stock_converter import DROPPED, PLUGIN, StockConverter, reaches_plugin

# Parts of parameter names that only training with text or teacher has.
# Not of DDRNet's `context_branch`.
TEXT_PARAMETERS = re.compile(
    r'\.text\.|\.fusion\.|(?<!\w)(text_branch|text_losses|log_scale|'
    'logit_bias|distill_losses|image_projection|score_map)')


def to_stock_cfg(cfg: Config,
                 strip_auxiliary: bool = False,
                 keep_l2: bool = False) -> Config:
    """Convert a config to one of stock MMSegmentation.

    Text heads become their stock heads, the plugin's datasets a
    ``BaseSegDataset`` each. Hook, text variables, settings of text
    parameters, ``CheckLabels`` and the import of the plugin go; so does
    ``find_unused_parameters``, which the stages had needed. To a stock
    network no class is unseen: ``HideClasses`` goes, and an ``IoUMetric``
    takes the place of ``ZeroShotIoUMetric``. A ``MultiDataset`` goes, with its
    loop, see :func:`.united_cfg`.

    Pre-trained weights and ``load_from`` go too: a run of the new config
    starts from the folded checkpoint, which would overwrite them. Class names
    in a file are written down themselves.

    Args:
        cfg (Config): Config of a network, with text or without.
        strip_auxiliary (bool): Whether to remove ``auxiliary_head``, which
            only training needs. Defaults to False.
        keep_l2 (bool): Whether classifiers with ``norm='l2'``, which do not
            fold, become :class:`L2ConvSeg`. The new config then imports the
            plugin. Defaults to False.

    Returns:
        Config: The new config.

    Raises:
        ValueError: If something of the plugin cannot be replaced, and where
            it is.
    """
    stock = cfg.to_dict()
    for part in dicts(stock):  # of what was inherited as `mmseg_textkd::`
        if part.get('_scope_') == PLUGIN:
            del part['_scope_']
        names = (part.get('metainfo') or {}).get('classes')
        if isinstance(names, str) and exists(names):
            part['metainfo']['classes'] = list_from_file(names)
    for split in ('train', 'val', 'test'):
        loader = stock.get(f'{split}_dataloader')
        if any(type_name(part) == 'MultiDataset' for part in dicts(loader)):
            for key in ('cfg', 'dataloader', 'evaluator'):
                stock.pop(f'{split}_{key}', None)
    imports = (stock.pop('custom_imports', None) or {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else imports
    converter = StockConverter(imports, keep_l2)
    for key in list(stock):
        value = stock.pop(key)
        if key.startswith('text_') or converter.find(value) is not None:
            continue
        try:
            value = converter.replace(value, key)
        except ValueError:
            if key in inspect.signature(Runner).parameters:
                raise
            # A variable of the config: where it counts, it has been copied.
            continue
        if value is not DROPPED:
            stock[key] = value
    stock.pop('find_unused_parameters', None)
    if stock.get('load_from'):
        stock['load_from'] = None
    if strip_auxiliary:
        stock['model'].pop('auxiliary_head', None)
    _drop_pretrained(stock['model'])
    _drop_text_parameters(stock.get('optim_wrapper') or {})
    for split in ('val', 'test'):
        _ignore_unlabeled(cfg, stock, split, converter)
    imports = [name for name in imports if not converter.needs_plugin(name)]
    still = [name for name in imports if reaches_plugin(name)]
    if still:
        print_log(
            f'The stock config imports {still}, and {PLUGIN} with them, as '
            'their packages do: it can be read only where that is installed. '
            'Let these packages not import modules with text heads, and name '
            'those in `custom_imports`.', 'current', logging.WARNING)
    if 'L2ConvSegHead' in str(stock['model']):
        imports.append(f'{PLUGIN}.deploy')
    if imports:
        stock['custom_imports'] = dict(
            imports=imports, allow_failed_imports=False)
    return Config(stock)


def _drop_pretrained(model: Dict) -> None:
    """Remove pre-trained weights from the config of a model, in place."""
    for part in dicts(model):
        if part.get('pretrained'):
            part['pretrained'] = None
        if part.get('checkpoint_path'):  # of TIMMBackbone
            part['checkpoint_path'] = ''
        init = part.get('init_cfg') or []
        kept = [cfg for cfg in as_list(init) if type_name(cfg) != 'Pretrained']
        if init and not kept:
            del part['init_cfg']
        elif isinstance(init, list) and init:
            part['init_cfg'] = kept


def _drop_text_parameters(optim_wrapper: Dict) -> None:
    """Remove the settings of text parameters, in place."""
    paramwise = optim_wrapper.get('paramwise_cfg') or {}
    keys = paramwise.get('custom_keys', {})
    for key in filter(TEXT_PARAMETERS.search, list(keys)):
        del keys[key]
    if not keys:
        paramwise.pop('custom_keys', None)
    if not paramwise:
        optim_wrapper.pop('paramwise_cfg', None)


def _ignore_unlabeled(cfg: Config, stock: Dict, split: str,
                      converter: StockConverter) -> None:
    """Let the evaluator ignore the label that the dataset mapped to 255.

    ``BaseSegDataset`` cannot turn it.
    """
    dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset')
    labels = [
        getattr(converter.find(part.get('type')), 'UNLABELED', None)
        for part in dicts(dataset)
    ]
    for label in labels:
        for evaluator in as_list(stock.get(f'{split}_evaluator')):
            if label is not None and type_name(evaluator) == 'IoUMetric':
                evaluator['ignore_index'] = label
