# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The parts of the benchmarks: statistics, memory, backends, random text."""
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn
from torch._inductor import config as inductor

from mmseg_textkd.analysis.benchmark import (interleave, paired_ratio,
                                             peak_memory, randomize_text,
                                             stopwatch, summarize)
from mmseg_textkd.analysis.benchmark_backends import BACKENDS, Skipped

TOY = Path(__file__).resolve().parents[2].joinpath(
    'configs/text_classifier/'
    'textkd_bisenetv2_fcn_toyclip_1xb8-200i_toy-scenes-128x256.py')


def test_ratio_of_a_series_to_itself():
    series = np.random.default_rng(0).lognormal(size=20)
    assert paired_ratio(series, series) == (1, 1, 1)


def test_drift_that_both_have_cancels():
    drift = np.linspace(1, 10, 16)
    assert paired_ratio(1.5 * drift, drift) == (1.5, 1.5, 1.5)
    # Not so where the values are those of other rounds.
    value, low, high = paired_ratio(1.5 * drift, drift[::-1])
    assert low < 1 < high


def test_interval_of_three_rounds():
    # The median of three draws is the least of three with 7/27, and so on.
    assert paired_ratio([3, 2, 8], [3, 1, 2]) == (2, 1, 4)


def test_interval_covers_the_true_ratio():
    rng, hits, widths = np.random.default_rng(0), 0, []
    for seed in range(200):
        common = rng.lognormal(sigma=.5, size=40)
        noise = rng.lognormal(sigma=.1, size=(2, 40))
        _, low, high = paired_ratio(1.1 * common * noise[0], common * noise[1],
                                    400, seed)
        hits += low <= 1.1 <= high
        widths.append(high - low)
    assert 180 <= hits <= 199  # 95 % of 200, and not all
    # A median of 40 has 1.25 / 40^0.5 of the spread of one.
    spread = 1.1 * .1 * 2**.5 * 1.25 / 40**.5
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=.2)


def test_summary():
    rows = summarize(
        dict(a=[.004, .001, .003, .002], b=[.008, .002, .006, .004]), 'a')
    assert rows['a'] == dict(
        median_ms=2.5,
        q1_ms=1.75,
        q3_ms=3.25,
        min_ms=1,
        ratio=1,
        ratio_ci95=[1, 1],
        runs_ms=[4, 1, 3, 2])
    assert rows['b']['ratio'] == 2 and rows['b']['ratio_ci95'] == [2, 2]


def test_every_round_has_everything_once_in_a_drawn_order():
    calls = []

    def arm(name):
        return lambda: calls.append(name) or len(calls)

    arms = {name: arm(name) for name in 'abcd'}
    values = interleave(arms, runs=8, warmup=2)
    rounds = [tuple(calls[i:i + 4]) for i in range(0, 40, 4)]
    assert len(calls) == 40 and {frozenset(r)
                                 for r in rounds} == {frozenset('abcd')}
    assert len(set(rounds)) > 4
    for name in arms:
        # The first eight calls were the warm-up.
        assert values[name] == [
            i + 1 for i in range(8, 40) if calls[i] == name
        ]
    calls.clear()
    interleave(arms, runs=8, warmup=2)
    assert [tuple(calls[i:i + 4]) for i in range(0, 40, 4)] == rounds


def test_stopwatch_tells_seconds():
    assert .02 <= stopwatch(lambda: time.sleep(.02), 'cpu')() < 1


def test_peak_memory_is_what_lives_at_a_time():
    size = 2**18  # float32: 1 MiB

    def together():
        a = torch.ones(size)
        b = torch.ones(size)
        return a, b

    def one_by_one():
        for _ in range(3):
            torch.ones(size)

    assert peak_memory(together, 'cpu') == 2 * 2**20
    assert peak_memory(one_by_one, 'cpu') == 2**20


def test_text_needs_no_file():
    cfg = Config.fromfile(TOY)
    before = cfg.pretty_text
    random = randomize_text(cfg)
    assert cfg.pretty_text == before
    text = random.model.decode_head.text
    assert text.embeddings == dict(
        type='ControlEmbeddings', kind='random', dim=64)
    # Its prompts are still those of the classes.
    assert text.type == 'ContextPromptLearner'
    assert text.vocabulary == 'toy_scenes'
    vectors = MODELS.build(
        text.embeddings, default_args=dict(num_classes=8)).class_embeddings
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(8))
    for head in (dict(type='ClassEmbeddings', file='own'),
                 dict(
                     type='MixturePromptLearner',
                     embeddings=dict(
                         type='ClassEmbeddings', file='own', dim=4))):
        cfg.model.decode_head.text = head
        assert randomize_text(cfg).model.decode_head.text == head


def test_without_compiler():
    conv = nn.Conv2d(3, 4, 3).eval()
    with inductor.patch({
            'cpp.cxx': ('/none/g++', ),
            'fx_graph_cache': False
    }), torch.no_grad():
        with pytest.raises(Skipped, match=r'needs a C\+\+ compiler.*/none'):
            BACKENDS['compile'].prepare(conv, torch.randn(1, 3, 11, 13))
