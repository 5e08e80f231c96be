# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The metric of few-shot work, against a count by hand."""
import numpy as np
import pytest
import torch
from each_case import each_case

from mmseg_textkd.evaluation import EpisodeIoUMetric

META = dict(classes=('others', *'abcdef'), class_ids=[1, 3, 4])


def sample(label, pred, class_id):
    return dict(
        gt_sem_seg=dict(data=torch.as_tensor(label)[None]),
        pred_sem_seg=dict(data=torch.as_tensor(pred)[None]),
        class_id=class_id)


def metric(samples, meta=META):
    made = EpisodeIoUMetric()
    made.dataset_meta = meta
    for one in samples:
        made.process({}, [one])
    return made.evaluate(len(samples))


def test_by_hand():
    label = [[1, 1, 0, 255], [0, 0, 1, 255]]
    first = sample(label, [[1, 0, 0, 1], [1, 0, 1, 0]], 1)
    # Foreground 2 of 4, background 2 of 4; the last column is not scored.
    second = sample([[1, 0]], [[1, 1]], 3)  # 1 of 2, 0 of 1
    third = sample([[1, 1]], [[1, 1]], 4)  # 2 of 2, 0 of 0
    found = metric([first, second, third])
    assert found['mIoU'] == pytest.approx(
        100 * (2 / 4 + 1 / 2 + 1) / 3, abs=.005)
    # Areas of all episodes together, which weighs images by their size.
    both = (5 / 8 + 2 / 5) / 2
    assert found['FB-IoU'] == pytest.approx(100 * both, abs=.005)


def test_random_episodes_against_an_independent_count():
    """As the literature counts: pixels by their set of prediction and label,
    ignored ones out of both, sums by class, 0 for a class without episode."""
    rng = np.random.default_rng(0)
    meta = dict(
        classes=('others', *map(str, range(20))), class_ids=list(range(5, 10)))
    samples, tables = [], {}
    for _ in range(40):
        k = int(rng.integers(5, 9))  # never 9
        label = rng.choice([0, 1, 255], (17, 23), p=[.6, .3, .1])
        pred = rng.integers(0, 2, (17, 23))
        samples.append(sample(label, pred, k))
        known = label != 255
        areas = [[((label == v) & (pred == v) & known).sum(),
                  (((label == v) | (pred == v)) & known).sum()]
                 for v in (0, 1)]
        tables[k] = tables.get(k, 0) + np.array(areas)
    of_class = [100 * t[1, 0] / t[1, 1] for t in tables.values()] + [0]
    total = sum(tables.values())
    found = metric(samples, meta)
    assert found['mIoU'] == pytest.approx(np.mean(of_class), abs=.005)
    assert found['FB-IoU'] == pytest.approx(
        100 * np.mean(total[:, 0] / total[:, 1]), abs=.005)


@each_case('faulty, fault', [
    (sample([[1, 0]], [[2, 0]], 1), 'labels and predictions 0 and 1'),
    (sample([[1, 0]], [[1], [0]], 1), r'sizes \(2, 1\) and \(1, 2\)'),
    (sample([[1, 0]], [[1, 0]], 2), r'of class 2, but those .* \[1, 3, 4\]'),
])
def test_faults_are_named(faulty, fault):
    with pytest.raises(ValueError, match=fault):
        metric([faulty])
