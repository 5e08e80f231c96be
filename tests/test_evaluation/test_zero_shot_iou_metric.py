# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""ZeroShotIoUMetric against cases counted by hand and pixel by pixel."""
import math

import pytest
import torch
from each_case import each_case
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

from mmseg_textkd.evaluation import ZeroShotIoUMetric

pytestmark = pytest.mark.stacks

CLASSES = ('road', 'car', 'truck', 'pole')


def sample(prediction, label):
    prediction, label = torch.tensor(prediction), torch.tensor(label)
    return dict(
        pred_sem_seg=dict(data=prediction[None]),
        gt_sem_seg=dict(data=label[None]))


def evaluate(samples, unseen=('truck', ), classes=CLASSES, **kwargs):
    metric = METRICS.build(
        dict(type='ZeroShotIoUMetric', unseen=unseen, **kwargs))
    assert isinstance(metric, IoUMetric)
    metric.dataset_meta = dict(classes=classes)
    for item in samples:
        metric.process({}, [item])
    return metric.evaluate(len(samples))


def test_case_counted_by_hand():
    metrics = evaluate([
        # truck 2 of 3 found, and one pixel of car called truck.
        sample([[0, 0, 1, 2], [0, 2, 2, 1]], [[0, 0, 1, 1], [0, 2, 2, 2]]),
        # No truck, but one is seen: counts for the class, not for FB-IoU.
        sample([[0, 2, 1, 1]], [[0, 0, 1, 255]]),
    ])
    # road 4 of 5, car 2 of 4, truck 2 of 5; pole is nowhere.
    assert metrics == {
        'aAcc': 72.73,  # 8 of 11
        'mIoU': 56.67,
        'mAcc': pytest.approx(100 * (4 / 5 + 2 / 3 + 2 / 3) / 3, abs=.01),
        'mIoU_seen': 65.,
        'mIoU_unseen': 40.,
        'hIoU': 49.52,  # 2 * .65 * .4 / 1.05
        'FB-IoU': 58.33,  # (2 / 4 + 4 / 6) / 2, of the first image
    }


def test_several_unseen_classes_counted_pixel_by_pixel():
    torch.manual_seed(0)
    classes = tuple('abcdefg')
    pairs = []
    for _ in range(4):
        label = torch.randint(0, 5, (6, 7))  # f and g are nowhere
        label[0, :3] = 255
        flip = torch.rand(6, 7) < .3
        other = torch.randint(0, 6, (6, 7))
        pairs.append((torch.where(flip, other, label) % 7, label))
    metrics = evaluate([sample(p.tolist(), t.tolist()) for p, t in pairs],
                       ('b', 'e', 'f'), classes)

    iou, counts = {}, [0] * 4
    for k, name in enumerate(classes):
        both = either = 0
        for prediction, label in pairs:
            present = bool((label == k).any())
            for p, t in zip(prediction.flatten(), label.flatten()):
                if t == 255:
                    continue
                both += int(p == k and t == k)
                either += int(p == k or t == k)
                if present and name in 'bef':
                    counts[0] += int(p == k and t == k)
                    counts[1] += int(p == k or t == k)
                    counts[2] += int(p != k and t != k)
                    counts[3] += int(p != k or t != k)
        iou[name] = both / either if either else math.nan
    assert math.isnan(iou['g']) and iou['f'] == 0
    seen = sum(iou[c] for c in 'acd') / 3
    unseen = sum(iou[c] for c in 'bef') / 3
    expected = dict(
        mIoU_seen=seen,
        mIoU_unseen=unseen,
        hIoU=2 / (1 / seen + 1 / unseen),
        mIoU=(3 * seen + 3 * unseen) / 6)
    expected['FB-IoU'] = (counts[0] / counts[1] + counts[2] / counts[3]) / 2
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(100 * value, abs=.006), key


