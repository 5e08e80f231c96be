# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Schema of the YAML file of a study."""
import re
from itertools import product
from pathlib import Path
from typing import Any, Dict, Tuple

import yaml

KEYS = {
    '_base_', 'name', 'title', 'registration', 'baseline', 'controls', 'vars',
    'options', 'size', 'evaluate', 'networks', 'arms', 'grids',
    'channels_last', 'hypotheses'
}
NETWORK_KEYS = {'configs', 'iterations', 'val_interval', 'options', 'feature'}
ARM_KEYS = {'config', 'what', 'options', 'auxiliary_head', 'iterations'}
GRID_KEYS = {'networks', 'arms', 'seeds', 'train_fractions'}
SPLITS = ('val', 'test')
# How messages call what a list or a mapping has.
PLURALS: Dict[Any, str] = {
    str: 'names',
    list: 'lists',
    dict: 'mappings',
    (int, float): 'numbers'
}


class StudyError(ValueError):
    """Invalid file of a study."""


def read_study(path: Path) -> Dict[str, Any]:
    """Read and check the file of a study.

    Args:
        path (Path): The YAML file.

    Returns:
        dict: Its content, with what its ``_base_`` says.

    Raises:
        StudyError: If something is missing or unknown, and where.
    """
    spec = _read(path)
    _check(path, spec)
    return spec


def _read(path: Path, above: Tuple[Path, ...] = ()) -> Dict[str, Any]:
    """Read a YAML file and what it is based on."""
    if path.resolve() in above:
        raise StudyError(f'{path} is its own `_base_`, by way of '
                         f'{" and ".join(map(str, above))}. Name another '
                         'file, or none.')
    try:
        spec = yaml.safe_load(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise StudyError(f'there is no study {path}.') from error
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f'{path} cannot be read: {error}. A study is YAML '
                         'in UTF-8.') from error
    except yaml.YAMLError as error:
        raise StudyError(f'{path} is no YAML: {error}') from error
    if not isinstance(spec, dict):
        raise StudyError(f'{path} is no study: a mapping was expected.')
    if '_base_' not in spec:
        return spec
    base = spec.pop('_base_')
    if not isinstance(base, str):
        raise StudyError(f'{path}: `_base_` must be the path of one file, but '
                         f'is {base!r}.')
    return _merge(_read(path.parent / base, (*above, path.resolve())), spec)


def _merge(base: Dict[str, Any], own: Dict[str, Any]) -> Dict[str, Any]:
    """Complete mappings at any depth, replace the rest."""
    merged = dict(base)
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _merge(base[key], value)
        merged[key] = value
    return merged


def _check(path: Path, spec: Dict[str, Any]) -> None:
    """Check names and types of everything that can be checked at once."""

    def fail(text: str) -> None:
        raise StudyError(f'{path}: {text}')

    def check_kind(where: str, value: Any, kind: type, of: Any) -> None:
        if not isinstance(value, kind) or not all(
                isinstance(item, of) for item in value):
            what = 'mapping' if kind is dict else 'list'
            fail(f'{where} must be a {what} of {PLURALS[of]}, but is '
                 f'{value!r}.')

    def check_keys(where: str, keys, allowed, needed=()) -> None:
        check_kind(where, keys, dict, str)
        unknown, missing = set(keys) - allowed, set(needed) - set(keys)
        if unknown:
            fail(f'{where} has the unknown keys {sorted(unknown)}; known '
                 f'are {sorted(allowed)}.')
        if missing:
            fail(f'{where} has no {sorted(missing)}.')

    def check_iterations(where: str, part: Dict[str, Any]) -> None:
        for key in ('iterations', 'val_interval'):
            value = part.get(key, 1)
            if isinstance(value,
                          bool) or not isinstance(value, int) or value < 1:
                fail(f'{where}: {key} must be a number of iterations of at '
                     f'least 1, but is {value!r}.')

    check_keys('it', spec, KEYS,
               ('name', 'baseline', 'evaluate', 'networks', 'arms', 'grids'))
    # It becomes a folder.
    if not isinstance(spec['name'], str) or not re.fullmatch(
            r'\w[\w.-]*', spec['name']):
        fail(f'name must be of letters, digits, "_", "-" and ".", and begin '
             f'with none of the last two, but is {spec["name"]!r}.')
    for key in ('networks', 'arms'):
        check_kind(key, spec[key], dict, str)
    for key, of in (('evaluate', str), ('controls', str), ('hypotheses', list),
                    ('grids', dict)):
        check_kind(key, spec.get(key, []), list, of)
    for name, network in spec['networks'].items():
        check_kind(f'network {name!r}', network, dict, str)
        check_iterations(f'network {name!r}', network)
        check_keys(f'network {name!r}', network, NETWORK_KEYS,
                   ('configs', 'iterations', 'val_interval'))
        check_kind(f'network {name!r}: configs', network['configs'], dict, str)
    for name, arm in spec['arms'].items():
        check_keys(f'arm {name!r}', arm, ARM_KEYS, ('config', ))
        check_iterations(f'arm {name!r}', arm)
    wrong = set(spec['evaluate']) - set(SPLITS)
    if wrong or 'val' not in spec['evaluate']:
        fail(f'evaluate must be [val] or [val, test], but is '
             f'{spec["evaluate"]}.')
    for arm in [str(spec['baseline']), *spec.get('controls', [])]:
        if arm not in spec['arms']:
            fail(f'unknown arm {arm!r}; known are {list(spec["arms"])}.')
    for pair in spec.get('hypotheses', []):
        check_kind('a hypothesis', pair, list, str)
        if len(pair) not in (2, 3) or not set(pair[:2]) <= set(spec['arms']):
            fail('a hypothesis is [better, worse], two arms, or [better, '
                 f'worse, data set], but not {pair}.')
    for number, grid in enumerate(spec['grids'], 1):
        where = f'grid {number}'
        check_keys(where, grid, GRID_KEYS, ('networks', 'arms', 'seeds'))
        seeds = grid['seeds']
        if not isinstance(seeds, list) or not seeds or not all(
                isinstance(seed, int) and seed >= 0 for seed in seeds):
            fail(f'{where}: seeds must be a list of whole numbers, such as '
                 f'[0, 1, 2], but is {seeds!r}.')
        for kind in ('networks', 'arms'):
            check_kind(f'{where}: {kind}', grid[kind], list, str)
            for name in grid[kind]:
                if name not in spec[kind]:
                    fail(f'{where} has the unknown {kind[:-1]} {name!r}; '
                         f'known are {list(spec[kind])}.')
        for name, arm in product(grid['networks'], grid['arms']):
            network, arm = spec['networks'][name], spec['arms'][arm]
            if str(arm['config']) not in network['configs']:
                fail(f'network {name!r} has no config '
                     f'{arm["config"]!r}; it has '
                     f'{list(network["configs"])}.')
            if arm.get('auxiliary_head') and 'feature' not in network:
                fail(f'network {name!r} does not say by `feature` where '
                     'an extra auxiliary head reads.')
        fractions = grid.get('train_fractions', [1])
        check_kind(f'{where}: train_fractions', fractions, list, (int, float))
        for fraction in fractions:
            if not 0 < fraction <= 1:
                fail(f'{where}: a train fraction must be in (0, 1], but '
                     f'is {fraction}.')
