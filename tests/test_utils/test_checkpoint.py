# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Checkpoints of anybody: no code of theirs runs, no damage goes unseen."""
import copy
import os
import pickle
import sys
import time
from collections import OrderedDict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from each_case import each_case
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.registry import MODELS
from tiny import assert_equal, run, tiny_config
from tool_modules import load_tool

from mmseg_textkd import compat
from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.utils.checkpoint import (build_segmentor, find_checkpoint,
                                           load_file, read_checkpoint)

pytestmark = pytest.mark.stacks
WEIGHTS = dict(weight=torch.arange(4000.))
load = CheckpointLoader.load_checkpoint


class Bomb:
    """Unpickling this calls a function, which leaves a trace."""

    def __init__(self, *args, function=os.mkdir):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def bomb(tmp_path):
    """A checkpoint with code in it, and what tells that the code has run."""
    trace, path = tmp_path / 'trace', tmp_path / 'bomb.pth'
    meta = dict(a=Bomb(str(trace)))
    torch.save(dict(state_dict=WEIGHTS, meta=meta), path)
    return path, trace


@pytest.fixture
def url(tmp_path, monkeypatch):
    """Address of the folder of the test, on this machine."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


def test_no_loader_runs_code(bomb, url, monkeypatch):
    path, trace = bomb
    # So torch asks for nothing by default before version 2.6.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    for read, *words in ((read_checkpoint, path), (load, str(path)),
                         (load, url + path.name), (load, url + path.name,
                                                   'cpu')):
        with pytest.raises(ValueError, match='bomb.pth.*safe.*mkdir') as info:
            read(*words)
        assert not trace.exists()
        # torch advises to run the code.
        assert 'eights_only' not in str(info.value)
    # What the user has set is as it was, and the bomb is one.
    assert os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] == '1'
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ
    torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_sound_checkpoints_are_read_from_everywhere(tmp_path, url):
    path, weight = tmp_path / 'sound.pth', WEIGHTS['weight']
    meta = dict(iter=3, empty=np.zeros(0))
    torch.save(dict(state_dict={'module.weight': weight}, meta=meta), path)
    for found in (load(str(path)), load(url + path.name)):
        assert found['meta']['iter'] == 3
        assert found['state_dict']['module.weight'].equal(weight)
    assert read_checkpoint(path)['state_dict']['weight'].equal(weight)
    with pytest.raises(FileNotFoundError, match='none.pth'):
        load(str(tmp_path / 'none.pth'))


def test_getattr_is_not_allowed_anywhere(tmp_path):
    # OneDL allows it.
    sly = Bomb(OrderedDict, 'clear', function=getattr)
    torch.save(dict(state_dict=WEIGHTS, meta=sly), tmp_path / 'sly.pth')
    with pytest.raises(ValueError, match='clear|not safe to read'):
        load(str(tmp_path / 'sly.pth'))


def weighted_mean(self, weight):
    """A statistic of a user's own."""
    return (self._log_history * weight).mean()


def test_statistics_of_a_user_are_resumed_where_they_are_registered(
        tmp_path, monkeypatch):
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods',
                        dict(HistoryBuffer._statistics_methods))
    monkeypatch.setitem(sys.modules, weighted_mean.__module__,
                        SimpleNamespace(weighted_mean=weighted_mean))
    registered = HistoryBuffer.register_statistics(weighted_mean)
    path, log = tmp_path / 'own.pth', HistoryBuffer([2.], [1])
    torch.save(dict(state_dict=WEIGHTS, log=log), path)
    found = load_file(path)['log']
    assert found.statistics('weighted_mean', 3.) == 6
    assert found._statistics_methods['weighted_mean'] is registered
    torch.serialization.clear_safe_globals()
    del HistoryBuffer._statistics_methods['weighted_mean']
    with pytest.raises(ValueError, match='names .*weighted_mean'):
        load_file(path)


@each_case('damage, message', [
    ('cut', 'a damaged one'),
    ('flipped', 'checksum of .* does not fit'),
    ('empty', ''),
    ('pickle', ''),
])
def test_damage_is_seen(tmp_path, damage, message):
    path = tmp_path / 'damaged.pth'
    torch.save(dict(state_dict=WEIGHTS), path)
    data = bytearray(path.read_bytes())
    data[data.index(WEIGHTS['weight'].numpy().tobytes()) + 7] ^= 1
    files = dict(cut=data[:-1000], flipped=data, empty=b'')
    files['pickle'] = pickle.dumps(dict(state_dict=os.system))
    path.write_bytes(files[damage])
    message = f'damaged.pth is no checkpoint.*{message}'
    for read in (read_checkpoint, load):
        with pytest.raises(ValueError, match=message):
            read(str(path))


