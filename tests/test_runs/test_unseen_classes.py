# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Classes whose labels training has not seen are found, by their names.

The toy configs as they are, at their full length: some minutes, and so no
part of the suite nor of `.ci/run`: `tools/scheduled_newest.sh` runs them.
"""
import json
from pathlib import Path

import mmcv
import numpy as np
import pytest
from processes import TOOLS, start

from mmseg_textkd.datasets.toy_scenes_painter import CLASSES

CONFIGS = Path(TOOLS).parent / 'configs'
UNSEEN = ('car', 'truck')

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A folder with ToyScenes."""
    folder = tmp_path_factory.mktemp('unseen')
    done = start(
        'python', f'{TOOLS}/dataset_converters/toy_scenes.py', cwd=folder)
    assert done.status == 0, done.output
    return folder


def everywhere(home):
    """IoU of the unseen classes if each were predicted everywhere.

    That is their share of the labeled pixels, in percent.
    """
    counts = np.zeros(256)
    for path in (home / 'data/toy_scenes/ann_dir/val').glob('*.png'):
        labels = mmcv.imread(path, flag='unchanged')
        counts += np.bincount(labels.ravel(), minlength=256)
    shares = 100 * counts / counts[:len(CLASSES)].sum()
    return np.mean([shares[CLASSES.index(name)] for name in UNSEEN])


def run(home, tool, config, *words):
    """Run a tool; get what it has measured."""
    words = 'python', f'{TOOLS}/{tool}.py', CONFIGS / config, *words
    done = start(*words, cwd=home, timeout=1800.)
    assert done.status == 0, done.output
    logs = home.glob('work_dirs/**/2*.json')
    last = max(logs, key=lambda path: path.stat().st_mtime)
    return json.loads(last.read_text().splitlines()[-1])


def test_ebseg(home):
    found = run(home, 'train',
                'ebseg/ebseg_toyclip_1xb4-200i_toy-scenes-128x256.py',
                '--cfg-options', 'randomness.seed=1')
    assert found['mIoU_unseen'] > 2 * everywhere(home)
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
    assert alone['mIoU_unseen'] > 2 * everywhere(home)
    assert alone['mIoU_unseen'] > supervised['mIoU_unseen']
    assert supervised['mIoU_seen'] > 35
