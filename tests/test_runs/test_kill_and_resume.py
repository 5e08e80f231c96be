# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""kill -9, then ``--resume``, with MMSegmentation's own tool."""
import json
import signal

import numpy as np
import pytest
from each_case import each_case
from processes import STOCK_TRAIN, load, side_by_side, train
from tiny import (CLASSES, PROMPTS, assert_equal, changed, tiny_config, watch,
                  without_loops)

from mmseg_textkd.clip import TextTower
from mmseg_textkd.text.encode_classes import encode_classes

pytestmark = pytest.mark.stacks

ITERS, SWITCH, INTERVAL = 8, 4, 2
# What is trained; where its run is killed, again and again, and the iteration
# that it then goes on with: in stage 1, at the switch, in stage 2, and while a
# checkpoint is written.
FATES = dict(
    classifier=[('iter 3', 2), ('write 6', 4)],
    score_map=[('iter 4', 4), ('step 4', 4), ('iter 7', 6)])
CONTEXT = dict(
    classifier='decode_head.conv_seg.text.context',
    score_map='score_map.text.context')
# What else learns in stage 2.
LEARN = dict(
    classifier=('log_scale', 'logit_bias'), score_map=(r'score_map\.convs', ))


def write_config(folder, kind):
    """Stage 2 through ToyCLIP; the backbone goes on at a lower rate."""
    file = str(folder / 'text.safetensors')
    encode_classes(list(CLASSES), 'toyclip', 'photo').save(file)
    text = dict(PROMPTS, embeddings=dict(type='ClassEmbeddings', file=file))
    learn = dict.fromkeys(('context', *LEARN[kind]), 1.)
    schedule = [
        dict(type='LinearLR', start_factor=0.5, end=2),
        dict(type='CosineAnnealingLR', eta_min=0.)
    ]
    hook = dict(
        switch_at=SWITCH,
        learn=dict(learn, backbone=0.1),
        param_scheduler=schedule,
        log_interval=1)
    if kind == 'classifier':
        cfg = tiny_config(folder, text, hook, max_iters=ITERS)
    else:
        cfg = tiny_config(folder, None, hook, max_iters=ITERS)
        cfg.model.type = 'TextKD'
        cfg.model.score_map = dict(
            in_channels=8,
            projection=True,
            text=text,
            feature='backbone',
            convs=['decode_head.convs.0.conv'])
    watch(cfg)
    cfg.default_hooks.checkpoint.interval = INTERVAL
    without_loops(cfg)
    cfg.log_level = 'INFO'
    cfg.dump(str(folder / f'{kind}.py'))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Of each kind a run from start to end, and one that is killed."""
    root = tmp_path_factory.mktemp('kill')
    for kind in CONTEXT:
        write_config(root, kind)

    def run(name, kind, fate, *words):
        config, fate = root / f'{kind}.py', dict(FATE=fate, tool=STOCK_TRAIN)
        done = train(root, config, root / name, *words, **fate)
        return done, sorted(p.name for p in (root / name).glob('iter_*.pth'))

    def story(kind):
        outcomes, words = [], []
        for fate, _ in FATES[kind]:
            outcomes.append(run(kind, kind, fate, *words))
            words = ['--resume']
        return outcomes + [run(kind, kind, 'none 0', *words)]

    def whole(kind):
        return [run(f'whole_{kind}', kind, 'none 0')]

    jobs = {kind: lambda kind=kind: story(kind) for kind in FATES}
    jobs.update({f'whole_{k}': lambda kind=k: whole(kind) for k in FATES})
    return root, side_by_side(jobs)


def report(folder):
    return json.loads((folder / 'report_0.json').read_text())


@each_case('kind', CONTEXT)
def test_the_run_that_nobody_kills(runs, kind):
    """That there is something to lose: all parts move, in either stage."""
    root, outcomes = runs
    context, whole = CONTEXT[kind], root / f'whole_{kind}'
    done, saved = outcomes[whole.name][0]
    assert done.status == 0, done.output[-3000:]
    assert saved == [f'iter_{i}.pth' for i in range(2, ITERS + 1, INTERVAL)]
    facts, tower = report(whole), TextTower('toyclip')
    assert facts['iters'] == list(range(ITERS))
    # The tower comes while the first iteration of stage 2 is being prepared.
    without = SWITCH + 1
    assert facts['held'] == [False] * without + [True] * (ITERS - without)
    # Bit for bit what a fresh one is, and nowhere.
    assert facts['towers'] == [tower.checksum()]
    assert facts['tower_graded'] == []
    assert 'ContextPromptLearner' in facts['inside']
    assert not {'TextTower', 'Transformer', 'CLIP'} & set(facts['inside'])
    assert 'UNKNOWN' not in facts['optimized']
    assert context in facts['optimized']
    for i, learns in enumerate(facts['learns']):
        assert (context in learns) == (i >= SWITCH)
        assert any('decode_head.convs' in n for n in learns) == (i < SWITCH)
    at_switch, end = (load(whole / f'iter_{i}.pth') for i in (SWITCH, ITERS))
    for state, stage in ((at_switch, 1), (end, 2)):
        text = state['message_hub']['log_scalars']['train/text_stage']
        assert text.current() == stage
        assert state['state_dict'][context.replace('context', 'started')] == (
            stage == 2)
    keys = {k for k in end['state_dict'] if '.text.' in k}
    names = 'class_embeddings', 'context', 'started'
    assert keys == {context.replace('context', name) for name in names}
    # One entry for each parameter that has ever had a step.
    groups = end['optimizer']['param_groups']
    assert sum(len(g['params']) for g in groups) == len(facts['optimized'])
    size = sum(p.numel() for p in tower.parameters())
    size += 3 * sum(v.numel() for v in end['state_dict'].values())
    assert (whole / f'iter_{ITERS}.pth').stat().st_size < 4 * size
    moved = changed(at_switch['state_dict'], end['state_dict'])
    assert context in moved
    assert context.replace('context', 'class_embeddings') in moved
    assert any('backbone' in k and 'running_var' in k for k in moved)
    assert kind != 'score_map' or any('score_map.convs' in k for k in moved)
    assert end['optimizer']['state'] and end['param_schedulers']


def test_fates_are_as_planned(runs):
    """Killed by signal 9, and gone on where the last checkpoint was."""
    root, outcomes = runs
    for name, fates in FATES.items():
        *killed, last = outcomes[name]
        assert len(killed) == len(fates)
        for (fate, go_on), (done, saved) in zip(fates, killed):
            assert done.status == -signal.SIGKILL, (name, done.output[-3000:])
            whole = [f'iter_{i}.pth' for i in range(2, go_on + 1, INTERVAL)]
            half = [f'iter_{fate[6:]}.pth'] if fate[:5] == 'write' else []
            assert saved == whole + half
        done, _ = last
        assert done.status == 0, (name, done.output[-3000:])
        first = fates[-1][1]
        assert f'resumed epoch: 0, iter: {first}' in done.output
        facts = report(root / name)
        assert facts['iters'] == list(range(first, ITERS))


@each_case('kind', FATES)
def test_it_ends_as_if_nothing_had_happened(runs, kind):
    root, _ = runs
    whole, resumed = (
        load(root / n / f'iter_{ITERS}.pth') for n in (f'whole_{kind}', kind))
    assert whole.keys() == resumed.keys()
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_equal(whole[part], resumed[part], part)
    logs = [x['message_hub']['log_scalars'] for x in (whole, resumed)]
    for key in ('train/loss', 'train/lr'):
        curves = [log[key].data[0] for log in logs]
        assert len(curves[0]) == ITERS
        np.testing.assert_array_equal(*curves)
    for key in ('train/text_stage', 'train/text_distance', 'train/text_scale'):
        if kind == 'score_map' and key == 'train/text_scale':
            continue  # it has none: the temperature is fixed
        ends = [log[key].current() for log in logs]
        assert ends[0] == ends[1] != 0, key
    facts, expected = report(root / kind), report(root / f'whole_{kind}')
    number = len(facts['iters'])
    assert facts['learns'] == expected['learns'][-number:]
    assert facts['towers'] == expected['towers']
    assert facts['graded'] == expected['graded']
