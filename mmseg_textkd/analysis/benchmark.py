# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Measurement of time and memory."""
import copy
import os
import random
import time
from itertools import accumulate
from typing import (Any, Callable, Dict, Iterable, List, Mapping, NamedTuple,
                    Sequence, Union)

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..models.ebseg.frozen_clip_vit import FrozenCLIPViT
from ..text.encode_classes import FILE_PROVIDERS
from ..utils.config import dicts, type_name
from ..utils.progress import track

Device = Union[str, torch.device]
# For each class, where a bank of phrases is replaced: about as many as the
# vocabularies with synonyms have.
PHRASES = 6


class Ratio(NamedTuple):
    """A ratio of times and its bootstrap 95 % confidence interval."""
    value: float
    low: float
    high: float


def stopwatch(function: Callable[[], Any],
              device: Device) -> Callable[[], float]:
    """Make a function that measures the time of another one.

    Args:
        function (Callable): What is timed, once a call.
        device (str or torch.device): Where its work is done.

    Returns:
        Callable: Takes nothing and returns seconds. On CUDA they lie between
        two events on an idle stream, so that launching counts too.
    """
    if torch.device(device).type != 'cuda':

        def on_cpu() -> float:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start

        return on_cpu
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_cuda() -> float:
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return on_cuda


def interleave(arms: Mapping[str, Callable[[], float]],
               runs: int,
               warmup: int = 0,
               seed: int = 0) -> Dict[str, List[float]]:
    """Measure several functions in turn, so that drift affects all alike.

    Args:
        arms (Mapping[str, Callable]): By name, what measures once and returns
            a value. Each is called once a round, in an order that is drawn
            anew for each round.
        runs (int): Number of rounds that count.
        warmup (int): Number of rounds before, which do not. Defaults to 0.
        seed (int): Seed of the orders. Defaults to 0.

    Returns:
        dict[str, list[float]]: By name, the value of each round.
    """
    values: Dict[str, List[float]] = {name: [] for name in arms}
    orders = random.Random(seed)
    for number in track(range(-warmup, runs), 'Measuring', 'round'):
        for name in orders.sample(list(arms), len(arms)):
            value = arms[name]()
            if number >= 0:
                values[name].append(value)
    return values


def paired_ratio(values: Sequence[float],
                 baseline: Sequence[float],
                 resamples: int = 10_000,
                 seed: int = 0) -> Ratio:
    """Compare two series that were measured in the same rounds.

    Args:
        values (Sequence[float]): One value a round.
        baseline (Sequence[float]): The same of what it is compared with.
        resamples (int): Number of bootstrap samples. Defaults to 10000.
        seed (int): Seed of the bootstrap. Defaults to 0.

    Returns:
        Ratio: Median over the rounds of value / baseline, and the percentile
        interval of that median when rounds are drawn with replacement.
    """
    ratios = np.asarray(values) / np.asarray(baseline)
    rows = np.random.default_rng(seed).integers(
        len(ratios), size=(resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[rows], axis=1), (2.5, 97.5))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def summarize(seconds: Mapping[str, Sequence[float]],
              baseline: str) -> Dict[str, Dict]:
    """Summarize the times of :func:`interleave`.

    Args:
        seconds (Mapping[str, Sequence[float]]): Seconds a round, by name.
        baseline (str): Name of what the others are compared with.

    Returns:
        dict[str, dict]: By name: median, quartiles and minimum in ms, the
        ratio to the baseline with its interval, and all values in ms.
    """
    summaries = {}
    for name, values in seconds.items():
        ms = 1e3 * np.asarray(values)
        q1, median, q3 = np.percentile(ms, (25, 50, 75)).tolist()
        ratio = paired_ratio(values, seconds[baseline])
        summaries[name] = dict(
            median_ms=median,
            q1_ms=q1,
            q3_ms=q3,
            min_ms=ms.min().item(),
            ratio=ratio.value,
            ratio_ci95=[ratio.low, ratio.high],
            runs_ms=ms.round(4).tolist())
    return summaries


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Size of tensors in memory."""
    return sum(t.numel() * t.element_size() for t in tensors)


def peak_memory(function: Callable[[], Any], device: Device) -> int:
    """Measure the memory that PyTorch allocates while a function runs.

    Args:
        function (Callable): What is measured. It should have run before, so
            that what it keeps is there already.
        device (str or torch.device): Where its tensors are.

    Returns:
        int: Largest number of bytes at a time above those before. On the CPU
        scratch memory that libraries take for themselves is not seen.
    """
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # It would write of its starts and stops, and of missing GPUs.
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        function()
    # The profiler's own tables have sums only, not what lives at a time.
    events = sorted((e for e in prof.profiler.kineto_results.events()
                     if e.name() == '[memory]'),
                    key=lambda event: event.start_ns())
    return max(accumulate((e.nbytes() for e in events), initial=0))


def randomize_text(cfg: Config) -> Config:
    """Replace class embeddings in files by random unit vectors in a config.

    Args:
        cfg (Config): Config of a text network.

    Returns:
        Config: A copy that needs no file. Embeddings without a ``dim``, and
        those that are to have a bank of phrases, are left as they are.
    """
    cfg = copy.deepcopy(cfg)

    for part in list(dicts(cfg.model)):
        for key, item in list(part.items()):
            if (type_name(item) not in FILE_PROVIDERS or not item.get('dim')
                    or type_name(part) == 'MixturePromptLearner'):
                continue
            if type_name(part) == 'ContextPromptLearner':
                # It takes its phrases from the file otherwise.
                part.setdefault('vocabulary', item.get('classes'))
            part[key] = dict(
                type='ControlEmbeddings', kind='random', dim=item.dim)
            if type_name(item) == 'SynonymSampler':
                part[key].update(phrases=PHRASES)
    return cfg


def randomize_clip(tower: FrozenCLIPViT) -> None:
    """Initialize a frozen CLIP image encoder at random, in place.

    Its time and memory are those of trained weights, which need not be
    available. ToyCLIP keeps its own.

    Args:
        tower (FrozenCLIPViT): The tower, not loaded yet.
    """
    if tower.model == 'toyclip':
        return
    from open_clip import create_model
    clip = create_model(tower.model).visual
    clip.clip_scale = 100.
    tower.load_network = lambda: clip
