# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Deployed networks side by side, and how near they come to the machine."""
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import nn

from ..deploy.exportable import ExportableSegmentor
from ..deploy.run import Network
from .benchmark import interleave, paired_ratio, stopwatch, summarize

EAGER, PEAK, STOCK = 'eager', 'peak', ' stock'
SIDE = 1024  # of the matrices, in float32


def peak(threads: int) -> Tuple[Callable, int]:
    """Make what shows the machine's peak: a large product of matrices.

    Args:
        threads (int): Threads that PyTorch takes.

    Returns:
        tuple[Callable, int]: The product, and its FLOPs.
    """
    torch.set_num_threads(threads)
    a, b, out = (torch.ones(SIDE, SIDE) for _ in range(3))
    return (lambda: torch.mm(a, b, out=out)), 2 * SIDE**3


def time_folders(folders: Mapping[str, Path],
                 runs: int,
                 warmup: int,
                 threads: int = 1,
                 model: Optional[nn.Module] = None,
                 size: Optional[Tuple[int, int]] = None) -> Dict[str, Any]:
    """Time deployed networks in turn, on an array that is always the same.

    Args:
        folders (Mapping[str, Path]): By name. That of a name with ' stock'
            behind it is what the one of that name is compared with.
        runs (int): Number of rounds.
        warmup (int): Number of rounds before, which do not count.
        threads (int): For each. Defaults to 1.
        model (nn.Module, optional): A segmentor that PyTorch runs in the same
            rounds, as 'eager', with which all are compared; else they are
            with the first folder. Defaults to None.
        size (tuple[int, int], optional): Height and width where a network
            takes several. Defaults to None.

    Returns:
        dict[str, Any]: ``gflops_peak``, ``size`` and ``arms``: by name, as of
        :func:`summarize`, with ``gflops`` a second, ``share_of_peak`` and,
        where there is one, the ratio ``to_stock`` with its interval.

    Raises:
        ValueError: If a network takes several sizes and none is given, or
            networks are of different sizes.
    """
    product, flops = peak(threads)
    arms = {PEAK: stopwatch(product, 'cpu')}
    counts = {PEAK: flops}
    generator, sizes = np.random.default_rng(0), {}
    for name, folder in folders.items():
        network = Network(folder, threads)
        taken = network.size or size
        if taken is None:
            raise ValueError(f'{folder} takes several sizes: give one.')
        sizes[name] = tuple(taken)
        picture = generator.integers(0, 256, (*taken, 3), np.uint8)
        inputs = network.inputs(picture)
        arms[name] = stopwatch(
            lambda run=network.predict, x=inputs: run(x), 'cpu')
        scale = np.prod(taken) / np.prod(
            [n for n in network.meta['input']['shape'] if n != 3])
        counts[name] = network.meta['flops'] * scale
    if len(set(sizes.values())) > 1:
        raise ValueError('times of different sizes do not compare: ' +
                         ', '.join(f'{name} takes {height}x{width}'
                                   for name, (height, width) in sizes.items()))
    if model is not None:
        eager = ExportableSegmentor(model, preprocess=True).eval()
        example = eager.example(size)

        def run_eager() -> None:
            with torch.inference_mode():
                eager(example)

        arms[EAGER] = stopwatch(run_eager, 'cpu')
        counts[EAGER] = counts[next(iter(folders))] if folders else 0
    seconds = interleave(arms, runs, warmup)
    baseline = EAGER if model is not None else next(iter(folders))
    found = summarize(seconds, baseline)
    top = flops / np.median(seconds[PEAK])
    del found[PEAK]
    for name, row in found.items():
        speed = counts[name] / np.median(seconds[name])
        row.update(gflops=speed / 1e9, share_of_peak=speed / top)
        stock = seconds.get(f'{name}{STOCK}')
        if stock is not None:
            ratio = paired_ratio(seconds[name], stock)
            row.update(
                to_stock=ratio.value, to_stock_ci95=[ratio.low, ratio.high])
    taken = next(iter(sizes.values()), size)
    return dict(gflops_peak=top / 1e9, size=taken, arms=found)
