# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Stock replacements of the plugin's modules in a config."""
import inspect
import os.path as osp
import sys
from glob import glob
from typing import Any, Dict, List, Optional, Set

from mmseg.datasets import BaseSegDataset
from mmseg.registry import MODELS

from mmseg_textkd.datasets import (CamVidDataset, CheckLabels, HideClasses,
                                   LabelMeFacadeDataset, LoadRegionEmbeddings,
                                   PackRegionInputs, ToyScenesDataset)
from mmseg_textkd.engine import (ChannelsLastHook, CPUAmpOptimWrapper,
                                 CPUDistributedDataParallel,
                                 LoadedCheckpointHook, PromptLearnerHook,
                                 TeacherHook)
from mmseg_textkd.evaluation import (ConfusionIoUMetric,
                                     VideoConsistencyMetric, ZeroShotIoUMetric)
from mmseg_textkd.models import (DistilledEncoderDecoder,
                                 MultiDatasetEncoderDecoder, TextHeadMixin,
                                 TextKD)
from mmseg_textkd.models.layers.score_map import KEPT_AS_IT_IS
from mmseg_textkd.models.layers.text_fusion import CANNOT_FOLD
from ..utils.config import REGISTRIES, type_name
from .l2_conv_seg import l2_conv_seg_head

PLUGIN = 'mmseg_textkd'
# What it puts into other packages.
PATCHES = f'{PLUGIN}.compat', f'{PLUGIN}._mmcv_ops'
DROPPED = object()
# What only training needs.
NOT_DEPLOYED = (ChannelsLastHook, CheckLabels, CPUDistributedDataParallel,
                HideClasses, LoadedCheckpointHook, LoadRegionEmbeddings,
                PromptLearnerHook, TeacherHook)
# What is a ``BaseSegDataset`` with checks, classes and suffixes.
STOCK_DATASETS = CamVidDataset, LabelMeFacadeDataset, ToyScenesDataset
# What is a stock thing with additions: its name, and their arguments.
STOCK_FORMS = {
    ConfusionIoUMetric: ('IoUMetric', ()),
    CPUAmpOptimWrapper: ('OptimWrapper', ()),
    DistilledEncoderDecoder: ('EncoderDecoder', ('teacher', 'distill_losses')),
    MultiDatasetEncoderDecoder: ('EncoderDecoder', ()),
    PackRegionInputs: ('PackSegInputs', ()),
    TextKD: ('EncoderDecoder', ('score_map', 'alignment_head', 'text_loss')),
    VideoConsistencyMetric: ('IoUMetric', ('windows', 'correct', 'video')),
    ZeroShotIoUMetric: ('IoUMetric', ('unseen', )),
}


class StockConverter:
    """Converter of the modules of a config that need the plugin.

    Args:
        imports (list[str]): Modules that the config imports. Those that
            import the plugin themselves are part of it here.
        keep_l2 (bool): Whether heads with ``norm='l2'`` keep their norm.
    """

    def __init__(self, imports: List[str], keep_l2: bool) -> None:
        self.keep_l2 = keep_l2
        self.packages = {PLUGIN, *filter(_uses_plugin, imports)}
        self.registered = {
            name: thing
            for registry in REGISTRIES
            for name, thing in registry.module_dict.items()
            if any(map(self.needs_plugin, _modules_of(thing)))
        }

    def needs_plugin(self, module: str) -> bool:
        """Whether a module cannot be imported without the plugin.

        Args:
            module (str): Its name.

        Returns:
            bool: True if it cannot.
        """
        return any(f'{module}.'.startswith(f'{package}.')
                   for package in self.packages)

    def find(self, kind: Any) -> Optional[Any]:
        """Get the class of a ``type`` from the registries.

        Args:
            kind (Any): Value of a config, of use if it is a name.

        Returns:
            Any, optional: What is registered under that name, if it needs
            the plugin.
        """
        if isinstance(kind, str):
            return self.registered.get(kind.split('.')[-1])
        return None

    def replace(self, value: Any, where: str) -> Any:
        """Convert a value of a config and everything nested in it.

        Args:
            value (Any): Part of a config.
            where (str): Its place, for messages.

        Returns:
            Any: The new value; ``DROPPED`` if nothing is left.

        Raises:
            ValueError: If something of the plugin cannot be replaced.
        """
        if isinstance(value, dict):
            kind = self.find(value.get('type'))
            if kind is not None:
                value = self._convert_module(kind, value, where)
                if value is DROPPED:
                    return DROPPED
            items = {
                k: self.replace(v, f'{where}.{k}')
                for k, v in value.items()
            }
            return {k: v for k, v in items.items() if v is not DROPPED}
        if isinstance(value, (list, tuple)) and value:
            parts = [
                self.replace(v, f'{where}[{i}]') for i, v in enumerate(value)
            ]
            parts = [part for part in parts if part is not DROPPED]
            return type(value)(parts) if parts else DROPPED
        return value

    def _convert_module(self, kind: Any, value: Dict, where: str) -> Any:
        if kind in NOT_DEPLOYED:
            return DROPPED
        if kind is TextKD and value['score_map'].get('norm') != 'rms':
            raise ValueError(f'{where}: {KEPT_AS_IT_IS}')
        if kind in STOCK_FORMS:
            name, own = STOCK_FORMS[kind]
            return {
                **{
                    k: v
                    for k, v in value.items() if k not in own
                }, 'type': name
            }
        if kind is l2_conv_seg_head and self.keep_l2:
            return value
        if inspect.isclass(kind) and issubclass(kind, TextHeadMixin):
            return self._stock_head(kind, value, where)
        if kind in STOCK_DATASETS:
            return _stock_dataset(kind, value, where)
        raise ValueError(
            f'{where}: {value["type"]!r} is defined in {kind.__module__}, '
            f'which needs {PLUGIN}, and MMSegmentation has nothing that '
            'could take its place. Remove it from the config, or define it '
            f'in a module that does not import {PLUGIN}.')

    def _stock_head(self, kind: type, value: Dict, where: str) -> Dict:
        """Convert a text head to its stock head."""
        names = {thing: name for name, thing in MODELS.module_dict.items()}
        ours = [c for c in kind.__mro__ if issubclass(c, TextHeadMixin)]
        lineage = [c for c in kind.__mro__ if c not in ours]
        changed = sorted({
            name
            for c in ours[:ours.index(TextHeadMixin)]
            for name in vars(c) if name == '__init__' or name[:2] != '__'
            and name != '_abc_impl' and not name.startswith('loss')
        })
        if changed:
            raise ValueError(
                f'{where}: {kind.__name__} differs from its stock head in '
                f'{changed}, so that no stock head takes its place. Define '
                'these in a head without text, in a module that does not '
                f'import {PLUGIN}, and mix the text in there.')
        stock = next((c for c in lineage if c in names), None)
        # All else that the text head inherits must be in the stock head too.
        if (stock is None or self.needs_plugin(stock.__module__)
                or set(lineage) != set(stock.__mro__)):
            raise ValueError(
                f'{where}: no stock head takes the place of {kind.__name__}: '
                'behind TextHeadMixin it must have one base, registered and '
                f'defined in a module that does not import {PLUGIN}.')
        fusion = value.get('fusion') or {}
        if fusion.get('use') == 'inference':
            raise ValueError(f'{where}: a {fusion["type"]} {CANNOT_FOLD}')
        head = {
            k: v
            for k, v in value.items()
            if k not in ('text', 'role', 'text_branch', 'text_losses',
                         'fusion')
        }
        head['type'] = names[stock]
        branch = value.get('text_branch') or {}
        of_lseg = type_name(branch) == 'LSegTextClassifier'
        if (self.keep_l2 and (of_lseg or branch.get('norm') == 'l2')
                and value.get('role', 'classifier') == 'classifier'):
            provider = MODELS.build(
                dict(value['text']),
                default_args=dict(num_classes=value['num_classes']))
            head = dict(type='L2ConvSegHead', head=head, dim=provider.dim)
            if branch.get('regularization') is not None:
                head['regularization'] = branch['regularization']
        return head


