# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What the metrics that are made of ``IoUMetric`` have in common."""
import pytest
import torch
import torch.distributed as dist
from mmseg.registry import METRICS
from processes import run_ranks

SPACES = dict(lane=dict(words=('road', 'car'), space=[0, 1]))
META = dict(classes=('road', 'car'), label_spaces=SPACES)


def build(kind, **options):
    metric = METRICS.build(dict(type=kind, iou_metrics=['mIoU'], **options))
    metric.dataset_meta = META
    return metric


def item():
    logits = torch.tensor([[[2., 0.]], [[1., 1.]]])
    return dict(
        seg_logits=dict(data=logits),
        pred_sem_seg=dict(data=logits.argmax(dim=0, keepdim=True)),
        gt_sem_seg=dict(data=torch.tensor([[[0, 0]]])),
        dataset='lane',
        img_path='videos/7.jpg')


def test_an_evaluation_does_not_count_the_one_before():
    metric = build('ConfusionIoUMetric')
    for _ in range(2):
        metric.process({}, [item()])
        metric.evaluate(1)
        assert metric.result['confusion'] == [[1, 1], [0, 0]]


def evaluate(rank, size, folder):
    """An evaluation in one of several processes, twice."""
    dist.init_process_group(
        'gloo', f'file://{folder}/store', rank=rank, world_size=size)
    metric = build('ConfusionIoUMetric')
    for _ in range(2):
        metric.process({}, [item()])
        metric.evaluate(size)
    torch.save((getattr(metric, 'result', None), metric.confusion),
               f'{folder}/{rank}.pth')


def test_several_processes_have_no_confusions_of_all(tmp_path):
    run_ranks(evaluate, tmp_path)
    results, left = zip(*(torch.load(tmp_path / f'{rank}.pth')
                          for rank in range(2)))
    assert results[0]['images'] == 2 and results[0]['confusion'] is None
    assert results[0]['IoU'] == [50., 0.] and left == (0, 0)


@pytest.mark.parametrize('ignore_index', [255, -1, -100])
def test_labels_that_are_ignored_are_no_class(ignore_index):
    metric = build('DatasetIoUMetric', dataset='lane')
    metric.ignore_index = ignore_index
    data = item()
    data['gt_sem_seg']['data'] = torch.tensor([[[ignore_index, 1]]])
    metric.process({}, [data])
    found = metric.evaluate(1)
    assert [v for k, v in found.items() if k.endswith('aAcc')] == [100]


@pytest.mark.parametrize('kind, options', [
    ('ConfusionIoUMetric', {}),
    ('VideoConsistencyMetric', {}),
    ('DatasetIoUMetric', dict(dataset='lane')),
])
def test_predictions_alone(tmp_path, kind, options):
    """Of images that may have no labels."""
    metric = build(kind, format_only=True, output_dir=str(tmp_path), **options)
    data = item()
    del data['gt_sem_seg']
    metric.process({}, [data])
    assert metric.evaluate(1) == {}
    assert (tmp_path / '7.png').is_file()
