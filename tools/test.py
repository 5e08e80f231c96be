# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Test a segmentor: MMSegmentation's ``tools/test.py`` and its arguments.

Without a GPU ``--launcher pytorch`` works too.
"""
from mmengine.config import Config
from mmengine.device import get_device

from mmseg_textkd.compat import load_stock_tool
from mmseg_textkd.engine import join_cpu_ranks


def main() -> None:
    """Test as the stock tool does."""
    stock = load_stock_tool('test.py')
    args = stock.parse_args()
    if args.launcher == 'pytorch' and get_device() == 'cpu':
        options = join_cpu_ranks(Config.fromfile(args.config))
        args.cfg_options = {**options, **(args.cfg_options or {})}
    stock.parse_args = lambda: args
    stock.main()


if __name__ == '__main__':
    main()
