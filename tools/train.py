# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Train a segmentor: MMSegmentation's ``tools/train.py`` and its arguments.

Before the run starts, text embeddings that the config describes (``build=``)
and region embeddings are made where they are missing. ``--resume`` also takes
the path of a checkpoint, and without a GPU ``--launcher pytorch`` and
``--amp`` work too.
"""
import argparse
import inspect
import os
import os.path as osp
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple


def split_resume(words: List[str]) -> Tuple[Optional[str], List[str]]:
    """Take ``--resume [auto | PATH]`` out of the arguments.

    Args:
        words (list[str]): The arguments.

    Returns:
        tuple[str | None, list[str]]: 'auto' (the latest checkpoint of the
        work directory, as the stock tool has it), a checkpoint, or None; and
        the other arguments.

    Raises:
        SystemExit: If there is no such checkpoint.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--resume', nargs='?', const='auto')
    args, rest = parser.parse_known_args(words)
    resume = args.resume
    if resume and resume.endswith(('.py', '.json', '.yaml', '.yml')):
        # `--resume CONFIG`, as the stock tool allows.
        return 'auto', [resume, *rest]
    if resume in (None, 'auto') or osp.isfile(resume) or '://' in resume:
        return resume, rest
    sys.exit(f'--resume {resume}: there is no such checkpoint. Give the path '
             'of a .pth file, or `--resume auto` for the latest one of the '
             'work directory.')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line: the arguments of MMSegmentation's tool."""
    resume, words = split_resume(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='training config')
    parser.add_argument(
        '--work-dir',
        help='folder of logs and checkpoints (default: of the config, or '
        'work_dirs/CONFIG)')
    parser.add_argument(
        '--resume',
        nargs='?',
        metavar='CHECKPOINT',
        help='go on from the latest checkpoint of the work directory '
        '(alone, or auto), or from CHECKPOINT')
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what starts the processes (default: none, there is one)')
    parser.add_argument(
        '--local-rank',
        '--local_rank',
        type=int,
        default=0,
        help='number of this process, which torch.distributed gives')
    args = parser.parse_args(words)
    args.resume = resume
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.registry import OPTIMIZERS

from mmseg_textkd.clip.weights import TextTowerError
from mmseg_textkd.compat import load_stock_tool, shorten_console
from mmseg_textkd.datasets.encode_regions import ensure_regions
from mmseg_textkd.engine import check_loaded, join_cpu_ranks
from mmseg_textkd.text.encode_classes import check_files, ensure_embeddings
from mmseg_textkd.utils.arguments import read_config, read_options
from mmseg_textkd.utils.checkpoint import find_checkpoint
from mmseg_textkd.utils.config import type_name


def load_config(args: argparse.Namespace) -> Config:
    """Load the config as the stock tool will.

    Args:
        args (argparse.Namespace): Parsed arguments of the stock tool.

    Returns:
        Config: The config with ``--cfg-options`` merged in.
    """
    cfg = read_config(args.config, args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs',
                                osp.splitext(osp.basename(args.config))[0])
    return cfg


def complete_optimizer(cfg: Config) -> Dict[str, float]:
    """Name the weight decay that an optimizer has by itself.

    MMEngine needs it written out where a config sets it for some parameters.

    Args:
        cfg (Config): The config.

    Returns:
        dict[str, float]: For ``--cfg-options``; empty if it is named.
    """
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not optimizer or 'weight_decay' in optimizer:
        return {}
    kind = optimizer['type']
    kind = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
    known = {} if kind is None else inspect.signature(kind).parameters
    if 'weight_decay' not in known:
        return {}
    default = known['weight_decay'].default
    return {'optim_wrapper.optimizer.weight_decay': default}


def main() -> None:
    """Make what embeddings are missing, then train."""
    args = parse_args()
    shorten_console()
    stock = load_stock_tool('train.py')
    resume, args.resume = args.resume, args.resume is not None
    try:
        cfg = load_config(args)
        options = args.cfg_options = read_options(args.cfg_options)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    if resume not in (None, 'auto'):
        options['load_from'] = cfg.load_from = resume
    options.update(complete_optimizer(cfg))
    if resume == 'auto':
        # MMEngine takes what `last_checkpoint` names, or else `load_from`.
        found = find_checkpoint(Path(cfg.work_dir))
        args.resume = found is not None
        if found is not None:
            options['load_from'] = str(found)
        else:
            print(f'--resume: no checkpoint in {cfg.work_dir}; the run starts '
                  'from the beginning')
    try:
        ensure_embeddings(cfg)
        check_files(cfg)
    except (TextTowerError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    ensure_regions(cfg, progress=True)
    if get_device() == 'cpu':
        if args.launcher == 'pytorch':
            options.update(join_cpu_ranks(cfg))
        if args.amp and type_name(cfg.optim_wrapper) in ('', 'OptimWrapper'):
            args.amp = False
            options['optim_wrapper.type'] = 'CPUAmpOptimWrapper'
            if is_main_process():
                print('--amp without a GPU: autocast to bfloat16 on the CPU')
    check_loaded(stock)
    stock.parse_args = lambda: args
    stock.main()


if __name__ == '__main__':
    main()
