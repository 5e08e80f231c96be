# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Run tools as a user does: in processes of their own."""
import os
import os.path as osp
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, NamedTuple, Sequence

from mmengine.runner.checkpoint import CheckpointLoader

from mmseg_textkd.compat import load_stock_tool

ROOT = osp.dirname(osp.dirname(osp.abspath(__file__)))
TOOLS = osp.join(ROOT, 'tools')
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


class Done(NamedTuple):
    """How a process ended and what it said."""
    status: int
    output: str


def start(*words: str,
          cwd: str,
          timeout: float = 300.,
          **variables: str) -> Done:
    """Run a command to its end, without a GPU and without a hub.

    ``python`` is the one that runs the tests, also in shell scripts.
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
    words = [sys.executable if w == 'python' else str(w) for w in words]
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        timeout=timeout)
    return Done(done.returncode, done.stdout)


def load(path: str) -> Dict:
    """Read a runner's checkpoint as this stack reads it."""
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


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
