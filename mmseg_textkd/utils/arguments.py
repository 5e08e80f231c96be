# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What the tools do with their arguments after they have been parsed.

Parsers themselves import nothing that takes time: `--help` and a mistake are
answered at once.
"""
import argparse
import warnings
from typing import Any, Dict, Optional, Sequence

from mmengine.config import Config, DictAction


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
            '`python tools/misc/print_config.py CONFIG`.') from error
    return options


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
