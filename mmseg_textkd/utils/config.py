# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Configs: loaded in either style, and walks through them."""
import copy
import os
from typing import Any, Dict, Iterator, List, Mapping, Optional, Union

import mmengine.registry
import mmseg.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

Container = Union[Dict, List, tuple]
# Whatever a config can name by its `type`.
REGISTRIES = [
    registry for module in (mmengine.registry, mmseg.registry)
    for registry in vars(module).values() if isinstance(registry, Registry)
]

# Packages that MMSegmentation imports.
KNOWN = ('builtins', 'mmcv', 'mmengine', 'mmseg', 'torch', 'torchvision')


def load_config(config: Union[str, os.PathLike, Config],
                options: Optional[Mapping[str, Any]] = None) -> Config:
    """Load a config in which every ``type`` is a name.

    Pure-Python configs of MMEngine (``read_base``) have classes there, which
    tools cannot look up, write or compare.

    Args:
        config (str or PathLike or Config): The config, of either style.
        options (Mapping, optional): Settings to override. Defaults to None.

    Returns:
        Config: The config, a new one.
    """
    if isinstance(config, Config):
        config = copy.deepcopy(config)
    else:
        config = Config.fromfile(config)
    config.merge_from_dict(dict(options or {}))
    content, modules = config.to_dict(), set()
    for part in dicts(content):
        kind = part.get('type')
        if isinstance(kind, str) and '.' not in kind or kind is None:
            continue
        name = registered_name(kind)
        if name != kind:
            part['type'] = name
            modules.add(_object(kind).__module__)
    if not modules:
        return config
    # What its imports had done.
    content['default_scope'] = content.get('default_scope') or 'mmseg'
    own = {
        module.split('.')[0] if module.startswith('mmseg_textkd.') else module
        for module in modules if module.split('.')[0] not in KNOWN
    }
    done = content.pop('custom_imports', None) or dict(
        imports=[], allow_failed_imports=False)
    imports = as_list(done['imports'])
    if own or imports:
        imports += sorted(own - {*imports})
        content['custom_imports'] = dict(done, imports=imports)
    return Config(content, filename=config.filename)


def registered_name(kind: Any) -> Any:
    """Find the name under which a class is registered.

    Args:
        kind (type or str): The class, or where it is, as 'package.Class'.

    Returns:
        str: The name; what was given if it is not registered.
    """
    found = _object(kind)
    if found is None:
        return kind
    names = [
        name for registry in REGISTRIES
        for name, thing in registry.module_dict.items() if thing is found
    ]
    # Some have others than that of the class, as `BN` for `BatchNorm2d`.
    own = getattr(found, '__name__', '')
    return own if own in names else names[0] if names else kind


def _object(kind: Any) -> Any:
    """The class that a ``type`` is, or names with its module."""
    return get_object_from_string(kind) if isinstance(kind, str) else kind


def walk(node: Any) -> Iterator[Container]:
    """Yield all dicts, lists and tuples of a nested config.

    What is yielded may be changed before the walk goes on, but of a whole
    ``Config`` it is a copy; to insert or remove parts, take the list of all
    first.

    Args:
        node (Any): A part of a config.

    Yields:
        dict or list or tuple: Each, before what is in it.
    """
    if isinstance(node, Config):
        node = node.to_dict()
    if isinstance(node, (Mapping, list, tuple)):
        yield node
        values = node.values() if isinstance(node, Mapping) else node
        for value in list(values):
            yield from walk(value)


def dicts(node: Any) -> Iterator[Dict]:
    """Yield all dicts of a nested config, as :func:`walk`.

    Args:
        node (Any): A part of a config.

    Yields:
        dict: Each, before what is in it.
    """
    return (part for part in walk(node) if isinstance(part, Mapping))


def type_name(cfg: Any) -> str:
    """Get the name of the class of a config, without scope and module.

    Args:
        cfg (Any): A part of a config.

    Returns:
        str: The name, also of a class as lazy configs have it; '' if there
        is none.
    """
    kind = cfg.get('type', '') if isinstance(cfg, Mapping) else ''
    return str(getattr(kind, '__name__', kind)).split('.')[-1]


def as_list(value: Any) -> List:
    """Convert one value or several to a list.

    Args:
        value (Any): One, a list or tuple of them, or None.

    Returns:
        list: All of them.
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    return [] if value is None else [value]


def first_dataset(cfg: Mapping) -> Dict:
    """Get the config of the dataset to test on, the first of several.

    Args:
        cfg (Config): The config.

    Returns:
        dict: Its config; empty if the config has none.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    return dataset
