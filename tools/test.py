# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Test a segmentor: MMSegmentation's ``tools/test.py`` and its arguments.

The checkpoint must be that of the network of the config: no weight may be
missing, unexpected, of another shape or NaN, and the classes must be those of
the data set. With ``--no-strict`` a warning says where it is not. Without a
GPU ``--launcher pytorch`` works too.
"""
import argparse
import os
import sys
from types import ModuleType
from typing import Dict, Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line: the arguments of MMSegmentation's tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument(
        '--work-dir',
        help='folder of the log and the scores (default: of the config, or '
        'work_dirs/CONFIG)')
    parser.add_argument('--out', help='folder of the predicted label maps')
    parser.add_argument(
        '--show', action='store_true', help='open windows of predictions')
    parser.add_argument(
        '--show-dir', help='folder of drawn predictions, below the log')
    parser.add_argument(
        '--wait-time',
        type=float,
        default=2,
        help='of a window in seconds (default: %(default)s)')
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
        '--no-strict',
        action='store_true',
        help='warn where weights or classes are others than those of the '
        'config, instead of refusing them')
    parser.add_argument(
        '--tta', action='store_true', help='with augmentation of the images')
    parser.add_argument(
        '--local-rank',
        '--local_rank',
        type=int,
        default=0,
        help='number of this process, which torch.distributed gives')
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmengine.config import Config
from mmengine.device import get_device

from mmseg_textkd.compat import load_stock_tool, shorten_console
from mmseg_textkd.engine import check_loaded, join_cpu_ranks
from mmseg_textkd.evaluation import label_map_names
from mmseg_textkd.utils.arguments import read_config, read_options
from mmseg_textkd.utils.config import as_list, type_name


def too_many_for_pictures(cfg: Config) -> bool:
    """Whether label maps need more than 8 bits, of which 255 is no class."""
    return any(
        evaluator.get('ignore_index', 255) > 255
        for evaluator in as_list(cfg.get('test_evaluator')))


def check_names(tool: ModuleType) -> None:
    """Refuse ``--out`` where label maps would replace one another."""

    class NamedRunner(tool.Runner):
        """The runner of the tool, which looks at the names first."""

        def test(self) -> Dict[str, float]:
            try:
                label_map_names(self.test_loop.dataloader.dataset)
            except ValueError as error:
                sys.exit(f'Error: --out: {error}')
            return super().test()

    tool.Runner = NamedRunner


def main() -> None:
    """Test as the stock tool does."""
    args = parse_args()
    shorten_console()
    stock = load_stock_tool('test.py')
    check_loaded(stock, strict=not args.no_strict)
    try:
        cfg = read_config(args.config, args.cfg_options)
        args.cfg_options = read_options(args.cfg_options)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    if args.out:
        check_names(stock)
    if args.out and too_many_for_pictures(cfg):
        sys.exit('Error: --out: MMSegmentation writes label maps of 8 bits, '
                 f'which cannot hold the classes of {args.config}. Leave it '
                 'out, the scores are not made from them; '
                 'demo/image_demo.py writes label maps of 16 bits.')
    loader = cfg.get('test_dataloader') or {}
    several = type_name(loader.get('dataset')) == 'MultiDataset'
    for option in ('tta', 'out'):
        if several and getattr(args, option):
            sys.exit(f'Error: --{option}: MMSegmentation has it for one data '
                     f'set, but {args.config} tests on several. Test a config '
                     'of one of them (tools/model_converters/textkd2mmseg.py '
                     '--classes).')
    if args.launcher == 'pytorch' and get_device() == 'cpu':
        options = join_cpu_ranks(cfg)
        args.cfg_options = {**options, **args.cfg_options}
    stock.parse_args = lambda: args
    stock.main()


if __name__ == '__main__':
    main()