# Files, those of which that are not whole, and what the run names.
@each_case('names, cut, last, found, said', [
    ('', '', None, None, ''),
    ('iter_20 iter_100', '', None, 'iter_100', ''),
    ('iter_20 iter_100', '', '/gone/iter_20.pth', 'iter_20', ''),
    ('iter_20 iter_100', '', '', 'iter_100', 'last_checkpoint names no'),
    ('iter_20 iter_100', 'iter_100', 'iter_100.pth', 'iter_20',
     'iter_100.pth is no checkpoint'),
    ('epoch_2 best_mIoU_iter_9', '', '', 'epoch_2', 'names no'),
    ('iter_20', 'iter_20', 'iter_20.pth', None, 'iter_20.pth is no check'),
])
def test_newest_checkpoint_that_can_be_read(tmp_path, monkeypatch, names, cut,
                                            last, found, said):
    lines = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'handle',
                        lambda record: lines.append(record.getMessage()))
    for name in names.split():
        file = tmp_path / f'{name}.pth'
        torch.save(dict(state_dict=WEIGHTS), file)
        if name == cut:
            file.write_bytes(file.read_bytes()[:500])
    if last is not None:
        (tmp_path / 'last_checkpoint').write_text(last)
    path = find_checkpoint(tmp_path)
    assert path == (found and tmp_path / f'{found}.pth')
    output = ''.join(lines)
    assert said in output
    assert ('Instead' in output) == bool(said and found)


def test_threads_that_read_at_once(tmp_path, monkeypatch):
    """One that has done leaves the protection to the other."""
    name = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    monkeypatch.delenv(name, raising=False)
    inside, found = Event(), []

    def read():
        with compat.weights_only(tmp_path):
            inside.set()
            time.sleep(.1)
            found.append(os.environ.get(name))

    threads = [Thread(target=read) for _ in range(2)]
    threads[0].start()
    inside.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert found == ['1', '1'] and name not in os.environ


def test_resume_executes_nothing_and_passes_over_damage(
        tmp_path, monkeypatch, bomb):
    path, trace = bomb
    cfg = tiny_config(tmp_path, max_iters=2, save_every=1, log_level='INFO')
    for name in [k for k in cfg if k.startswith(('val', 'test'))]:
        cfg.pop(name)
    cfg.train_cfg.pop('val_interval')
    run(cfg)
    work, code = tmp_path / 'work', f'import os\nos.mkdir({str(trace)!r})'
    first = torch.load(work / 'iter_1.pth', weights_only=True)
    first['meta'].update(config=code, cfg=code)
    torch.save(first, work / 'iter_1.pth')
    # As a full disk leaves it.
    (work / 'iter_2.pth').write_bytes((work / 'iter_2.pth').read_bytes()[:999])
    (work / 'last_checkpoint').write_text('')
    cfg.dump(str(tmp_path / 'config.py'))
    tool = load_tool('train.py')
    words = ['train.py', str(tmp_path / 'config.py'), '--resume']
    monkeypatch.setattr(sys, 'argv', words)
    tool.main()
    logs = ''.join(p.read_text() for p in work.rglob('*.log'))
    assert 'resumed epoch: 0, iter: 1' in logs
    assert read_checkpoint(work / 'iter_2.pth')['meta']['iter'] == 2
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.setattr(sys, 'argv', [*words, str(path)])
    with pytest.raises(SystemExit, match='bomb.pth is no checkpoint'):
        tool.main()
    assert not trace.exists()


def test_weights_of_timm_are_not_read_before_those_of_a_checkpoint():
    """Neither by a teacher nor by the stock config of a release."""
    pytest.importorskip('timm')
    model = dict(
        type='EncoderDecoder',
        backbone=dict(
            type='TIMMBackbone',
            model_name='tf_efficientnet_lite0',
            features_only=True,
            pretrained=False,
            out_indices=[1]),
        decode_head=dict(
            type='FCNHead', in_channels=24, channels=4, num_classes=2))
    network = MODELS.build(copy.deepcopy(model))
    state = network.state_dict()
    for gone in (dict(checkpoint_path='gone.pth'), dict(pretrained=True)):
        own = dict(model, backbone=dict(model['backbone'], **gone))
        stock = to_stock_cfg(Config(dict(model=copy.deepcopy(own)))).model
        for cfg in (own, stock):
            built = build_segmentor(cfg, state, 'mine.pth')
            assert_equal(built.state_dict(), state)
        assert own['backbone'].items() >= gone.items()  # as it was
        assert not stock.backbone.pretrained
        assert not stock.backbone.get('checkpoint_path')
