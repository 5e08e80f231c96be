# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""One run: training, evaluation, and what its logs say."""
import json
import os
import platform
import resource
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from mmengine.config import Config

from mmseg_textkd.analysis.compare import evaluate
from mmseg_textkd.evaluation.confusion_iou_metric import SUMMARY
from mmseg_textkd.utils.checkpoint import find_checkpoint
from mmseg_textkd.utils.io import write_files
from mmseg_textkd.utils.report import cpu_name
from mmseg_textkd.version import __version__

RESULT = 'result.json'
PACKAGES = ('torch', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmcv-lite',
            'onedl-mmcv', 'mmsegmentation', 'onedl-mmsegmentation', 'numpy')


def make_run(folder: Path, splits: Sequence[str], train_tool: Path) -> None:
    """Train and evaluate one run, in a process of its own.

    Training goes on where it was stopped. What the last checkpoint reaches is
    written to ``result.json``: for each split ``mIoU``, ``mAcc``, ``aAcc``
    and ``IoU`` of each class, in percent, with several data sets the means of
    theirs and ``datasets`` with those of each; ``classes``; and ``rss_mib``,
    the most memory that this process had.

    Args:
        folder (Path): Work directory of the run, with ``config.py``.
        splits (Sequence[str]): 'val', 'test' or both.
        train_tool (Path): ``tools/train.py``.
    """
    config = str(folder / 'config.py')
    cfg = Config.fromfile(config)
    checkpoint = folder / f'iter_{cfg.train_cfg.max_iters}.pth'
    found = find_checkpoint(folder)
    resume = [] if found is None else ['--resume']
    if found is None or found.name != checkpoint.name:
        sys.argv = [
            str(train_tool), config, '--work-dir',
            str(folder), *resume
        ]
        runpy.run_path(str(train_tool), run_name='__main__')
    done: Dict[str, Any] = {}
    for split in splits:
        # `_delete_`: not merged into that of val.
        loader = dict(cfg[f'{split}_dataloader'].to_dict(), _delete_=True)
        result = evaluate(config, checkpoint, folder / split,
                          dict(val_dataloader=loader))
        done['classes'] = result['classes']
        done[split] = {
            key: result[key]
            for key in (*SUMMARY, 'IoU', 'datasets') if key in result
        }
    done['rss_mib'] = resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss // 1024
    write_files({folder / RESULT: json.dumps(done).encode()})


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
            # Of several data sets each has its own, by a prefix.
            found = [v for k, v in entry.items() if k.split('/')[-1] == 'mIoU']
            if found:
                curve[entry['step']] = round(sum(found) / len(found), 2)
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
        device = f'CPU, {cpu_name()}, {os.cpu_count()} cores'
    versions = dict(python=platform.python_version(), mmseg_textkd=__version__)
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return dict(device=device, versions=versions)


def git_commit(root: Path) -> Optional[str]:
    """Get the commit of a checkout.

    Args:
        root (Path): Its folder.

    Returns:
        str, optional: The commit, with ``-dirty`` if code or configs differ
        from it; None without Git.
    """
    if shutil.which('git') is None:
        return None

    def git(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(['git', '-C', str(root), *words],
                              capture_output=True,
                              text=True)

    head = git('rev-parse', 'HEAD')
    if head.returncode:
        return None
    changes = git('status', '--porcelain', '--', 'mmseg_textkd', 'configs',
                  'tools')
    return head.stdout.strip() + ('-dirty' if changes.stdout.strip() else '')
