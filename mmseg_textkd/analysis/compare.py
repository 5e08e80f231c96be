# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Comparison of two checkpoints on the same validation set by class."""
import time
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
from mmengine.runner import Runner

from ..evaluation import DatasetIoUMetric
from ..evaluation.confusion_iou_metric import SUMMARY, ConfusionIoUMetric
from ..utils.checkpoint import load_strictly, read_checkpoint, skip_pretraining
from ..utils.config import as_list, load_config, type_name

PAIRS = 10  # how many confusable pairs are listed


def evaluate(config: str,
             checkpoint: Path,
             work_dir: Path,
             options: Optional[Dict[str, Any]] = None) -> Dict[str, Any]:
    """Evaluate a checkpoint on the validation set of its config.

    MMSegmentation's runner, ``val_dataloader`` and ``val_evaluator`` do it.

    Args:
        config (str): Path of the config.
        checkpoint (Path): A checkpoint that fits it, all of it.
        work_dir (Path): Folder for the log.
        options (dict, optional): Settings of the config to override.
            Defaults to None.

    Returns:
        dict: ``ConfusionIoUMetric.result``, and the names of both files. Of
        a :class:`MultiDataset` all is joined, as if of one data set, but
        ``mIoU``, ``mAcc`` and ``aAcc`` are the means of those of the data
        sets, which ``datasets`` has by their names.

    Raises:
        ValueError: If the checkpoint does not fit, or no IoUMetric is in the
            config.
    """
    cfg = load_config(config, options)
    cfg.work_dir, cfg.load_from, cfg.resume = str(work_dir), None, False
    # MMEngine keeps the log of a name for the whole process.
    cfg.experiment_name = f'compare_{time.time_ns()}'
    evaluators = as_list(cfg.val_evaluator)
    kinds = [type_name(evaluator) for evaluator in evaluators]
    several = DatasetIoUMetric.__name__ in kinds
    if 'IoUMetric' not in kinds and not several:
        raise ValueError(f'val_evaluator of {config} has no IoUMetric, but '
                         f'{kinds}')
    if not several:
        number = kinds.index('IoUMetric')
        evaluators[number].update(
            type=ConfusionIoUMetric.__name__, iou_metrics=['mIoU'])
    # As a test: a `val` without training would have the best checkpoint
    # saved, which fails in MMEngine.
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_cfg = dict(type='TestLoop')
    cfg.test_evaluator = evaluators
    skip_pretraining(cfg.model)
    runner = Runner.from_cfg(cfg)
    load_strictly(runner.model,
                  read_checkpoint(checkpoint)['state_dict'], checkpoint)
    runner.test()
    metrics = runner.test_loop.evaluator.metrics
    names = dict(config=Path(config).name, checkpoint=checkpoint.name)
    if several:
        return {
            **names,
            **_joined({
                metric.dataset: metric.result
                for metric in metrics if isinstance(metric, DatasetIoUMetric)
            })
        }
    return {**names, **metrics[number].result}


def _joined(results: Dict[str, Dict[str, Any]]) -> Dict[str, Any]:
    """Join the results of several data sets."""
    sizes = [len(result['classes']) for result in results.values()]
    confusion = np.zeros((sum(sizes), sum(sizes)), dtype=int)
    for end, size, result in zip(np.cumsum(sizes), sizes, results.values()):
        confusion[end - size:end, end - size:end] = result['confusion']
    joined: Dict[str, Any] = dict(
        images=sum(result['images'] for result in results.values()),
        classes=[
            f'{name}: {word}' for name, result in results.items()
            for word in result['classes']
        ],
        IoU=[value for result in results.values() for value in result['IoU']],
        confusion=confusion.tolist(),
        datasets={
            name: {
                key: result[key]
                for key in SUMMARY
            }
            for name, result in results.items()
        })
    for key in SUMMARY:
        values = [result[key] for result in results.values()]
        joined[key] = round(sum(values) / len(values), 2)
    return joined


def compare(a: Dict[str, Any], b: Dict[str, Any]) -> Dict[str, Any]:
    """Compare two evaluations on the same labels.

    Args:
        a (dict): The result of one side, as of :func:`evaluate`.
        b (dict): The result of the other side.

    Returns:
        dict: ``IoU`` with the gain of each class in percentage points, and
        ``pairs``, the most confusable ones: percent of the pixels of the
        class ``truth`` that are taken for ``taken_for``, by either side.

    Raises:
        ValueError: If they are not of the same classes and labels.
    """
    for key in ('classes', 'images'):
        if a[key] != b[key]:
            raise ValueError(f'the sides differ in their {key}: {a[key]} and '
                             f'{b[key]}')
    counts = [np.array(side['confusion'], dtype=float) for side in (a, b)]
    areas = [count.sum(1, keepdims=True) for count in counts]
    if not np.array_equal(*areas):
        raise ValueError('the sides were evaluated on other labels: the '
                         'classes have other numbers of pixels')
    # Classes that are not there have no rates.
    rates = [100 * count / np.maximum(areas[0], 1) for count in counts]
    highest = np.maximum(*rates)
    np.fill_diagonal(highest, 0)
    order = np.argsort(-highest, axis=None, kind='stable')[:PAIRS]
    names = a['classes']
    pairs = [
        dict(
            truth=names[i],
            taken_for=names[j],
            a=round(rates[0][i, j], 2),
            b=round(rates[1][i, j], 2))
        for i, j in zip(*np.unravel_index(order, highest.shape))
        if highest[i, j] > 0
    ]
    gains = [
        dict(
            name=name,
            a=x,
            b=y,
            gain=None if x is None or y is None else round(y - x, 2))
        for name, x, y in zip(names, a['IoU'], b['IoU'])
    ]
    kept = ('config', 'checkpoint', *SUMMARY)
    sides = [{key: side[key] for key in kept} for side in (a, b)]
    return dict(
        images=a['images'], a=sides[0], b=sides[1], IoU=gains, pairs=pairs)
