# Copyright (c) mmseg_textkd contributors. All rights reserved.
import json
import re

import cv2
import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.runner import Runner, load_state_dict
from processes import load
from tiny import CLASSES
from tool_modules import call, fails, load_tool

from mmseg_textkd.analysis.compare import compare

K = len(CLASSES)


@pytest.fixture(scope='module')
def tool():
    return load_tool('analysis_tools/compare.py')


@pytest.fixture(scope='module')
def compared(tool, stock, text, tmp_path_factory):
    """The stock network and, of another config, the text network."""
    out = tmp_path_factory.mktemp('compared') / 'out'
    call(tool, stock.config, stock.checkpoint(20), text.config,
         text.checkpoint(2), '--out', out, '--cfg-options',
         'val_evaluator.type=mmseg.IoUMetric')
    return out


def read(out, name):
    return json.loads((out / f'{name}.json').read_text())


def evaluate(run, iteration, work_dir):
    """IoUMetric's own summary, and confusions counted pixel by pixel."""
    cfg = Config.fromfile(run.config)
    cfg.experiment_name = f'{run.work_dir.parent.name}_{iteration}'
    cfg.custom_hooks, cfg.work_dir = [], str(work_dir)
    # In `val` alone MMEngine cannot save the best one.
    cfg.default_hooks.checkpoint = None
    runner = Runner.from_cfg(cfg)
    weights = load(run.checkpoint(iteration))['state_dict']
    load_state_dict(runner.model, weights, strict=True)
    metrics = runner.val()
    confusion = np.zeros((K, K), int)
    with torch.no_grad():
        for batch in runner.val_dataloader:
            sample, = runner.model.val_step(batch)
            truth = cv2.imread(sample.seg_map_path, cv2.IMREAD_GRAYSCALE)
            labels = sample.pred_sem_seg.data[0].numpy()
            np.add.at(confusion, (truth, labels), 1)
    return metrics, confusion


@each_case('side', 'ab')
@pytest.mark.stacks
def test_results_are_those_of_the_metric(compared, stock, text, side,
                                         tmp_path):
    run, iteration = (stock, 20) if side == 'a' else (text, 2)
    metrics, confusion = evaluate(run, iteration, tmp_path)
    result = read(compared, side)
    assert result['confusion'] == confusion.tolist()
    assert result['images'] == 6 and tuple(result['classes']) == CLASSES
    for key in ('mIoU', 'mAcc', 'aAcc'):
        assert result[key] == pytest.approx(metrics[key], abs=5e-3)
    hits = np.diag(confusion)
    iou = 100 * hits / (confusion.sum(0) + confusion.sum(1) - hits)
    np.testing.assert_allclose(result['IoU'], iou, atol=6e-3)
    # That they differ, or the comparison would be one of nothing.
    other = read(compared, 'b' if side == 'a' else 'a')
    assert result['confusion'] != other['confusion']
    assert result['config'] == 'tiny_1xb2.py'
    assert result['checkpoint'] == f'iter_{iteration}.pth'


def rows(page, heading):
    """The cells of the table below a heading."""
    below = page.split(heading)[1].split('\n## ')[0]
    lines = [x for x in below.splitlines() if x.startswith('|')][2:]
    return [[c.strip() for c in line.split('|')[1:-1]] for line in lines]


def test_page_has_the_figures(compared):
    page = (compared / 'compare.md').read_text()
    assert '6 images' in page and 'says nothing about seeds' in page
    a, b = read(compared, 'a'), read(compared, 'b')
    for cells, side in zip(rows(page, '# Comparison'), (a, b)):
        expected = [f'{side[k]:.2f}' for k in ('mIoU', 'mAcc', 'aAcc')]
        assert cells[3:] == expected
    table = rows(page, '## IoU')
    assert [cells[0] for cells in table] == list(CLASSES)
    gains = np.subtract(b['IoU'], a['IoU'])
    for cells, x, y, gain in zip(table, a['IoU'], b['IoU'], gains):
        assert cells[1:4] == [f'{x:.2f}', f'{y:.2f}', f'{gain:+.2f}']
        length = int(np.ceil(10 * abs(gain) / abs(gains).max() - 1e-6))
        bar = ('+' if gain > 0 else '-') * length
        assert cells[4] == (f'`{bar}`' if length else '')


