# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A tiny study through tools/train.py: killed, resumed, never repeated."""
import fcntl
import functools
import json
import operator
import os
import platform
import signal
import tarfile
import time
import zipfile
from pathlib import Path
from pkgutil import resolve_name
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from each_case import each_case
from mmengine.config import Config
from mmseg.registry import MODELS, PARAM_SCHEDULERS
from network_tester import CONFIGS
from processes import start
from tiny import CLASSES, CONTROL, tiny_config, write_dataset
from tool_modules import ROOT, fails, load_tool

from mmseg_textkd.study import Ledger, LedgerError, Run, Study, StudyError
from mmseg_textkd.study.job import Job
from mmseg_textkd.study.run import subset
from mmseg_textkd.study.run_config import set_length
from mmseg_textkd.study.scheduler import Scheduler

ITERS, INTERVAL = 6, 2


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """Configs of a stock network and of one with random vectors.

    ``FATE`` can kill runs of the second.
    """
    folder = tmp_path_factory.mktemp('configs')
    kinds = dict(stock={}, text=dict(text=CONTROL, hook={}))
    for name, options in kinds.items():
        cfg = tiny_config(folder, max_iters=4, **options)
        if name == 'text':
            cfg.custom_imports.imports.append('fate_hook')
            cfg.custom_hooks.insert(0, dict(type='FateHook'))
        cfg.log_level = 'INFO'
        cfg.dump(str(folder / f'{name}.py'))
    return folder


STUDY = '''
name: tiny
title: Tiny
baseline: stock
evaluate: [val, test]
vars: {data: FOLDER/data}
options:
  train_dataloader.dataset.data_root: ${data}
  val_dataloader.dataset.data_root: ${data}
  test_dataloader.dataset.data_root: ${data}
networks:
  net:
    configs: {stock: FOLDER/stock.py, text: FOLDER/text.py}
    iterations: 6
    val_interval: 2
arms: {stock: {config: stock}, random: {config: text}}
grids: [{networks: [net], arms: [stock, random], seeds: [3]}]
'''


def write_study(configs, folder, **changes):
    """Write a study of the two; ``a__b`` is nested."""
    spec = yaml.safe_load(STUDY.replace('FOLDER', str(configs)))
    for key, value in changes.items():
        *parents, key = key.split('__')
        functools.reduce(operator.getitem, parents, spec)[key] = value
    (folder / 'study.yaml').write_text(yaml.safe_dump(spec))
    return folder / 'study.yaml'


def grid(arm, network='net', **more):
    return dict(
        grids=[dict(networks=[network], arms=[arm], seeds=[0], **more)])


class Driver:
    """A new driver of the same study, as if it had been started again."""

    def __init__(self, folder, **options):
        study, self.said = Study.load(folder / 'study.yaml'), []
        ledger = Ledger(folder / 'ledger.jsonl')
        options.update(jobs=2, say=self.said.append)
        self.scheduler = Scheduler(study, ledger, folder / 'work', ROOT,
                                   **options)

    def work(self):
        self.left = self.scheduler.work()
        return self


