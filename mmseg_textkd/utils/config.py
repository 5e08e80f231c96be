# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Traversal of nested configs."""
from typing import Any, Dict, Iterator, List, Mapping, Union

from mmengine.config import Config

Container = Union[Dict, List, tuple]


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


def first_dataset(cfg: Mapping, split: str = 'test') -> Dict:
    """Get the config of a dataset, the first of several.

    Args:
        cfg (Config): The config.
        split (str): 'train', 'val' or 'test'. Defaults to 'test'.

    Returns:
        dict: Its config; empty if the config has none.
    """
    dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset.get('dataset') or dataset['datasets'][0]
    return dataset
