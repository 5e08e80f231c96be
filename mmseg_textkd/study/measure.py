# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What a finished run has to say: its evaluation and its logs."""
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from mmengine.config import Config

from mmseg_textkd.deploy.compare import evaluate
from mmseg_textkd.deploy.confusion_iou_metric import SUMMARY
from mmseg_textkd.version import __version__

PACKAGES = ('torch', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmcv-lite',
            'onedl-mmcv', 'mmsegmentation', 'onedl-mmsegmentation', 'numpy')


def measure(folder: Path, splits: Sequence[str]) -> Dict[str, Any]:
    """Evaluate the last checkpoint of a run.

    Args:
        folder (Path): Work directory of the run, with ``config.py``.
        splits (Sequence[str]): 'val', 'test' or both.

    Returns:
        dict: For each split ``mIoU``, ``mAcc``, ``aAcc`` and ``IoU`` of each
        class, in percent; and ``classes``.
    """
    config = folder / 'config.py'
    cfg = Config.fromfile(str(config))
    checkpoint = folder / f'iter_{cfg.train_cfg.max_iters}.pth'
    done: Dict[str, Any] = {}
    for split in splits:
        # `_delete_`: not merged into that of val.
        loader = dict(cfg[f'{split}_dataloader'].to_dict(), _delete_=True)
        result = evaluate(
            str(config), checkpoint, folder / split,
            dict(val_dataloader=loader))
        done['classes'] = result['classes']
        done[split] = {key: result[key] for key in (*SUMMARY, 'IoU')}
    return done


def read_logs(folder: Path) -> Dict[str, Any]:
    """Read what MMEngine logged of a run, over all its attempts.

    Args:
        folder (Path): Work directory of the run.

    Returns:
        dict: ``last_step``, the iteration that it has come to; ``curve``, a
        list of [iteration, val mIoU]; ``best_val``; ``train_seconds``, the
        sum over the iterations that count; and ``cuda_memory_mib``, the most
        that PyTorch had allocated, or None.
    """
    curve: Dict[int, float] = {}
    times: Dict[int, float] = {}
    memory: List[int] = []
    # Attempts in their order in time: of an iteration that was done twice
    # the later counts.
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # cut by a kill
                continue
            if 'mIoU' in entry:
                curve[entry['step']] = round(entry['mIoU'], 2)
            elif 'time' in entry:
                times[entry['step']] = entry['time']
                memory.append(entry.get('memory', 0))
    steps = sorted(times)
    seconds = sum(times[step] * (step - before)
                  for before, step in zip([0, *steps], steps))
    best = max(curve, key=curve.get, default=None)
    return dict(
        last_step=steps[-1] if steps else 0,
        curve=sorted(curve.items()),
        best_val=None if best is None else dict(
            iteration=best, mIoU=curve[best]),
        train_seconds=round(seconds, 1),
        cuda_memory_mib=max(memory, default=0) or None)


def describe_machine() -> Dict[str, Any]:
    """Describe where a run is made.

    Returns:
        dict: ``device`` and ``versions``.
    """
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    else:
        device = f'CPU, {_cpu_name()}, {os.cpu_count()} cores'
    versions = dict(python=platform.python_version(), mmseg_textkd=__version__)
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return dict(device=device, versions=versions)


def _cpu_name() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [
        line.split(':')[1].strip() for line in lines
        if line.startswith('model name')
    ]
    return names[0] if names else platform.processor() or 'unknown'
