# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Wrong weights are no result, and a kill costs no validation."""
import json
import sys
from collections import OrderedDict

import pytest
import torch
from each_case import each_case
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from tiny import AUXILIARY, RESIDUAL, assert_equal, run, stop, tiny_config
from tool_modules import load_tool

from mmseg_textkd.utils.checkpoint import load_file


def config(folder, name='text', **options):
    """Four iterations, of which every second is validated."""
    text, hook = RESIDUAL, dict(switch_at=3)
    if name == 'stock':
        text = hook = None
    cfg = tiny_config(folder, text, hook, 4, 2, log_level='WARNING', **options)
    cfg.model.auxiliary_head = [AUXILIARY]
    cfg.train_cfg.val_interval = 2
    cfg.default_hooks.checkpoint.save_best = 'mIoU'
    cfg.default_hooks.logger.log_metric_by_epoch = False
    if name == 'averaged':
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.1))
        cfg.optim_wrapper.optimizer.lr = 0.5
    return cfg


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A text network and its stock twin, trained: folders by name."""
    root = tmp_path_factory.mktemp('runs')
    folders = {name: root / name for name in ('text', 'stock', 'averaged')}
    for name, folder in folders.items():
        cfg = config(root, name, work_dir=str(folder))
        run(cfg)
        cfg.dump(folder / 'config.py')
    return folders


@pytest.fixture
def tool(monkeypatch):
    """Run a tool in this process."""

    def run(name, *words):
        module = load_tool(f'{name}.py')
        # Logs and curves of a name belong to the first run of the process, and
        # names of runs within a second are the same.
        for kind in (MMLogger, MessageHub, Visualizer):
            monkeypatch.setattr(kind, '_instance_dict', OrderedDict())
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, words)])
        module.main()

    return run


def without(part):

    def damage(checkpoint):
        for key in list(checkpoint['state_dict']):
            if key.startswith(part):
                del checkpoint['state_dict'][key]

    return damage


def with_weight(key, value):
    return lambda c: c['state_dict'].update({key: torch.as_tensor(value)})


def renamed(checkpoint):
    meta = checkpoint['meta']['dataset_meta']
    meta['classes'] = [n.replace('road', 'river') for n in meta['classes']]


def first_class_last(checkpoint):
    names = checkpoint['meta'].pop('dataset_meta')['classes']
    # As MMSegmentation 0.x wrote them.
    checkpoint['meta']['CLASSES'] = (*names[1:], names[0])


WEIGHT = 'decode_head.convs.0.conv.weight'
# What was done to a checkpoint, and what a test and a resumed run say.
DAMAGES = [
    (without('backbone.layer1'), 'missing: backbone.layer1',
     'changed.pth.*cannot be resumed[^§]*missing: backbone.layer1'),
    (without(''), 'missing: backbone', 'to resume from has none'),
    (with_weight('decode_head.extra', 1.), 'unexpected: decode_head.extra',
     'unexpected: decode_head.extra'),
    (with_weight(WEIGHT, torch.ones(2, 3)),
     r'convs.0.conv.weight \(2, 3\) instead of', r'weight \(2, 3\) instead'),
    (with_weight(WEIGHT, float('nan')), r'NaN or infinite.*convs.0',
     r'NaN or infinite.*convs.0'),
    (renamed, "2: 'river' in the checkpoint, 'road' in the data set", None),
    (first_class_last, "0: 'building' in the checkpoint, 'sky' in", None),
]  # yapf: disable


def refused(said):
    """Expect that a tool ends with a reason and no traceback."""
    return pytest.raises(SystemExit, match=f'^Error: [^§]*{said}')


@each_case('damage, said, resumed', DAMAGES)
def test_wrong_weights_are_an_error(trained, tmp_path, tool, capfd, damage,
                                    said, resumed):
    checkpoint = load_file(trained['text'] / 'iter_2.pth')
    damage(checkpoint)
    path = tmp_path / 'changed.pth'
    torch.save(checkpoint, path)
    words = (trained['text'] / 'config.py', path, '--work-dir', tmp_path)
    with refused(f'changed.pth[^§]*{said}'):
        tool('test', *words)
    if resumed:
        with refused(resumed):
            tool('train', words[0], *words[2:], '--resume', path)
    capfd.readouterr()
    if 'NaN' in said:
        with refused('NaN'):
            tool('test', *words, '--no-strict')
        with pytest.raises(ValueError, match='NaN'):
            run(config(tmp_path, load_from=str(path)))
    elif 'instead' not in said:  # MMEngine's own error
        tool('test', *words, '--no-strict')
        said = said.split(':')[-1].strip(' \\')
        assert said in ''.join(p.read_text() for p in tmp_path.rglob('*.log'))


def test_text_folded_and_damaged_weights_are_told_apart(
        trained, tmp_path, tool):
    for ours, theirs, said in [
        ('text', 'stock', 'weights are of a folded or stock one'),
        ('stock', 'text', 'weights are of a text network.*textkd2mmseg')
    ]:
        with refused(said):
            tool('test', trained[ours] / 'config.py',
                 trained[theirs] / 'iter_4.pth', '--work-dir', tmp_path)
    damaged = tmp_path / 'damaged.pth'
    damaged.write_bytes(bytes(99))
    with refused('damaged.pth'):
        tool('test', trained['text'] / 'config.py', damaged, '--work-dir',
             tmp_path)


def test_a_test_needs_no_auxiliary_head(trained, tmp_path, tool):
    cfg, path = trained['text'] / 'config.py', tmp_path / 'stripped.pth'
    whole = trained['text'] / 'iter_4.pth'
    checkpoint = load_file(whole)
    without('auxiliary_head')(checkpoint)
    torch.save(checkpoint, path)
    scores = []
    for file in (whole, path):
        tool('test', cfg, file, '--work-dir', tmp_path / file.stem)
        found, = (tmp_path / file.stem).glob('*/*.json')
        scores.append(json.loads(found.read_text())['mIoU'])
    assert scores[0] == scores[1] > 0
    # Only whole checkpoints are resumed.
    best, = trained['text'].glob('best_*.pth')
    with refused('best_.*state of its optimizer and that of'):
        tool('train', cfg, '--work-dir', tmp_path, '--resume', best)


def curve(folder):
    """Validations by iteration, of all attempts."""
    found = {}
    for path in folder.glob('*/vis_data/scalars.json'):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            if 'mIoU' in entry:
                found.setdefault(entry['step'], []).append(entry['mIoU'])
    return found


@each_case('name, step', [('text', 2), ('stock', 4), ('averaged', 4)])
def test_a_validation_that_was_killed_is_made_up_for(trained, tmp_path, tool,
                                                     name, step):
    cfg = config(tmp_path, name)
    cfg.default_hooks.logger.interval = 1
    stop(cfg, step, 'StopInValidation')
    work = tmp_path / 'work'
    assert step not in curve(work)
    cfg.dump(tmp_path / 'config.py')
    tool('train', tmp_path / 'config.py', '--resume')
    whole = curve(trained[name])
    assert curve(work) == whole and set(whole) == {2, 4}
    best, = trained[name].glob('best_*.pth')
    assert [p.name for p in work.glob('best_*.pth')] == [best.name]
    assert_equal(*(load_file(folder / 'iter_4.pth')['state_dict']
                   for folder in (work, trained[name])))
