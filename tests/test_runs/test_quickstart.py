# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""tools/quickstart.py: on small data, stopped, beside files of others."""
import fcntl
import json
import os
import re
import signal
import sys
import time

import cv2
import pytest
from processes import ROOT
from tool_modules import load_tool

from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_scenes


@pytest.mark.slow
def test_images_that_are_there_are_taken(tmp_path, monkeypatch):
    """Of any number; and it may be run from any folder."""
    root, elsewhere = tmp_path / 'root', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    generate_toy_scenes(root / 'data/toy_scenes', num_train=3, num_val=2)
    made = sorted(root.rglob('*.png'))
    for name in ('configs', 'demo', 'mmseg_textkd', 'model_zoo', 'tools'):
        (root / name).symlink_to(f'{ROOT}/{name}')
    tool = load_tool('quickstart.py')
    monkeypatch.setattr(tool, 'ROOT', root)
    monkeypatch.setattr(sys, 'argv',
                        ['quickstart.py', '--work-dir', 'out', '--iters', '2'])
    monkeypatch.chdir(elsewhere)
    tool.main()
    assert sorted((root / 'data').rglob('*.png')) == made
    out = elsewhere / 'out'
    text = (out / 'report.json').read_text()
    report = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert report['iterations'] == 2
    for name in tool.ARMS:
        # Some classes are in neither of two images: as IoUMetric counts.
        text = (out / name / 'test.log').read_text()
        found = float(re.search(r'mIoU: ([\d.]+)', text)[1])
        assert report['miou'][name] == pytest.approx(found, abs=.011)
        images = (out / name).rglob('0*.png')
        assert [cv2.imread(str(p)).shape
                for p in images] == [(128, 256, 3)] * 2
    assert cv2.imread(str(out / 'report.png')).std() > 10
    assert cv2.imread(str(out / 'demo.png')).std() > 10


def test_waiting_threads_leave_the_cores_to_others(tmp_path, monkeypatch):
    tool = load_tool('quickstart.py')
    show = ('import os; print(*map(os.environ.get, '
            "('OMP_WAIT_POLICY', 'KMP_BLOCKTIME')))")
    for own in (None, 'ACTIVE'):
        if own:
            monkeypatch.setenv('OMP_WAIT_POLICY', own)
        log = tmp_path / 'log'
        tool.run(['-c', show], log)
        assert log.read_text().split() == [own or 'PASSIVE', '0']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left_behind(tmp_path, monkeypatch, number):
    """Stopped alone, as a batch system or an editor does."""
    child = tmp_path / 'train.py'
    # Neither it nor what stands for its data loader ends by itself.
    child.write_text('import fcntl, os, signal, time\n'
                     'for s in (signal.SIGINT, signal.SIGTERM):\n'
                     '    signal.signal(s, signal.SIG_IGN)\n'
                     "held = open('held', 'w')\n"
                     'fcntl.flock(held, fcntl.LOCK_EX)\n'
                     'os.fork()\n'
                     "open(f'ready{os.getpid()}', 'w')\n"
                     'time.sleep(60)\n')
    tool, pid = load_tool('quickstart.py'), os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(
                tool, 'make_folder',
                lambda folder: tool.run([str(child)], tmp_path / 'log'))
            monkeypatch.setattr(tool, 'ROOT', tmp_path)
            monkeypatch.setattr(sys, 'argv', ['quickstart.py'])
            tool.main()
        except SystemExit as error:
            os._exit(7 if number.name in str(error) else 8)
        finally:
            os._exit(9)
    while len(list(tmp_path.glob('ready*'))) < 2:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), 'it has ended'
        time.sleep(.05)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with open(tmp_path / 'held') as file:
        time.sleep(.2)
        # Free only when the last of them is gone.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_nothing_of_others_is_removed(tmp_path, monkeypatch):
    tool = load_tool('quickstart.py')
    config = tmp_path / 'stock' / 'config.py'
    config.parent.mkdir()
    config.write_text('a = 1')
    words = ['quickstart.py', '--work-dir', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', words)
    with pytest.raises(SystemExit, match='stock.*nothing was removed'):
        tool.main()
    assert config.read_text() == 'a = 1'
