# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Config of a run: a shipped one with its own length and size."""
import copy
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from mmengine.config import Config
from mmengine.optim.scheduler.param_scheduler import INF

from mmseg_textkd.utils.config import as_list, dicts, type_name

# What schedulers of MMEngine count iterations by, beside `begin`.
ITERATIONS = ('end', 'T_max', 'milestones', 'periods', 'step_size',
              'total_steps')


def make_config(path: Path,
                options: Sequence[Dict[str, Any]],
                iterations: int,
                val_interval: int,
                seed: int,
                size: Optional[Sequence[int]] = None,
                auxiliary_head: Optional[Dict[str, Any]] = None,
                channels_last: bool = False) -> Config:
    """Make the config of a run from a shipped one.

    Args:
        path (Path): A config.
        options (Sequence[dict]): What ``--cfg-options`` would change, one
            after the other.
        iterations (int): Length of the run. The learning rate schedule is
            scaled with it, but not that of hooks.
        val_interval (int): Iterations between two validations and between
            two checkpoints.
        seed (int): Seed of the run.
        size (Sequence[int], optional): Height and width, in pixels, that
            images are resized and cropped to. Labels for evaluation keep
            their resolution. Defaults to None: as in the config.
        auxiliary_head (dict, optional): One more auxiliary head. Defaults to
            None.
        channels_last (bool): Whether to add a :class:`ChannelsLastHook`.
            Defaults to False.

    Returns:
        Config: The config.

    Raises:
        ValueError: If an option does not fit the config.
    """
    cfg = copy.deepcopy(_load(path))
    for changes in options:
        cfg.merge_from_dict(changes)
    # A variable of the text configs, whose vectors an arm may not use:
    # tools/train.py would make them all the same.
    cfg.pop('text_provider', None)
    if auxiliary_head is not None:
        cfg.model.auxiliary_head = [
            *as_list(cfg.model.get('auxiliary_head')),
            dict(
                auxiliary_head,
                num_classes=cfg.model.decode_head.num_classes,
                norm_cfg=cfg.model.decode_head.norm_cfg)
        ]
    if channels_last:
        # Last: options name the hooks of the config by their position.
        cfg.custom_hooks = [
            *(cfg.get('custom_hooks') or []),
            dict(type='ChannelsLastHook')
        ]
    if size is not None:
        set_size(cfg, size)
    set_length(cfg, iterations, val_interval)
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    return cfg


@lru_cache(maxsize=None)
def _load(path: Path) -> Config:
    if not path.is_file():
        raise FileNotFoundError(f'there is no config {path}.')
    return Config.fromfile(str(path))


def set_length(cfg: Config, iterations: int, val_interval: int) -> None:
    """Set the length of a run, in place.

    Args:
        cfg (Config): A config with an iteration-based loop.
        iterations (int): Number of iterations.
        val_interval (int): Iterations between validations and checkpoints.

    Raises:
        ValueError: If the interval does not divide the number: the last
            checkpoint would not be the end of the run.
    """
    if iterations % val_interval:
        raise ValueError(f'val_interval={val_interval} does not divide '
                         f'iterations={iterations}')
    factor = iterations / cfg.train_cfg.max_iters
    for scheduler in as_list(cfg.get('param_scheduler')):
        scheduler.begin = round(scheduler.get('begin', 0) * factor)
        for key in ITERATIONS:
            value = scheduler.get(key)
            if isinstance(value, (list, tuple)):
                scheduler[key] = [max(1, round(v * factor)) for v in value]
            elif value is not None and value < INF:
                scheduler[key] = max(1, round(value * factor))
        if type_name(scheduler) == 'ExponentialLR':
            scheduler.gamma **= 1 / factor
    cfg.train_cfg.update(max_iters=iterations, val_interval=val_interval)
    # Else MMEngine counts validations by epoch, of which there is one.
    cfg.default_hooks.logger.log_metric_by_epoch = False
    # Only what a hook asks for: best checkpoints cost time and space.
    wanted = any(
        hook.get('load_best') for hook in as_list(cfg.get('custom_hooks')))
    best = {
        key: value
        for key, value in (cfg.default_hooks.get('checkpoint') or {}).items()
        if wanted and key in ('save_best', 'rule')
    }
    cfg.default_hooks.checkpoint = dict(
        best,
        type='CheckpointHook',
        by_epoch=False,
        interval=val_interval,
        # One more than the last: a run that is killed while it writes goes
        # on from the one before.
        max_keep_ckpts=2)


def set_size(cfg: Config, size: Sequence[int]) -> None:
    """Set the size of images and crops, in place.

    Args:
        cfg (Config): A config.
        size (Sequence[int]): Height and width in pixels.

    Raises:
        ValueError: If no transform of a data loader resizes images.
    """
    height, width = size
    for split in ('train', 'val', 'test'):
        resized = False
        for transform in dicts(cfg[f'{split}_dataloader']):
            if type_name(transform) in ('Resize', 'RandomResize'):
                transform['scale'] = (width, height)
                resized = True
            elif type_name(transform) == 'RandomCrop':
                transform['crop_size'] = (height, width)
        if not resized:
            raise ValueError(f'`size` cannot be set: {split}_dataloader '
                             'resizes no image')
    cfg.model.data_preprocessor.size = (height, width)
