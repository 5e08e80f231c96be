# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What the tools do with their arguments after they have been parsed.

Parsers themselves import nothing that takes time: `--help` and a mistake are
answered at once.
"""
import argparse
import os
import traceback
import warnings
from typing import Any, Dict, Optional, Sequence, Union

from mmengine.config import Config, DictAction

from .config import load_config


def read_options(words: Optional[Sequence[str]]) -> Dict[str, Any]:
    """Read settings as ``--cfg-options`` of MMEngine's tools has them.

    Args:
        words (Sequence[str], optional): Each ``key=value``, with dots in the
            key and numbers, booleans, None, lists and tuples as values.

    Returns:
        dict: The values by key.

    Raises:
        ValueError: If one is no ``key=value``.
    """
    for word in words or ():
        if not word.partition('=')[0] or '=' not in word:
            raise ValueError(
                f'--cfg-options {word}: not of the form key=value, such as '
                'train_cfg.max_iters=100; put a value with spaces or '
                'brackets in quotation marks: \'key=[1, 2]\'')
    namespace = argparse.Namespace()
    action = DictAction(['--cfg-options'], 'options', nargs='+')
    action(argparse.ArgumentParser(), namespace, words or ())
    return namespace.options


def merge_options(cfg: Config, words: Optional[Sequence[str]]) -> Dict:
    """Override settings of a config in place.

    Args:
        cfg (Config): The config.
        words (Sequence[str], optional): As of :func:`read_options`.

    Returns:
        dict: The settings.

    Raises:
        ValueError: If one is no ``key=value``, or does not fit the config.
    """
    options = read_options(words)
    try:
        cfg.merge_from_dict(options)
    except (AssertionError, KeyError, TypeError) as error:
        raise ValueError(
            f'--cfg-options {" ".join(words)}: it does not fit the config '
            f'({error}). Look at what the config has with '
            '`python tools/stock_tool.py print_config CONFIG`.') from error
    return options


def read_config(path: Union[str, os.PathLike],
                words: Optional[Sequence[str]] = None,
                network: bool = True) -> Config:
    """Read the config of a network that the command line names.

    Args:
        path (str or PathLike): The config.
        words (Sequence[str], optional): As of :func:`read_options`.
        network (bool): Whether it must have a network. Defaults to True.

    Returns:
        Config: The config.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no config of a network, and why.
    """
    try:
        cfg = load_config(path)
    except OSError:
        raise
    except Exception as error:  # a config is code and raises anything
        raise ValueError(
            f'{path} cannot be read as a config: {type(error).__name__}: '
            f'{error}. Look at it with `python tools/stock_tool.py '
            f'print_config {path}`.') from error
    if network and 'type' not in (cfg.get('model') or {}):
        raise ValueError(
            f'{path} has no network (`model=dict(type=...)`), as the parts '
            'below configs/_base_ have not. Give a config that inherits from '
            'them.')
    merge_options(cfg, words)
    return cfg


def explain(error: BaseException) -> str:
    """Say what went wrong; where the message is a mere word, also where.

    Args:
        error (BaseException): What was raised.

    Returns:
        str: Its message; of one without a blank, as of a missing key, with
        its type and the line that raised it.
    """
    message = str(
        error.args[0] if isinstance(error, KeyError) and error.args else error)
    if ' ' in message:
        return message
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (f'{type(error).__name__}: {message} ({place.filename}, line '
            f'{place.lineno}: {place.line})')


def warn_renamed(args: argparse.Namespace, **new: str) -> None:
    """Warn of arguments in an old spelling, which is still read.

    Args:
        args (Namespace): The arguments. An old spelling is read into
            ``old_NAME``, which is None where it was not used.
        **new (str): How ``NAME`` is spelled now.
    """
    for name, spelling in new.items():
        if getattr(args, f'old_{name}', None) is not None:
            old = f'--{name.replace("_", "-")}'
            if old == spelling:
                old = f'{name.upper()} as the last argument'
            warnings.warn(
                f'{old} is deprecated and will go: write {spelling}',
                FutureWarning,
                stacklevel=2)
