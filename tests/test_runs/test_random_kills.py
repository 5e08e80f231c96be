# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""kill -9 at random moments, then ``--resume``: nothing is lost.

Some minutes, and so no part of the suite. `.ci/run` runs it.
"""
import json
import random
import signal
import time

import pytest
from processes import load, train
from tiny import RESIDUAL, assert_equal, tiny_config, watch

pytestmark = pytest.mark.slow

ITERS, SWITCH, INTERVAL, IMAGES = 12, 7, 3, 6
KILLS = 6  # of each kind, at least


def write_config(root):
    """Two stages; checkpoints, validation and the best one of them."""
    hook = dict(switch_at=SWITCH, log_interval=1)
    cfg = tiny_config(root, RESIDUAL, hook, ITERS)
    watch(cfg)
    cfg.train_cfg.val_interval = INTERVAL
    cfg.default_hooks.checkpoint.update(interval=INTERVAL, save_best='mIoU')
    cfg.default_hooks.logger.log_metric_by_epoch = False
    cfg.log_level = 'INFO'
    cfg.dump(str(root / 'config.py'))


def outcome(work):
    """All that a run leaves: its end, its validation curve and its best."""
    end, (best, ) = load(work / f'iter_{ITERS}.pth'), work.glob('best_*.pth')
    curve = {}
    for path in work.glob('*/vis_data/scalars.json'):
        for line in map(json.loads, path.read_text().splitlines()):
            if 'mIoU' in line:
                # Nor is anything validated twice with another result.
                assert curve.setdefault(line['step'], line['mIoU']) == (
                    line['mIoU'])
    parts = ('state_dict', 'optimizer', 'param_schedulers')
    found = {part: end[part] for part in parts}
    found.update(best=best.name, best_state=load(best)['state_dict'])
    return dict(found, curve=dict(sorted(curve.items())))


def test_it_ends_as_if_nothing_had_happened(tmp_path):
    """Runs killed up to three times, at any moment and in validation."""
    write_config(tmp_path)

    def run(name, *words, timeout=600., fate='none 0'):
        options = dict(timeout=timeout, FATE=fate)
        config = tmp_path / 'config.py'
        return train(tmp_path, config, tmp_path / name, *words, **options)

    # The first also starts the server of forks.
    for name in ('whole', 'again'):
        began = time.monotonic()
        done = run(name)
        seconds = time.monotonic() - began
        assert done.status == 0, done.output[-3000:]
    whole = outcome(tmp_path / 'whole')
    assert_equal(outcome(tmp_path / 'again'), whole)
    assert list(whole['curve']) == list(range(INTERVAL, ITERS + 1, INTERVAL))
    rng, kills, story = random.Random(0), dict(moment=0, image=0), 0
    while min(kills.values()) < KILLS:
        name, words, story = f'killed_{story}', [], story + 1
        for how in rng.choices(list(kills), k=3):
            try:
                if how == 'moment':  # whatever it is at
                    at = seconds * rng.random()
                    done = run(name, *words, timeout=at)
                else:
                    at = rng.randint(1, IMAGES * ITERS // INTERVAL)
                    done = run(name, *words, fate=f'image {at}')
            except TimeoutError:  # by signal 9
                done = None
            if done and done.status == 0:
                break
            assert not done or done.status == -signal.SIGKILL, done.output
            kills[how] += 1
            words = ['--resume']
        else:
            done = run(name, *words)
            assert done.status == 0, done.output[-3000:]
        assert_equal(outcome(tmp_path / name), whole, name)
