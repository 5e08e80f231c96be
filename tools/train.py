# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Train a segmentor: MMSegmentation's ``tools/train.py`` and its arguments.

Before the run starts, text embeddings that the config describes (``build=``)
and that are missing are made.
"""
import argparse

from mmengine.config import Config

from mmseg_textkd.compat import load_stock_tool
from mmseg_textkd.text.build import ensure_embeddings


def load_config(args: argparse.Namespace) -> Config:
    """Load the config as the stock tool will.

    Args:
        args (argparse.Namespace): Parsed arguments of the stock tool.

    Returns:
        Config: The config with ``--cfg-options`` merged in.
    """
    cfg = Config.fromfile(args.config)
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    return cfg


def main() -> None:
    """Make what embeddings are missing, then train."""
    stock = load_stock_tool('train.py')
    ensure_embeddings(load_config(stock.parse_args()))
    stock.main()


if __name__ == '__main__':
    main()
