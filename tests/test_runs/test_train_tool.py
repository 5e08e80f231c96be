# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What ``tools/train.py`` adds to MMSegmentation's: resume, and no GPU."""
import json

import numpy as np
import pytest
import torch
from each_case import each_case
from processes import load, options, side_by_side, train
from tiny import RESIDUAL, tiny_config, watch, without_loops
from tool_modules import load_tool

pytestmark = pytest.mark.stacks

ITERS = 4


@pytest.fixture(scope='module')
def tool():
    return load_tool('train.py')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A run in mixed precision, and two that go on from it."""
    root = tmp_path_factory.mktemp('tool')
    hook = dict(switch_at=3)
    cfg = tiny_config(root, RESIDUAL, hook, ITERS, 1, log_level='INFO')
    watch(cfg)
    without_loops(cfg)
    cfg.dump(str(root / 'config.py'))

    def run(name, *words):
        return train(root, root / 'config.py', root / name, *words)

    done = {'amp': run('amp', '--amp')}
    report(root, 'amp').rename(root / 'amp.json')
    longer = options(train_cfg__max_iters=ITERS + 1)
    jobs = dict(
        auto=lambda: run('amp', '--resume', 'auto', *longer),
        path=lambda: run('path', '--resume', 'amp/iter_2.pth'))
    return root, dict(done, **side_by_side(jobs))


def report(root, name):
    return root / name / 'report_0.json'


def test_amp_without_a_gpu_is_bfloat16(runs):
    root, done = runs
    assert done['amp'].status == 0, done['amp'].output[-3000:]
    line = '--amp without a GPU: autocast to bfloat16 on the CPU'
    assert done['amp'].output.count(line) == 1
    facts = json.loads((root / 'amp.json').read_text())
    assert facts['dtypes'] == ['torch.bfloat16']
    assert len(facts['losses']) == ITERS
    assert np.isfinite(facts['losses']).all()
    saved = load(root / 'amp' / f'iter_{ITERS}.pth')
    weights = [
        v for v in saved['state_dict'].values() if v.is_floating_point()
    ]
    steps = saved['optimizer']['state'].values()
    momenta = [s['momentum_buffer'] for s in steps]
    momenta = [m for m in momenta if m is not None]
    for values in (weights, momenta):
        assert {v.dtype for v in values} == {torch.float32}


def test_resume_auto_goes_on_with_the_latest(runs):
    root, done = runs
    assert done['auto'].status == 0, done['auto'].output[-3000:]
    facts = json.loads(report(root, 'amp').read_text())
    assert facts['iters'] == [ITERS]
    # Without `--amp`, a run that had it goes on in full precision.
    assert facts['dtypes'] == ['torch.float32']


def test_resume_path_goes_on_with_that_one(runs):
    root, done = runs
    assert done['path'].status == 0, done['path'].output[-3000:]
    facts = json.loads(report(root, 'path').read_text())
    assert facts['iters'] == [2, 3]
    # The same images and schedule as before, but for the precision.
    before = json.loads((root / 'amp.json').read_text())
    np.testing.assert_allclose(
        facts['losses'], before['losses'][2:], rtol=0.02)
    assert facts['learns'] == before['learns'][2:]


@each_case('words, resume, rest', [
    ('c.py', None, 'c.py'),
    ('c.py --resume', 'auto', 'c.py'),
    ('c.py --resume auto --amp', 'auto', 'c.py --amp'),
    ('--resume c.py --amp', 'auto', 'c.py --amp'),
    ('--resume --amp c.py', 'auto', '--amp c.py'),
    ('c.py --cfg-options a=1 b.0=-2 --resume --work-dir w', 'auto',
     'c.py --cfg-options a=1 b.0=-2 --work-dir w'),
    ('--resume {file} c.py', '{file}', 'c.py'),
    ('c.py --resume={file} --amp', '{file}', 'c.py --amp'),
    ('c.py --resume https://x.y/z.pth', 'https://x.y/z.pth', 'c.py'),
])
def test_resume_is_told_from_the_other_arguments(tmp_path, tool, words, resume,
                                                 rest):
    file = tmp_path / 'iter_1.pth'
    file.touch()
    words, resume, rest = (
        text and text.format(file=file) for text in (words, resume, rest))
    assert tool.split_resume(words.split()) == (resume, rest.split())


@pytest.mark.parametrize('path', ['iter_9.pth', 'folder'])
def test_a_missing_checkpoint_is_refused_at_once(tmp_path, tool, monkeypatch,
                                                 path):
    (tmp_path / 'folder').mkdir()
    monkeypatch.chdir(tmp_path)
    # There is not even a config.
    monkeypatch.setattr('sys.argv', ['train.py', 'c.py', '--resume', path])
    with pytest.raises(
            SystemExit, match=f'--resume {path}: there is no such checkpoint'):
        tool.main()
    assert [p.name for p in tmp_path.iterdir()] == ['folder']


def test_settings_that_do_not_fit_are_told(tmp_path, tool, monkeypatch):
    tiny_config(tmp_path, RESIDUAL, {}).dump(tmp_path / 'c.py')
    monkeypatch.chdir(tmp_path)
    words = 'train.py', 'c.py', '--cfg-options', 'custom_hooks.5.switch_at=1'
    monkeypatch.setattr('sys.argv', list(words))
    with pytest.raises(SystemExit, match='does not fit the config'):
        tool.main()