def _modules_of(thing: Any) -> List[str]:
    """Modules that a module, a class with its bases, or a function is of."""
    if inspect.ismodule(thing):
        return [thing.__name__]
    if inspect.isclass(thing):
        return [base.__module__ for base in thing.__mro__]
    return [str(getattr(thing, '__module__', ''))]


def _homes(name: str) -> List[str]:
    """Modules that a module is of, or has things from."""
    homes, module = [name], sys.modules.get(name)
    for thing in () if module is None else vars(module).values():
        homes += _modules_of(thing)
    # What the plugin has put into MMEngine and MMCV is theirs to a user.
    return [home for home in homes if home not in PATCHES]


def _uses_plugin(name: str) -> bool:
    """Whether a module of the config imports the plugin by itself."""
    return any(f'{home}.'.startswith(f'{PLUGIN}.') for home in _homes(name))


def reaches_plugin(name: str, seen: Optional[Set[str]] = None) -> bool:
    """Whether the plugin is imported with a module.

    Args:
        name (str): The module, which is loaded.
        seen (set[str], optional): Modules that need not be looked at.
            Defaults to None.

    Returns:
        bool: True if it imports the plugin, or its package or what it imports
        of that does.
    """
    seen = set() if seen is None else seen
    seen.add(name)
    parent, package = name.rpartition('.')[0], name.split('.')[0]
    return _uses_plugin(name) or any(
        home and home.split('.')[0] == package and home not in seen
        and reaches_plugin(home, seen) for home in [parent, *_homes(name)])


def _stock_dataset(kind: Any, value: Dict, where: str) -> Dict:
    """Convert a dataset of the plugin to a ``BaseSegDataset``."""
    metainfo = dict(kind.METAINFO, **(value.get('metainfo') or {}))
    known = inspect.signature(BaseSegDataset).parameters
    odd = [k for k in value if k not in (*known, 'type') or k == 'ann_file']
    if tuple(metainfo['classes']) != tuple(kind.METAINFO['classes']):
        odd.append('metainfo.classes')
    if odd:
        raise ValueError(
            f'{where}: a {kind.__name__} with {odd} cannot be replaced by a '
            'BaseSegDataset, which would treat that otherwise.')
    own = inspect.signature(kind).parameters['img_suffix']
    stock = dict(value, type='BaseSegDataset', metainfo=metainfo)
    if stock.setdefault('img_suffix', own.default) is None:
        # As CamVidDataset, which looks what the images end in.
        folder = osp.join(
            stock.get('data_root') or '',
            stock.get('data_prefix', {}).get('img_path') or '')
        is_jpg = bool(glob(osp.join(folder, '*.jpg')))
        stock['img_suffix'] = '.jpg' if is_jpg else '.png'
    return stock
