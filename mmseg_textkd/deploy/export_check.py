# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Callable, Dict, Iterable, NamedTuple, Optional, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, METRICS
from torch import Tensor

from ..utils.checkpoint import class_differences
from ..utils.config import as_list, load_config, type_name
from ..utils.progress import track
from .exportable import ExportableSegmentor
from .run import Network

TOLERANCE = 1e-4
# Metrics that need nothing but label maps.
METRICS_OF_LABELS = ('IoUMetric', 'ConfusionIoUMetric', 'ZeroShotIoUMetric')


class Comparison(NamedTuple):
    """Difference between an export and PyTorch.

    Attributes:
        inputs (str): What the images are.
        difference (float, optional): Largest difference of scores; None if
            it gives labels alone.
        largest (float): Largest absolute score.
        differing (int): Pixels with another class.
        pixels (int): All pixels.
        clear (int): Those of the differing whose two best scores differ by
            more than the tolerance.
    """
    inputs: str
    difference: Optional[float]
    largest: float
    differing: int
    pixels: int
    clear: int

    def __str__(self) -> str:
        line = f'{self.inputs}: '
        if self.difference is not None:
            line += (f'scores differ by at most {self.difference:.2g}, with '
                     f'scores of up to {self.largest:.3g}; ')
        line += f'another class at {self.differing} of {self.pixels} pixels'
        if self.differing and not self.clear:
            line += ', all of them ties within what is allowed'
        return line


def check(name: str,
          network: ExportableSegmentor,
          run: Callable[[Tensor], Tensor],
          images: Iterable[Tensor],
          exact: bool = True) -> Comparison:
    """Compare an export with PyTorch.

    Args:
        name (str): What the images are.
        network (ExportableSegmentor): The network.
        run (Callable): The same in another format, from input to output.
        images (Iterable[Tensor]): Inputs.
        exact (bool): Whether scores may differ by no more than 1e-4 (of the
            largest, if that is above 1) and classes only where the two best
            scores are nearer to each other than that; else it is only said
            how far they are apart. Defaults to True.

    Returns:
        Comparison: How near they come.

    Raises:
        ValueError: If they differ by more, something is not finite, or it
            does not run.
    """
    difference: Optional[float] = None
    largest, differing, pixels, unclear = 0., 0, 0, 0
    for image in images:
        expected = network.reference(image)
        if network.output == 'probabilities':
            expected = expected.softmax(1)
        if not expected.isfinite().all():
            raise ValueError(f'{name}: PyTorch itself predicts NaN or '
                             'infinite logits.')
        try:
            output = run(image)
        except Exception as error:  # each runtime has its own
            raise ValueError(f'{name}: what was exported does not run: '
                             f'{error}') from error
        top = expected.abs().max().item()
        allowed = TOLERANCE * max(1., top)
        largest = max(largest, top)
        labels = output.long()
        if network.output != 'argmax':
            _same_shape(name, output, expected)
            labels = output.argmax(1)
            apart = (output - expected).abs().max().item()
            # Written so that NaN is not near.
            if not apart <= (allowed if exact else float('inf')):
                raise ValueError(
                    f'{name}: the export is not the network: it differs by '
                    f'{apart:.2g} from scores of up to {top:.3g} '
                    f'(allowed: {allowed:.2g}).')
            difference = max(difference or 0., apart)
        _same_shape(name, labels, expected[:, 0])
        best = expected.topk(2, dim=1).values
        other = labels != expected.argmax(1)
        clear = int((other & (best[:, 0] - best[:, 1] >= allowed)).sum())
        if clear and exact:
            raise ValueError(
                f'{name}: the export is not the network: another class at '
                f'{clear} pixels whose two best scores differ by more than '
                f'{allowed:.2g}.')
        unclear += clear
        differing += int(other.sum())
        pixels += other.numel()
    return Comparison(name, difference, largest, differing, pixels, unclear)


def _same_shape(name: str, got: Tensor, expected: Tensor) -> None:
    """Require an output of the same shape."""
    if got.shape != expected.shape:
        raise ValueError(f'{name}: the export has an output of shape '
                         f'{tuple(got.shape)} instead of '
                         f'{tuple(expected.shape)}.')


def validation(config: str) -> Tuple[Config, Dict]:
    """Read the config of a validation set, before work of hours.

    Args:
        config (str): Path of the config.

    Returns:
        tuple[Config, dict]: The config, and that of its ``IoUMetric``.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it has no validation set, or measures no IoU.
    """
    cfg = load_config(config)
    if not (cfg.get('val_dataloader') and cfg.get('val_evaluator')):
        raise ValueError(f'{config} has no val_dataloader and val_evaluator')
    evaluators = [
        evaluator for evaluator in as_list(cfg.val_evaluator)
        if type_name(evaluator) in METRICS_OF_LABELS
    ]
    if not evaluators:
        raise ValueError(f'val_evaluator of {config} has no IoUMetric '
                         'over the labels of one data set')
    return cfg, evaluators[0]


def mean_iou(network: Network, config: str) -> float:
    """Measure the mIoU in per cent on the validation set of a config.

    Labels are resized to the ground truth, where the sizes differ.

    Args:
        network (Network): A deployed network.
        config (str): Path of the config.

    Returns:
        float: The mIoU.

    Raises:
        ValueError: If the classes of the two are not the same, or as of
            :func:`validation`.
    """
    cfg, evaluator = validation(config)
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    faults = class_differences(network.classes, dataset.metainfo['classes'],
                               'network')
    if faults:
        raise ValueError('\n  '.join(
            [f'{config} has other classes than the network:', *faults]))
    metric = METRICS.build(dict(evaluator, prefix=None))
    metric.dataset_meta = dataset.metainfo
    for i in track(range(len(dataset)), 'Testing'):
        data = dataset[i]
        truth = data['data_samples'].gt_sem_seg.data
        found = network(data['inputs'].permute(1, 2, 0).numpy())
        labels = torch.nn.functional.interpolate(
            torch.from_numpy(found.astype(np.float64))[None, None],
            truth.shape[1:],
            mode='nearest').long()[0]
        metric.process({}, [
            dict(pred_sem_seg=dict(data=labels), gt_sem_seg=dict(data=truth))
        ])
    return float(metric.evaluate(len(dataset))['mIoU'])
