# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Test a segmentor: MMSegmentation's ``tools/test.py`` and its arguments.

The checkpoint must be that of the network of the config: no weight may be
missing, unexpected, of another shape or NaN, and the classes must be those of
the data set. With ``--no-strict`` a warning says where it is not. Without a
GPU ``--launcher pytorch`` works too.
"""
import argparse
import sys

from mmengine.config import Config
from mmengine.device import get_device

from mmseg_textkd.compat import load_stock_tool
from mmseg_textkd.engine import check_loaded, join_cpu_ranks


def too_many_for_pictures(config: str) -> bool:
    """Whether label maps need more than 8 bits, of which 255 is no class."""
    evaluator = Config.fromfile(config).get('test_evaluator')
    evaluators = evaluator if isinstance(evaluator, list) else [evaluator]
    return any((e or {}).get('ignore_index', 255) > 255 for e in evaluators)


def main() -> None:
    """Test as the stock tool does."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument('--no-strict', action='store_true')
    own, sys.argv[1:] = parser.parse_known_args(sys.argv[1:])
    stock = load_stock_tool('test.py')
    args = stock.parse_args()
    check_loaded(stock, strict=not own.no_strict)
    if args.out and too_many_for_pictures(args.config):
        sys.exit('Error: --out: MMSegmentation writes label maps of 8 bits, '
                 f'which cannot hold the classes of {args.config}. Leave it '
                 'out, the scores are not made from them; '
                 'demo/image_demo.py writes label maps of 16 bits.')
    if args.launcher == 'pytorch' and get_device() == 'cpu':
        options = join_cpu_ranks(Config.fromfile(args.config))
        args.cfg_options = {**options, **(args.cfg_options or {})}
    stock.parse_args = lambda: args
    stock.main()


if __name__ == '__main__':
    main()
