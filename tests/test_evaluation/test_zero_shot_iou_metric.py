# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""ZeroShotIoUMetric against cases counted by hand and pixel by pixel."""
import math

import pytest
import torch
from each_case import each_case
from mmseg.evaluation import IoUMetric
from mmseg.registry import METRICS

pytestmark = pytest.mark.stacks

CLASSES = ('road', 'car', 'truck', 'pole')


def sample(prediction, label, **more):
    prediction, label = (
        dict(data=torch.as_tensor(x)[None]) for x in (prediction, label))
    return dict(pred_sem_seg=prediction, gt_sem_seg=label, **more)


def build(samples=(), unseen=('truck', ), classes=CLASSES, **options):
    """A metric that has seen some samples."""
    metric = METRICS.build(
        dict(type='ZeroShotIoUMetric', unseen=unseen, **options))
    metric.dataset_meta = dict(classes=classes)
    for item in samples:
        metric.process({}, [item])
    return metric


def evaluate(samples, *args, **options):
    return build(samples, *args, **options).evaluate(len(samples))


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


def test_several_unseen_classes_against_an_independent_count():
    classes = 'abcdefg'
    label = torch.randint(0, 5, (4, 6, 7))  # f and g are nowhere
    label[:, 0, :3] = 255
    flip = torch.rand(label.shape) < .3
    guess = torch.randint(0, 6, label.shape).where(flip, label) % 7
    metrics = evaluate(list(map(sample, guess, label)), tuple('bef'), classes)

    def areas(a, b):
        """Intersection and union of two masks, in what is labeled."""
        known = label != 255
        return torch.stack([(a & b & known).sum((1, 2)), ((a | b) & known).sum(
            (1, 2))])

    iou, foreground, background = {}, 0, 0
    for k, name in enumerate(classes):
        own = areas(guess == k, label == k)
        both, either = own.sum(1).tolist()
        iou[name] = both / either if either else math.nan
        if name in 'bef':
            present = (label == k).any(2).any(1)
            foreground += own[:, present].sum(1)
            others = areas(guess != k, label != k)
            background += others[:, present].sum(1)
    assert math.isnan(iou['g']) and iou['f'] == 0
    seen, unseen = (sum(iou[c] for c in part) / 3 for part in ('acd', 'bef'))
    expected = {
        'mIoU_seen': seen,
        'mIoU_unseen': unseen,
        'hIoU': 2 / (1 / seen + 1 / unseen),
        'mIoU': (seen + unseen) / 2,
        'FB-IoU': sum(
            (a[0] / a[1]).item() for a in (foreground, background)) / 2
    }
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
    items = [sample([[0, 1, 2, 2, 9]], [[0, 1, 1, 2, 7]], img_path='a/7.jpg')]
    options = dict(ignore_index=7, iou_metrics=['mIoU', 'mDice'], nan_to_num=0)
    stock = IoUMetric(**options)
    stock.dataset_meta = dict(classes=CLASSES)
    stock.process({}, items)
    metrics = evaluate(items, **options)
    assert metrics == {**metrics, **stock.evaluate(1)}
    # pole, which is nowhere, counts as 0 here.
    assert metrics['mIoU_seen'] == pytest.approx(100 * (1 + .5 + 0) / 3, .01)
    assert 'zs/hIoU' in evaluate(items, prefix='zs')
    only = dict(format_only=True, output_dir=str(tmp_path))
    assert evaluate(items, **only) == {}
    assert (tmp_path / '7.png').is_file()


def test_images_may_come_in_any_order_and_from_any_rank():
    """What is collected is per image, so ranks add up."""
    items = [
        sample([[0, 2, 2, 1]], [[0, 2, 1, 1]]),
        sample([[2, 2, 0, 1]], [[2, 0, 0, 3]]),
        sample([[3, 1, 1, 1]], [[3, 1, 2, 1]])
    ]
    unseen = ('truck', 'pole')
    first, second = build(items[1:], unseen), build(items[:1], unseen)
    together = first.compute_metrics(first.results + second.results)
    alone = evaluate(items, unseen)
    assert together == alone and not any(map(math.isnan, alone.values()))


@each_case('options, match', [
    (dict(unseen=['truck', 'lorry', 'bus']),
     r"no classes \['lorry', 'bus'\].*It has \['road', 'car'"),
    (dict(unseen=CLASSES), 'all classes of the dataset are unseen'),
    (dict(unseen=[]), 'at least one, but got'),
    (dict(unseen='truck'), "list of class names.*'truck'"),
    (dict(unseen=['car', 'car']), 'names a class twice'),
    (dict(iou_metrics=['mDice']), "must contain 'mIoU'"),
    (dict(iou_metrics='mDice'), r"got \['mDice'\]"),
])
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        evaluate([sample([[0]], [[0]])], **options)
