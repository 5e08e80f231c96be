# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Run tools as a user does: in processes of their own."""
import contextlib
import gc
import multiprocessing
import os
import os.path as osp
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence
from unittest import mock

import torch
from mmengine.config import config
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from yapf.yapflib import yapf_api

from mmseg_textkd.compat import load_stock_tool

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
TOOLS = osp.join(ROOT, 'tools')
TRAIN = osp.join(TOOLS, 'train.py')
# MMSegmentation's own, as installed.
STOCK_TRAIN = load_stock_tool('train.py').__file__
# For `python -c`: a script, where neither PyTorch nor this package is there.
ALONE = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'mmseg', 'mmengine', 'mmcv', 'onnx',
                                  'mmseg_textkd'):
            raise ImportError(name + ' is not installed here')

sys.meta_path.insert(0, Nothing())
sys.argv[0] = '{script}'
runpy.run_path('{script}', run_name='__main__')
"""
# Importing takes 8 seconds: a server does it once, and tools run in its forks.
_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload(['processes', 'mmseg.apis', 'matplotlib.pyplot'])
_FORKING = threading.Lock()


class Done(NamedTuple):
    """How a process ended and what it said."""
    status: int
    output: str


def leave_configs_unformatted(setattr: Callable = setattr) -> None:
    """Let MMEngine write configs as they are.

    With yapf it formats the whole config for each run and checkpoint, which
    takes seconds.
    """

    def as_it_is(code, **kwargs):
        return code, False

    setattr(yapf_api, 'FormatCode', as_it_is)
    # Upstream holds the function by name, OneDL imports it late.
    if hasattr(config, 'FormatCode'):
        setattr(config, 'FormatCode', as_it_is)


def _python(words, env, cwd, output):
    """Be ``python WORDS``, in a fork."""
    # As in a new interpreter, which has chosen none yet.
    multiprocessing.set_start_method(None, force=True)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, 'w', buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = env['PYTHONPATH'].split(os.pathsep)
    torch.set_num_threads(1)
    leave_configs_unformatted()
    gc.freeze()
    if words[0] == '-c':
        sys.argv = ['-c', *words[2:]]
        exec(words[1], dict(__name__='__main__'))
    else:
        sys.argv = words
        sys.path.insert(0, osp.dirname(osp.abspath(words[0])))
        runpy.run_path(words[0], run_name='__main__')


def _fork(words, env, cwd, timeout):
    with tempfile.NamedTemporaryFile('r', errors='replace') as output:
        process = _FORKS.Process(
            target=_python, args=(words, env, cwd, output.name))
        with _FORKING, mock.patch.dict(os.environ, env):
            process.start()
        if not _join(process, timeout):
            raise TimeoutError(f'{words}: {output.read()}')
        return Done(process.exitcode, output.read())


def _join(process, timeout):
    """Wait for the end of a process, kill it after a time.

    Whoever starts a process asks all others for their status too. Of two
    threads that ask one at the same time, the second gets 255.
    """
    ended = connection.wait([process.sentinel], timeout)
    with _FORKING:
        if not ended:
            process.kill()
        process.join()
    return ended


def _call(path, name, sys_path, args):
    sys.path[:] = sys_path
    torch.set_num_threads(1)
    with DefaultScope.overwrite_default_scope('mmseg'):  # as conftest.py
        runpy.run_path(path)[name](*args)


def run_ranks(function: Callable, *args, size: int = 2) -> None:
    """Call a function of a test file as ``function(rank, size, *args)``.

    Each rank is a process of its own; not a fork of this one, whose autograd
    may have threads.
    """
    ranks = [
        _FORKS.Process(
            target=_call,
            args=(function.__code__.co_filename, function.__name__, sys.path,
                  (rank, size, *args))) for rank in range(size)
    ]
    with _FORKING:
        for process in ranks:
            process.start()
    for process in ranks:
        _join(process, 120)
        assert process.exitcode == 0


def start(*words: str,
          cwd: str,
          timeout: float = 300.,
          fork: Optional[bool] = None,
          **variables: str) -> Done:
    """Run a command to its end, without a GPU and without a hub.

    ``python`` is the one that runs the tests, also in shell scripts. With
    ``fork``, by default for all but ``-c``, it has the libraries and the
    package imported already; else it is started as a user does.
    """
    path = [osp.dirname(sys.executable), os.environ.get('PATH', '')]
    env = dict(
        os.environ,
        PATH=os.pathsep.join(path),
        PYTHONPATH=os.pathsep.join([ROOT, osp.join(ROOT, 'tests')]),
        CUDA_VISIBLE_DEVICES='',
        HF_HUB_OFFLINE='1',
        OMP_NUM_THREADS='1',
        MKL_NUM_THREADS='1')
    env.update(variables)
    words = [str(w) for w in words]
    if fork is None:
        fork = words[1] != '-c'
    if fork and words[0] == 'python':
        return _fork(words[1:], env, str(cwd), timeout)
    done = subprocess.run(
        [sys.executable if w == 'python' else w for w in words],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        timeout=timeout)
    return Done(done.returncode, done.stdout)


def free_port() -> str:
    """Find a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return str(probe.getsockname()[1])


def start_ranks(*words: str, cwd: str) -> Done:
    """Run a tool in two ranks, as ``tools/dist_train.sh`` does."""
    words = ['python', *words, '--launcher', 'pytorch']
    shared = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    shared['MASTER_PORT'] = free_port()

    def rank(number):
        env = dict(shared, RANK=number, LOCAL_RANK=number)
        return start(*words, cwd=cwd, **env)

    done = side_by_side({n: lambda n=n: rank(n) for n in ('0', '1')}).values()
    return Done(
        max((d.status for d in done), key=abs),
        '\n'.join(d.output for d in done))


def train(cwd: str, config: str, work: str, *words: str, **options) -> Done:
    """Run ``tools/train.py`` or, as an option says, another ``tool``."""
    tool = options.pop('tool', TRAIN)
    words = ('python', tool, config, '--work-dir', work, *words)
    return start(*words, cwd=cwd, **options)


@contextlib.contextmanager
def full_disk(size: int):
    """Let this process write files of a number of bytes at most."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def load(path: str) -> Dict:
    """Read a runner's checkpoint as this stack reads it."""
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


def states(work: Path, *iters: int) -> List[Dict]:
    """The weights that a run has saved, by iteration."""
    return [load(work / f'iter_{i}.pth')['state_dict'] for i in iters]


def side_by_side(jobs: Dict[str, Callable], width: int = 2) -> Dict:
    """Run jobs in threads, two at a time; returns what each returned."""
    with ThreadPoolExecutor(width) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}


def options(**values) -> Sequence[str]:
    """Write ``a__b=1`` as ``--cfg-options a.b=1``."""
    return [
        '--cfg-options',
        *(f'{key.replace("__", ".")}={value}' for key, value in values.items())
    ]


def loaders(*names: str) -> Dict:
    """Options to load in the same process, two images at a time."""
    same = dict(num_workers=0, persistent_workers=False, batch_size=2)
    return {f'{n}_dataloader__{k}': v for n in names for k, v in same.items()}
