# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Classes whose labels training has not seen are found, by their names.

The toy configs as they are, at their full length: some minutes, and so no
part of the suite. `.ci/run` runs them.
"""
import json
from pathlib import Path

import pytest
from processes import TOOLS, start

CONFIGS = Path(TOOLS).parent / 'configs'
UNSEEN = ('car', 'truck')
# What a class would get if it were predicted everywhere: its share of the
# pixels of the 100 validation pictures, in percent.
EVERYWHERE = (4.53 + 0.88) / 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with ToyScenes."""
    folder = tmp_path_factory.mktemp('unseen')
    done = start(
        'python', f'{TOOLS}/dataset_converters/toy_scenes.py', cwd=folder)
    assert done.status == 0, done.output
    return folder


def run(home, tool, config, *words):
    """Run a tool; get what it has measured."""
    done = start(
        'python',
        f'{TOOLS}/{tool}.py',
        CONFIGS / config,
        *words,
        cwd=home,
        timeout=1800.)
    assert done.status == 0, done.output
    logs = sorted(
        home.glob('work_dirs/**/2*.json'),
        key=lambda path: path.stat().st_mtime)
    return json.loads(logs[-1].read_text().splitlines()[-1])


def test_ebseg(home):
    found = run(home, 'train',
                'ebseg/ebseg_toyclip_1xb4-200i_toy-scenes-128x256.py',
                '--cfg-options', 'randomness.seed=1')
    assert found['mIoU_unseen'] > 2 * EVERYWHERE
    assert found['mIoU_seen'] > 40


def test_a_real_time_network_and_what_it_has_of_clip(home):
    config = ('balance/textkd_ddrnet_23-slim_toyclip-balance-zs_1xb8-200i_'
              'toy-scenes-128x256.py')
    run(home, 'train', config, '--cfg-options', 'randomness.seed=0')
    weights, = home.glob('work_dirs/*balance*/iter_200.pth')
    balance = 'model.decode_head.text_branch.balance'
    alone, supervised = (
        run(home, 'test', config, weights, '--cfg-options',
            f'{balance}.alpha={share}', f'{balance}.beta={share}')
        for share in (1, 0))
    assert alone['mIoU_unseen'] > 2 * EVERYWHERE
    assert alone['mIoU_unseen'] > supervised['mIoU_unseen']
    assert supervised['mIoU_seen'] > 35