@pytest.fixture(scope='module')
def story(configs, tmp_path_factory):
    """What four drivers do, one after the other."""
    root = tmp_path_factory.mktemp('study')
    write_study(
        configs, root, channels_last=True, hypotheses=[['random', 'stock']])
    drivers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(ROOT / 'tests'))
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        patch.setenv('OMP_NUM_THREADS', '1')
        # The process of a run is killed when 5 iterations are done.
        patch.setenv('FATE', 'step 4')
        drivers['killed'] = Driver(root).work()
        patch.setenv('FATE', 'none 0')
        # This driver is killed, and the process of its run is not.
        pid = os.fork()
        if pid == 0:
            try:
                Driver(root).work()
            finally:
                os._exit(1)
        while not resumed(root):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), 'it has ended'
            time.sleep(.1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        drivers['heir'] = Driver(root).work()
        before = (root / 'ledger.jsonl').read_bytes()
        drivers['late'] = Driver(root).work()
        assert (root / 'ledger.jsonl').read_bytes() == before
    return root, drivers


def resumed(root):
    """Whether the run goes on where it was killed."""
    log = (root / 'work/net/random/seed3/log.txt').read_text()
    return 'resumed epoch: 0, iter: 4' in log


def test_a_killed_run_is_reported_and_what_is_left_is_waited_for(story):
    _, drivers = story
    driver = drivers['killed']
    assert len(driver.left) == len(driver.scheduler.failed) == 1
    [line] = [s for s in driver.said if 'FAILED net/random/seed3' in s]
    assert f'exit status {-signal.SIGKILL}' in line
    assert 'Iter(val) [6/6]' in line  # the tail of its log
    assert any('finished net/stock/seed3' in s for s in driver.said)
    # What a killed driver left behind is waited for.
    driver = drivers['heir']
    assert driver.left == driver.scheduler.failed == []
    said = '\n'.join(driver.said)
    assert said.count('waiting for it') == said.count('finished net/') == 1
    assert 'starting' not in said and 'resuming' not in said
    # A finished study is not repeated.
    assert drivers['late'].said == [] and drivers['late'].left == []


def test_the_ledger(story):
    root, _ = story
    ledger = Ledger(root / 'ledger.jsonl')
    [registration] = ledger.registrations('tiny')
    assert registration['hypotheses'] == [['random', 'stock']]
    assert sorted(e['arm'] for e in ledger.entries) == ['random', 'stock']
    assert len({e['config_hash'] for e in ledger.entries}) == 2
    for entry in ledger.entries:
        assert entry['iterations'] == ITERS and entry['inputs'] == {}
        assert entry['channels_last'] is True
        assert [i for i, _ in entry['curve']] == [2, 4, 6]
        # Evaluated once more, from the checkpoint: val is also test here.
        assert entry['val'] == entry['test']
        assert entry['val']['mIoU'] == entry['curve'][-1][1]
        mean = np.mean(entry['val']['IoU'])
        assert np.isclose(mean, entry['val']['mIoU'], atol=.01)
        assert entry['classes'] == list(CLASSES)
        assert entry['best_val']['mIoU'] == max(m for _, m in entry['curve'])
        assert entry['train_seconds'] > 0 and entry['peak_memory_mib'] > 100
        assert entry['peak_memory_of'] == 'process'
        assert entry['versions']['torch'] and entry['device']
    # A changed study is not mixed with the old one.
    study = Study.load(root / 'study.yaml')
    study.spec['networks']['net']['iterations'] = 8
    with pytest.raises(StudyError, match='another config'):
        Scheduler(study, ledger, root / 'work', ROOT)
    # Nor is one that is to be measured on more than the runs were.
    lines = [json.loads(x) for x in ledger.path.read_text().splitlines()]
    less = root / 'less.jsonl'
    less.write_text('\n'.join(
        json.dumps(dict(line, test=None) if 'seed' in line else line)
        for line in lines))
    study = Study.load(root / 'study.yaml')
    with pytest.raises(StudyError, match=r"without \['test'\]"):
        Scheduler(study, Ledger(less), root / 'work', ROOT)


def test_budget(configs, tmp_path):
    """Nothing is left running, and the ledger is as it was."""
    write_study(configs, tmp_path)
    driver = Driver(tmp_path, budget=0.).work()
    assert len(driver.left) == 2 and driver.scheduler.failed == []
    assert 'the budget is spent' in driver.said
    assert Ledger(tmp_path / 'ledger.jsonl').entries == []


def test_no_termination_is_lost_while_a_config_is_written(
        configs, tmp_path, monkeypatch):
    """MMEngine formats it under a bare `except`."""
    write_study(configs, tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    name = 'mmengine.config.config.FormatCode'
    format_code = resolve_name(name)

    def terminated(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return format_code(*args, **kwargs)

    monkeypatch.setattr(name, terminated)
    driver = Driver(tmp_path)
    with pytest.raises(SystemExit, match='terminated'):
        driver.work()
    assert driver.scheduler.failed == [] and 'stopped' in driver.said[-1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_cannot_start_is_reported(configs, tmp_path):
    options = {'train_dataloader.dataset.data_prefix.img_path': 'none'}
    changes = grid('stock', train_fractions=[.5])
    write_study(configs, tmp_path, options=options, **changes)
    driver = Driver(tmp_path).work()
    assert [r.name for r in driver.left] == ['net/stock/seed0_50%']
    assert any('FAILED' in s and 'none' in s for s in driver.said)
    # Images of the config's own choice would be others.
    options = {'train_dataloader.dataset.indices': [4, 5]}
    write_study(configs, tmp_path, options=options, **changes)
    driver = Driver(tmp_path).work()
    assert any('no `indices`' in s for s in driver.said)


def test_a_suspended_process_can_be_ended(tmp_path):
    job = Job(Run('net', 'stock', 0), tmp_path, open(tmp_path / 'lock', 'w'))
    job.start(['-c', 'import time; time.sleep(60)'])
    job.process.send_signal(signal.SIGSTOP)
    job.stop()
    assert job.process.returncode == -signal.SIGTERM
    job.lock.close()


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='of glibc alone')
def test_memory_of_a_run_is_kept(tmp_path):
    job = Job(Run('net', 'stock', 0), tmp_path, open(tmp_path / 'lock', 'w'))
    job.start([
        '-c', 'import resource, numpy\n'
        'faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n'
        'numpy.ones(8_000_000)\n'
        'before = faults()\n'
        'numpy.ones(8_000_000)\n'
        'print(faults() - before)'
    ])
    assert job.process.wait() == 0
    # Its 64 MB would be 15,625 pages.
    assert int((tmp_path / 'log.txt').read_text()) < 100
    job.lock.close()


@pytest.mark.slow
def test_a_slice_of_a_study_on_a_lent_machine(configs, tmp_path):
    """Wheels, data, time and the ledger go the way the guide says."""
    study = write_study(configs, tmp_path, vars=dict(data='not/there'))
    wheels, out, work = (tmp_path / name for name in ('whl', 'out', 'work'))
    wheels.mkdir()
    with zipfile.ZipFile(wheels / 'lent-1-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('lent.py', '')
        info = dict(RECORD='', WHEEL='Wheel-Version: 1.0\nTag: py3-none-any\n')
        info['METADATA'] = 'Metadata-Version: 2.1\nName: lent\nVersion: 1\n'
        for name, text in info.items():
            wheel.writestr(f'lent-1.dist-info/{name}', text)
    with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
        archive.add(configs / 'data', 'toy')
    variables = dict(WORK=str(work), WHEELS=str(wheels))
    variables.update(DATA=f'{tmp_path}/data.tar', PYTHONPATH=f'{ROOT}/tests')

    def a_slice(seconds):
        words = 'bash', ROOT / 'tools/study_slice.sh', study, 'out', seconds, 2
        data = '--vars', f'data={work}/data/toy'
        return start(*words, *data, cwd=tmp_path, timeout=900., **variables)

    text = study.read_text()
    study.write_text(text.replace('arms:', 'armz:'))
    assert a_slice(0).status == 2  # cannot be run as it is written
    study.write_text(text)
    first = a_slice(0)
    assert first.status == 3, first.output
    assert (work / 'site/lent.py').is_file()
    ledger = Ledger(out / 'study.jsonl')
    assert ledger.studies == ['tiny'] and not ledger.entries
    second = a_slice(500)
    assert second.status == 0, second.output
    runs = Ledger(out / 'study.jsonl').entries
    assert {run['arm'] for run in runs} == {'stock', 'random'}
    with tarfile.open(out / 'study-logs.tar.gz') as logs:
        suffixes = {Path(name).suffix for name in logs.getnames()}
    assert '.json' in suffixes and '.pth' not in suffixes


def test_config_of_a_run(configs, tmp_path):
    head = dict(type='FCNHead', channels=16, loss_decode=dict(a=1))
    changes = dict(networks__net__feature=dict(in_channels=8, in_index=0))
    changes['arms__extra'] = dict(config='stock', auxiliary_head=head)
    changes['arms__stock__options'] = {'optim_wrapper.optimizer.lr': 9.}
    path = write_study(configs, tmp_path, **changes)
    study = Study.load(path, dict(data='here'))
    cfg = study.config(Run('net', 'stock', 7))
    assert cfg.train_cfg.max_iters == ITERS
    assert cfg.train_cfg.val_interval == INTERVAL
    assert cfg.default_hooks.checkpoint.interval == INTERVAL
    assert (cfg.param_scheduler[0].begin, cfg.param_scheduler[0].end) == (0, 6)
    assert cfg.randomness == dict(seed=7)
    assert cfg.optim_wrapper.optimizer.lr == 9.
    assert cfg.train_dataloader.dataset.data_root == 'here'
    raw = study.config(Run('net', 'stock', 7), resolved=False)
    assert raw.test_dataloader.dataset.data_root == '${data}'
    assert 'auxiliary_head' not in cfg.model
    assert 'save_best' not in cfg.default_hooks.checkpoint
    [extra] = study.config(Run('net', 'extra', 7)).model.auxiliary_head
    assert extra.pop('norm_cfg') == dict(type='BN')
    assert extra == dict(head, in_channels=8, in_index=0, num_classes=8)
    changes['arms__extra']['auxiliary_head']['text'] = dict(file='${data}')
    best = {
        'custom_hooks.1.load_best': True,
        'default_hooks.checkpoint.save_best': 'mIoU'
    }
    changes['arms__best'] = dict(config='text', options=best)
    changes['arms__bare'] = dict(
        config='text', options=dict(custom_hooks=None))
    path = write_study(configs, tmp_path, **changes)
    changed = Study.load(path, dict(data='here'))
    [extra] = changed.config(Run('net', 'extra', 7)).model.auxiliary_head
    assert extra.text.file == 'here'
    # A stage 2 from the best checkpoint of stage 1 needs one.
    checkpoint = changed.config(Run('net', 'best', 7)).default_hooks.checkpoint
    assert checkpoint.save_best == 'mIoU' and checkpoint.interval == INTERVAL
    assert changed.config(Run('net', 'bare', 7)).custom_hooks is None
    # Options of one arm do not leak into the others.
    other = study.config(Run('net', 'random', 7))
    assert other.optim_wrapper.optimizer.lr == .05


def test_options_apply_one_after_the_other(configs, tmp_path):
    """Of the study, the network, the arm, as the guide says."""
    adam = dict(type='AdamW', lr=.001, _delete_=True)
    path = write_study(
        configs,
        tmp_path,
        options={
            'optim_wrapper.optimizer.lr': .01,
            'model.decode_head.dropout_ratio': .3
        },
        networks__net__options={'optim_wrapper.optimizer': adam},
        arms__stock__options={'optim_wrapper.optimizer.lr': .005},
        arms__random__options={'model.decode_head': dict(concat_input=True)})
    stock, random = (
        Study.load(path).config(Run('net', arm, 3))
        for arm in ('stock', 'random'))
    assert stock.optim_wrapper.optimizer == dict(type='AdamW', lr=.005)
    assert random.optim_wrapper.optimizer == dict(type='AdamW', lr=.001)
    head = random.model.decode_head
    assert (head.concat_input, head.dropout_ratio) == (True, .3)


def test_schedules_are_scaled(configs):
    """A tenth of the length: each tenth step is that of the whole."""
    schedules = [
        [dict(type='CosineAnnealingLR', T_max=80, by_epoch=False)],
        [
            dict(type='LinearLR', start_factor=.1, end=20, by_epoch=False),
            dict(
                type='CosineAnnealingLR',
                T_max=60,
                begin=20,
                end=80,
                by_epoch=False)
        ],
        [dict(type='MultiStepLR', milestones=[20, 50], by_epoch=False)],
        [dict(type='StepLR', step_size=20, by_epoch=False)],
        [dict(type='ExponentialLR', gamma=.97, by_epoch=False)],
        [dict(type='PolyLR', end=80, by_epoch=False)],
        [
            dict(
                type='CosineRestartLR',
                periods=[30, 50],
                restart_weights=[1, .5],
                eta_min=0.,
                by_epoch=False)
        ],
    ]

    def rates(cfg):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)
        schedulers = [
            PARAM_SCHEDULERS.build(c, default_args=dict(optimizer=optimizer))
            for c in cfg.param_scheduler
        ]
        for _ in range(cfg.train_cfg.max_iters):
            yield optimizer.param_groups[0]['lr']
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()

    for schedule in schedules:
        cfg = Config.fromfile(configs / 'stock.py')
        cfg.merge_from_dict(
            dict(train_cfg=dict(max_iters=80), param_scheduler=schedule))
        whole, short = [*rates(cfg)], cfg.copy()
        set_length(short, 8, 4)
        short = [*rates(short)]
        assert len(short) == 8
        # But in warm-up, which ends a step before `end` at any length.
        assert np.allclose(
            short[2:], whole[20::10], atol=.13), schedule[0]['type']
    cycle = dict(type='OneCycleLR', total_steps=80, eta_max=1.)
    cfg.param_scheduler = [cycle]
    cfg.train_cfg.max_iters = 80
    set_length(cfg, 8, 4)
    assert cfg.param_scheduler == [dict(cycle, begin=0, total_steps=8)]
    cfg.param_scheduler = None
    set_length(cfg, 8, 4)


def test_the_hash_depends_on_what_counts(configs, tmp_path, make_embeddings):
    text = dict(_delete_=True, type='ClassEmbeddings', file='${text}')
    file, arm = make_embeddings(8, 16, CLASSES), dict(config='text')
    arm['options'] = {'model.decode_head.text': text}
    path = write_study(configs, tmp_path, vars__text=file, arms__text=arm)

    def identify(run, **variables):
        found = Study.load(path, variables).identify(run)
        return found['config_hash'], found['inputs']

    run = Run('net', 'text', 0)
    own, inputs = identify(run)
    assert list(inputs) == ['text']
    # Where things are does not count; what is in them does.
    elsewhere = write_dataset(tmp_path / 'elsewhere', 1)
    copied = make_embeddings(8, 16, CLASSES, file='copy')
    assert identify(run, data=elsewhere, text=copied) == (own, inputs)
    other = make_embeddings(8, 16, CLASSES, seed=1, file='other')
    runs = ('text', 1), ('text', 0, .5), ('random', 0)
    hashes = [identify(Run('net', *run))[0] for run in runs]
    assert len({own, identify(run, text=other)[0], *hashes}) == 5
    with pytest.raises(StudyError, match='does not exist.*--vars text=PATH'):
        identify(run, text='gone.safetensors')
    # Weights from which runs start.
    path = write_study(
        configs,
        tmp_path,
        vars__start=file,
        arms__text=dict(arm, options=dict(load_from='${start}')))
    begun = identify(run)
    assert begun[1].keys() == {'start'}
    assert begun[0] not in (own, identify(run, start=other)[0])
    with pytest.raises(StudyError, match='does not exist.*start=PATH'):
        identify(run, start='gone.pth')


def test_images_of_a_fraction():
    few, more = (subset(367, Run('a', 'x', 0, f)) for f in (.1, .25))
    assert (len(few), len(more)) == (37, 92)
    assert set(few) < set(more) and few == sorted(set(few))
    assert max(more) < 367
    assert few == subset(367, Run('b', 'y', 0, .1))
    assert few != subset(367, Run('a', 'x', 1, .1))
    assert subset(3, Run('a', 'x', 0, .01)) != []


@each_case('changes, message', [
    (grid('stok'), "grid 1 has the unknown arm 'stok'; known are .*'stock'"),
    (grid('stock', 'nett'), "grid 1 has the unknown network 'nett'; .*'net'"),
    (dict(arms__random__config='new'),
     "network 'net' has no config 'new'; it has .*'text'"),
    (dict(baseline='none'), "unknown arm 'none'"),
    (dict(evaluate=['test']), 'evaluate must be'),
    (dict(arm=1), r"unknown keys \['arm'\]"),
    (dict(hypotheses=[['random', 'text']]), r"two arms, .*'text'"),
    (grid('stock', train_fractions=[10]), r'must be in \(0, 1\]'),
    (dict(networks__net__configs__stock='gone.py'),
     'net/stock/seed3.*gone.py'),
    (dict(networks__net__val_interval=4), 'does not divide'),
    *((dict(arms__random__iterations=n), "arm 'random': iterations must be")
      for n in (4., 0, '4')),
    (dict(name=2024), 'name must be'),
])
def test_a_wrong_study_is_refused(configs, tmp_path, changes, message):
    path = write_study(configs, tmp_path, **changes)
    with pytest.raises(StudyError, match=message):
        Study.load(path).config(Run('net', 'stock', 3))


STUDIES = sorted((CONFIGS / 'studies').glob('*_*.yaml'))
STUDIES += [CONFIGS / 'studies' / 'toy.yaml']


@each_case('path', STUDIES)
def test_shipped_studies(path):
    """Each arm of each network is a config; a run's size is the study's."""
    study = Study.load(path)
    assert study.spec['registration'].strip() and study.runs()
    for run in {(r.network, r.arm): r for r in study.runs()}.values():
        cfg = study.config(run, resolved=False)
        backbone = str(cfg.model.backbone)
        # From scratch, or with weights that the user names.
        assert 'http' not in backbone
        assert 'Pretrained' not in backbone or "'${" in backbone
        if 'crop_size' in cfg:
            size = study.spec.get('size') or cfg.crop_size
            assert tuple(cfg.model.data_preprocessor.size) == tuple(size)
        hooks = {h.type: h for h in cfg.get('custom_hooks') or []}
        last = bool(study.spec.get('channels_last'))
        assert ('ChannelsLastHook' in hooks) == last
        hook = hooks.get('PromptLearnerHook')
        two_stages = '-2st' in run.arm or path.stem == 'toy'
        assert hook is None or bool(hook.get('switch_at')) == two_stages


def test_arms_differ_in_what_they_say(make_embeddings):
    """On one network: parameters and vectors of each arm."""
    names = ('sky building pole road pavement tree signsymbol fence car '
             'pedestrian bicyclist').split()
    files = dict(clip=512, minilm=384)
    for name, width in files.items():
        files[name] = make_embeddings(11, width, names, file=name)
    study = Study.load(CONFIGS / 'studies' / 'camvid_screen.yaml', files)
    models = {}
    for run in study.runs():
        if run.network == 'ddrnet_23-slim' and run.seed == 0:
            cfg = study.config(run)
            cfg.model.backbone.channels = 8  # small
            cfg.model.decode_head.in_channels = 32
            for head in cfg.model.get('auxiliary_head') or []:
                head.in_channels = 32
            models[run.arm] = MODELS.build(cfg.model)
    size = {
        arm: sum(p.numel() for p in model.parameters())
        for arm, model in models.items()
    }
    for role in ('cls', 'aux'):
        same = {size[f'{t}-{role}'] for t in ('text', 'random', 'shuffled')}
        assert len(same) == 1
    assert size['text-cls'] - size['onehot-cls'] == (512 - 11) * (64 + 2)
    head = models['extra-head'].auxiliary_head[-1]
    # 32 -> 512, BN, 512 -> 11 with bias.
    extra = size['extra-head'] - size['stock']
    assert extra == 32 * 512 + 2 * 512 + 512 * 11 + 11
    assert head.loss_decode.loss_weight == .4

    def vectors(arm):
        return models[arm].decode_head.text_branch.text()

    clip = vectors('text-cls')
    assert torch.equal(vectors('text-aux'), clip)
    for role in ('cls', 'aux'):
        random = vectors(f'random-{role}')
        torch.testing.assert_close(random @ random.T, torch.eye(11))
        shuffled = vectors(f'shuffled-{role}')
        assert not (shuffled == clip).all(1).any()
        assert sorted(shuffled.tolist()) == sorted(clip.tolist())
        assert torch.equal(vectors(f'onehot-{role}'), torch.eye(11))
        assert vectors(f'minilm-{role}').shape == (11, 384)
    for role in ('text', 'random'):
        [loss] = models[f'{role}-cls-ssc'].decode_head.text_losses
        assert type(loss).__name__ == 'SemanticStructureLoss'
        assert size[f'{role}-cls-bridge'] > size[f'{role}-cls']
    assert torch.equal(vectors('text-cls-ssc'), clip)
    fixed, four = (
        models[f'text-cls-{name}'].decode_head.text_branch.scale
        for name in ('fixed-scale', 'scale-4'))
    assert not fixed.learnable and four().item() == pytest.approx(4.)


def entry(**changes):
    run = dict(study='s', network='n', arm='a', seed=0, train_fraction=1.)
    run.update(config_hash='h', iterations=1, classes=['c'], curve=[])
    return run | dict(val=dict(mIoU=1., IoU=[1.])) | changes


def test_a_damaged_ledger_names_the_line(tmp_path):
    path = tmp_path / 'l.jsonl'
    ledger = Ledger(path)
    for seed in range(3):
        ledger.append(entry(seed=seed))
    message = r"n/a/seed1 .*in line 2, with other \['curve'"
    with pytest.raises(LedgerError, match=message):
        ledger.append(entry(seed=1, curve=[[1, 2.]]))
    assert len(Ledger(path).entries) == 3
    lines = path.read_text().splitlines()
    other = json.dumps(entry(seed=1, val=dict(mIoU=2., IoU=[2.])))
    for message, *content in [
        ('line 2 is damaged', lines[0], lines[1][:40], lines[2]),
        ("line 2 .*'config_hash'", lines[0], '{"seed": 1}', ''),
        ('line 4: n/a/seed1.*in line 2', *lines, other),
    ]:
        path.write_text('\n'.join(content))
        with pytest.raises(LedgerError, match=message):
            Ledger(path)
    # A last line without its end, as an editor may leave it.
    path.write_text('\n'.join(lines[:2]))
    Ledger(path).append(entry(seed=2))
    assert Ledger(path).entries == [json.loads(x) for x in lines]


def test_two_drivers_append_a_run_once(tmp_path):
    path = tmp_path / 'l.jsonl'
    first, second = Ledger(path), Ledger(path)
    assert first.append(entry(finished='1', curve=[[1, 2.]]))
    # Measured again elsewhere, at another time. A tuple is read as a list.
    assert not second.append(entry(finished='2', curve=[(1, 2.)]))
    assert second.append(entry(seed=1)) and first.append(entry(seed=2))
    assert [e['seed'] for e in Ledger(path).entries] == [0, 1, 2]
    first.reload()
    assert first.find('s', Run('n', 'a', 1)) == entry(seed=1)
    # As drivers did that did not look.
    with open(path, 'a') as file:
        file.write(json.dumps(entry(seed=1, finished='3')) + '\n')
    found = Ledger(path).entries
    first = entry(finished='1', curve=[[1, 2.]])
    assert found == [first, entry(seed=1), entry(seed=2)]


def test_readers_wait_for_a_line_that_is_being_written(tmp_path):
    path = tmp_path / 'l.jsonl'
    line, found = json.dumps(entry()) + '\n', []
    reader = Thread(target=lambda: found.extend(Ledger(path).entries))
    with open(path, 'ab', buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line[:40].encode())
        reader.start()
        reader.join(.3)
        assert reader.is_alive() and not found
        file.write(line[40:].encode())
    reader.join()
    assert found == [entry()]


def test_a_study_is_registered_once_and_amended_openly(tmp_path):
    ledger = Ledger(tmp_path / 'l.jsonl')
    plan = dict(study='s', baseline='a', arms={'a': ''}, planned=['n/a/seed0'])
    assert ledger.register(plan, '2000-01-01')
    assert not ledger.register(plan, '2000-01-02')
    assert Ledger(ledger.path).register(dict(plan, planned=[]), '2000-01-03')
    found = Ledger(ledger.path).registrations('s')
    assert [r['registered'] for r in found] == ['2000-01-01', '2000-01-03']
    # Two drivers that begin at once: both have read the same file.
    other = Ledger(ledger.path)
    again = dict(plan, registered='2000-01-04')
    assert ledger.append(again)
    assert not other.append(dict(again, registered='2000-01-05'))
    # As drivers did that did not look.
    with open(ledger.path, 'a') as file:
        file.write(json.dumps(dict(again, registered='2000-01-06')) + '\n')
    assert len(Ledger(ledger.path).registrations('s')) == 3


def test_the_tool_lists_the_runs(configs, tmp_path, monkeypatch, capsys):
    path = write_study(configs, tmp_path)
    monkeypatch.chdir(tmp_path)
    tool = load_tool('study.py')
    assert tool.main(['study.yaml', '--dry-run']) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [f'net/{a}/seed3, 6 iterations' for a in ('stock', 'random')]
    assert [line.strip() for line in lines] == expected
    assert list(tmp_path.iterdir()) == [path]
    assert tool.main(['gone.yaml']) == 2
    assert 'there is no study gone.yaml' in capsys.readouterr().err
    said = fails(tool, capsys, 'study.yaml', '--vars', 'data')
    assert 'write NAME=VALUE' in said
    with pytest.raises(StudyError, match="no vars .*'dota'.*'data'"):
        Study.load(path, dict(dota='x'))