def test_pairs_are_the_most_confusable(compared):
    rates = []
    for side in 'ab':
        count = np.array(read(compared, side)['confusion'])
        rates.append(100 * count / count.sum(1, keepdims=True))
    expected = np.sort(np.max(rates, axis=0)[~np.eye(K, dtype=bool)])[::-1]
    pairs = read(compared, 'compare')['pairs']
    highest = [max(pair['a'], pair['b']) for pair in pairs]
    np.testing.assert_allclose(highest, expected[:10], atol=6e-3)
    for pair in pairs:
        i, j = CLASSES.index(pair['truth']), CLASSES.index(pair['taken_for'])
        assert pair['a'] == pytest.approx(rates[0][i, j], abs=6e-3)
        assert pair['b'] == pytest.approx(rates[1][i, j], abs=6e-3)
    page = rows((compared / 'compare.md').read_text(), '## Most confusable')
    for cells, p in zip(page, pairs, strict=True):
        rate = [f'{p[side]:.2f}' for side in 'ab']
        assert cells[:4] == [p['truth'], p['taken_for'], *rate]


def test_picture_shows_the_figures(tool, compared):
    result = read(compared, 'compare')
    left, right = tool.draw(result).axes
    gains = [row['gain'] for row in result['IoU']]
    assert [bar.get_width() for bar in left.patches] == gains
    assert [t.get_text() for t in left.get_yticklabels()] == list(CLASSES)
    widths = [pair[side] for side in 'ab' for pair in result['pairs']]
    assert [bar.get_width() for bar in right.patches] == widths
    picture = cv2.imread(str(compared / 'compare.png'))
    assert picture.shape[1] == 12 * 120 and picture.std() > 10


def test_results_can_be_compared_again(tool, compared, tmp_path):
    paths = [str(compared / f'{side}.json') for side in 'ab']
    call(tool, *paths, '--out', tmp_path / 'again')
    for name in ('compare.json', 'compare.md', 'a.json'):
        again = (tmp_path / 'again' / name).read_text()
        assert again == (compared / name).read_text()
    call(tool, *paths[::-1], '--out', tmp_path / 'back')
    gains = [[row['gain'] for row in read(path, 'compare')['IoU']]
             for path in (compared, tmp_path / 'back')]
    assert gains[1] == [-gain for gain in gains[0]]


def test_class_that_is_nowhere(tool):
    side = dict(images=1, classes=['a', 'b', 'c'], IoU=[50., None, 25.])
    side.update(confusion=[[2, 0, 1], [0, 0, 0], [1, 0, 1]])
    side.update(config='c.py', checkpoint='c', mIoU=37.5, mAcc=60., aAcc=60.)
    result = compare(side, side)
    assert [row['gain'] for row in result['IoU']] == [0, None, 0]
    # Half of c is taken for a, a third of a for c, and b does not exist.
    pairs = [(p['truth'], p['a']) for p in result['pairs']]
    assert pairs == [('c', 50.), ('a', 33.33)]
    assert ['b', '-', '-', '-', ''] in rows(tool.markdown(result), '## IoU')
    with pytest.raises(ValueError, match='other labels'):
        compare(side, dict(side, confusion=[[2, 0, 0], [0] * 3, [1, 0, 2]]))
    with pytest.raises(ValueError, match="classes: .*'c'.*'d'"):
        compare(side, dict(side, classes=['a', 'b', 'd']))


def test_bad_input_is_refused(tool, stock, text, compared, tmp_path, capsys):
    a = stock.config, stock.checkpoint(20)
    json_a, json_b, other = (
        compared / f'{n}.json' for n in ('a', 'b', 'compare'))
    for message, *inputs in [
        ('not of the network', *a, a[0], text.checkpoint(2)),
        ('no.pth', *a, a[0], tmp_path / 'no.pth'),
        ('no JSON object', a[0], json_b),
        ("not the result of one side.*lacks.*'confusion'", json_a, other),
        ('but got 3 files', *a, a[0]),
    ]:
        said = fails(tool, capsys, *inputs, '--out', tmp_path / 'out')
        assert re.search(message, said)
    assert not list(tmp_path.rglob('compare.*'))
