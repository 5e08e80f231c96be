# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Two processes over gloo, through the switch of the stages."""
import json
import os.path as osp
import socket

import pytest
from processes import TOOLS, load, side_by_side, start
from tiny import CLASSES, tiny_config

ITERS, SWITCH = 4, 2
OFFSET = 'decode_head.conv_seg.text.offset'


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('ddp')
    text = dict(
        type='ResidualPromptLearner',
        embeddings=dict(type='ControlEmbeddings', kind='random', dim=16))
    cfg = tiny_config(
        root, text, dict(switch_at=SWITCH), max_iters=ITERS, log_level='INFO')
    cfg.custom_imports.imports.append('fate_hook')
    cfg.custom_hooks.insert(0, dict(type='FateHook'))
    cfg.default_hooks.checkpoint.interval = ITERS
    # MMEngine's default, but for the CUDA device that it names.
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=True)
    cfg.dump(str(root / 'with.py'))
    cfg.model_wrapper_cfg.pop('find_unused_parameters')
    cfg.dump(str(root / 'without.py'))

    def train(name):
        return start(
            'bash',
            osp.join(TOOLS, 'dist_train.sh'),
            root / f'{name}.py',
            '2',
            '--work-dir',
            root / name,
            cwd=root,
            PORT=free_port())

    return root, side_by_side(
        {name: lambda name=name: train(name)
         for name in ('with', 'without')},
        width=1)


def test_both_ranks_go_through_the_switch_and_stay_equal(runs):
    root, outcomes = runs
    done = outcomes['with']
    assert done.status == 0, done.output[-4000:]
    assert 'Expected to have finished reduction' not in done.output
    first, second = (
        json.loads((root / 'with' / f'report_{rank}.json').read_text())
        for rank in (0, 1))
    assert first['iters'] == second['iters'] == list(range(ITERS))
    assert first['learns'] == second['learns']
    assert [OFFSET in learns for learns in first['learns']
            ] == [i >= SWITCH for i in range(ITERS)]
    params = {n for learns in first['learns'] for n in learns}
    params.add(OFFSET.replace('offset', 'class_embeddings'))
    assert len(params) > 100
    for name in params:
        assert first['sums'][name] == second['sums'][name], name
    # They have seen different pictures: each rank has its own statistics.
    means = [n for n in first['sums'] if 'running_mean' in n]
    assert any(first['sums'][n] != second['sums'][n] for n in means)
    saved = load(root / 'with' / f'iter_{ITERS}.pth')['state_dict']
    assert saved[OFFSET].shape == (len(CLASSES), 16)
    assert saved[OFFSET].abs().max() > 0
    assert float(saved[OFFSET].double().sum()) == first['sums'][OFFSET]


def test_without_find_unused_parameters_the_hook_says_so(runs):
    root, outcomes = runs
    done = outcomes['without']
    assert done.status != 0
    assert 'add the line `find_unused_parameters = True`' in done.output
    assert not list((root / 'without').glob('*.pth'))