def test_extremes():
    perfect = [sample([[0, 1, 2, 3]], [[0, 1, 2, 3]])]
    for key, value in evaluate(perfect).items():
        assert value == 100, key
    # The unseen class is always taken for a seen one.
    metrics = evaluate([sample([[0, 1, 1, 3]], [[0, 1, 2, 3]])])
    assert metrics['mIoU_unseen'] == metrics['hIoU'] == 0
    assert metrics['FB-IoU'] == 37.5  # (0 + 3 / 4) / 2
    nothing = evaluate([sample([[0, 2]], [[1, 2]])])
    assert nothing['mIoU_seen'] == 0 and nothing['mIoU_unseen'] == 100
    assert nothing['hIoU'] == 0
    both = evaluate([sample([[0, 2]], [[2, 0]])])
    assert both['hIoU'] == both['FB-IoU'] == 0
    # No unseen class anywhere: not a number, and no error.
    metrics = evaluate([sample([[0, 1]], [[0, 1]])])
    assert metrics['mIoU_seen'] == 100
    for key in ('mIoU_unseen', 'hIoU', 'FB-IoU'):
        assert math.isnan(metrics[key])


def test_the_rest_is_as_of_iou_metric(tmp_path):
    items = [sample([[0, 1, 2, 2, 9]], [[0, 1, 1, 2, 7]])]
    options = dict(ignore_index=7, iou_metrics=['mIoU', 'mDice'], nan_to_num=0)
    stock = IoUMetric(**options)
    stock.dataset_meta = dict(classes=CLASSES)
    for item in items:
        stock.process({}, [item])
    metrics = evaluate(items, **options)
    for key, value in stock.evaluate(1).items():
        assert metrics[key] == value
    # pole, which is nowhere, counts as 0 here.
    assert metrics['mIoU_seen'] == pytest.approx(100 * (1 + .5 + 0) / 3, .01)
    with_prefix = evaluate(items, prefix='zs')
    assert 'zs/hIoU' in with_prefix
    only = METRICS.build(
        dict(
            type='ZeroShotIoUMetric',
            unseen=['car'],
            format_only=True,
            output_dir=str(tmp_path)))
    only.dataset_meta = dict(classes=CLASSES)
    only.process({}, [dict(items[0], img_path='a/7.jpg')])
    assert only.evaluate(1) == {}
    assert (tmp_path / '7.png').is_file()


def test_images_may_come_in_any_order_and_from_any_rank():
    """What is collected is per image, so ranks add up."""
    items = [
        sample([[0, 2, 2, 1]], [[0, 2, 1, 1]]),
        sample([[2, 2, 0, 1]], [[2, 0, 0, 3]]),
        sample([[3, 1, 1, 1]], [[3, 1, 2, 1]])
    ]
    ranks = []
    for part in (items[1:], items[:1]):
        metric = ZeroShotIoUMetric(unseen=['truck', 'pole'])
        metric.dataset_meta = dict(classes=CLASSES)
        metric.process({}, part)
        ranks.append(metric)
    together = ranks[0].compute_metrics(ranks[0].results + ranks[1].results)
    alone = evaluate(items, ('truck', 'pole'))
    assert together == alone and not any(map(math.isnan, alone.values()))


@each_case('unseen, match', [
    (['truck', 'lorry', 'bus'
      ], r"no classes \['lorry', 'bus'\].*It has \['road', 'car'"),
    (CLASSES, 'all classes of the dataset are unseen'),
])
def test_classes_that_do_not_fit(unseen, match):
    with pytest.raises(ValueError, match=match):
        evaluate([sample([[0]], [[0]])], unseen)


@each_case('options, match', [
    (dict(unseen=[]), 'at least one, but got'),
    (dict(unseen='truck'), "list of class names.*'truck'"),
    (dict(unseen=['car', 'car']), 'names a class twice'),
    (dict(unseen=['car'], iou_metrics=['mDice']), "must contain 'mIoU'"),
    (dict(unseen=['car'], iou_metrics='mDice'), r"got \['mDice'\]"),
])
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ZeroShotIoUMetric(**options)
