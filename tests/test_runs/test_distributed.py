# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Two processes over gloo, through the switch of the stages."""
import json

import numpy as np
import pytest
import torch
from processes import TOOLS, TRAIN, free_port, load, start, start_ranks
from tiny import CLASSES, residual, tiny_config, watch, without_loops

pytestmark = pytest.mark.stacks

ITERS, SWITCH = 6, 3
OFFSET = 'decode_head.conv_seg.text.offset'


def write_config(root, name, batch_size=2, hooks=(), **options):
    """Residual prompts on vectors that the first run has to make."""
    file = root / 'text' / 'toy.safetensors'
    build = dict(model='toyclip', vocabulary=list(CLASSES), templates='photo')
    text = residual(file, build=build)
    hook, options['log_level'] = dict(switch_at=SWITCH), 'INFO'
    cfg = tiny_config(root, text, hook, ITERS, **options)
    watch(cfg, *hooks)
    cfg.default_hooks.checkpoint.interval = ITERS
    if name != 'with':
        without_loops(cfg)
    cfg.train_dataloader.batch_size = batch_size
    cfg.dump(str(root / f'{name}.py'))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('ddp')
    # Stock configs have SyncBN, which torch has on GPUs only.
    norms = [f'model.{part}.norm_cfg' for part in ('backbone', 'decode_head')]
    write_config(root, 'with', **dict.fromkeys(norms, dict(type='SyncBN')))
    write_config(root, 'without', find_unused_parameters=False)
    # Batches of the same four images, in two processes or in one; the
    # frozen norms do not normalize yet, so it takes large steps to learn.
    frozen = {'hooks': ['FrozenNormHook'], 'optim_wrapper.optimizer.lr': 0.5}
    write_config(root, 'two', **frozen)
    write_config(root, 'one', batch_size=4, **frozen)

    def train(name):
        words = root / f'{name}.py', '--work-dir', root / name
        if name == 'with':  # as a user does
            words = f'{TOOLS}/dist_train.sh', words[0], '2', *words[1:]
            return start('bash', *words, cwd=root, PORT=free_port())
        words = TRAIN, *words
        if name == 'one':
            return start('python', *words, cwd=root)
        return start_ranks(*words, cwd=root)

    return root, {n: train(n) for n in ('with', 'without', 'two', 'one')}


def reports(root, name):
    """What each rank of a run tells."""
    files = sorted((root / name).glob('report_*.json'))
    return [json.loads(file.read_text()) for file in files]


def test_both_ranks_go_through_the_switch_and_stay_equal(runs):
    root, outcomes = runs
    done = outcomes['with']
    assert done.status == 0, done.output[-4000:]
    assert 'Expected to have finished reduction' not in done.output
    first, second = reports(root, 'with')
    assert first['iters'] == second['iters'] == list(range(ITERS))
    assert first['learns'] == second['learns']
    assert [OFFSET in learns for learns in first['learns']
            ] == [i >= SWITCH for i in range(ITERS)]
    params = {n for learns in first['learns'] for n in learns}
    params.add(OFFSET.replace('offset', 'class_embeddings'))
    assert len(params) > 20
    for name in params:
        assert first['sums'][name] == second['sums'][name], name
    # They have seen different images, so each rank had its own statistics.
    # Stage 2, which freezes them, has those that are saved.
    assert first['sums'] == second['sums']
    assert done.output.count('each rank has statistics of its own') == 1
    saved = load(root / 'with' / f'iter_{ITERS}.pth')['state_dict']
    assert saved[OFFSET].shape == (len(CLASSES), 64)
    assert saved[OFFSET].abs().max() > 0
    assert float(saved[OFFSET].double().sum()) == first['sums'][OFFSET]


def test_shared_files_have_one_writer(runs):
    root, outcomes = runs
    # The lock that settles who makes the vectors is not a shared file.
    first, second = ({
        path
        for path in report['written']
        if path.startswith(str(root)) and not path.endswith('.lock')
    } for report in reports(root, 'with'))
    vectors = {str(root / 'text' / 'toy.safetensors')}
    assert outcomes['with'].output.count('Made ') == 1
    assert len(vectors & first) + len(vectors & second) == 1
    # Of all else rank 1 has written nothing.
    assert not second - vectors
    work = root / 'with'
    logs = {str(path) for path in work.rglob('*.log')}
    assert len(logs) == 1
    assert logs | {str(work / f'iter_{ITERS}.pth')} <= first


def test_two_processes_train_as_one_with_their_batches(runs):
    """The same curve and the same network, to rounding."""
    root, outcomes = runs
    for name in ('two', 'one'):
        assert outcomes[name].status == 0, outcomes[name].output[-4000:]
    first, second = reports(root, 'two')
    one, = reports(root, 'one')
    for a, b, both in zip(first['images'], second['images'], one['images']):
        assert len(a) == len(b) == 2 and sorted(a + b) == sorted(both)
    assert first['images'] != second['images']
    assert one['learns'] == first['learns'] == second['learns']
    losses = np.array([first['losses'], second['losses']])
    assert losses.shape == (2, ITERS)
    # Neither rank has the mean's loss by itself, and the loss moves.
    assert (abs(losses[0] / losses[1] - 1) > 1e-3).all()
    curve = np.array(one['losses'])
    assert np.ptp(curve[:SWITCH]) > 0.02 and np.ptp(curve[SWITCH:]) > 0.02
    np.testing.assert_allclose(losses.mean(0), curve, rtol=1e-5)
    two, one = (
        load(root / name / f'iter_{ITERS}.pth')['state_dict']
        for name in ('two', 'one'))
    assert two.keys() == one.keys()
    for key, value in two.items():
        torch.testing.assert_close(
            value, one[key], rtol=1e-4, atol=1e-6, msg=f'{key}: {{}}'.format)


def test_without_find_unused_parameters_the_hook_says_so(runs):
    root, outcomes = runs
    done = outcomes['without']
    assert done.status != 0
    assert 'add the line `find_unused_parameters = True`' in done.output
    assert not list((root / 'without').glob('*.pth'))
