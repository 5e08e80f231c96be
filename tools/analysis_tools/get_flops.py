# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Count FLOPs: MMSegmentation's ``get_flops.py`` and its arguments.

No vectors are needed. A text classifier is counted as it is trained, not
folded.
"""
import argparse
import sys
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line: the arguments of MMSegmentation's tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the network')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the input (default: 2048 1024)')
    parser.add_argument(
        '--shape',
        dest='old_shape',
        type=int,
        nargs='+',
        help=argparse.SUPPRESS)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    args = parser.parse_args(argv)
    args.shape = args.size or args.old_shape or [2048, 1024]
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from types import SimpleNamespace

import torch
from mmengine.config import ConfigDict
from torch import nn

from mmseg_textkd.compat import load_stock_tool
from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.models.text_parameters import text_providers
from mmseg_textkd.utils.arguments import (read_config, read_options,
                                          warn_renamed)


def main() -> None:
    """Count as the stock tool does."""
    args = parse_args()
    warn_renamed(args, shape='--size')
    stock = load_stock_tool('analysis_tools/get_flops.py')
    models, count = stock.MODELS, stock.get_model_complexity_info

    def build(cfg: ConfigDict) -> nn.Module:
        model = models.build(cfg)
        for provider in text_providers(model).values():
            if not provider.filled:
                # Their values do not matter here.
                provider.fill(torch.ones(provider.num_classes, provider.dim))

        def set_channels(preprocessor: nn.Module, inputs: tuple) -> None:
            # The tool gives it three, whatever the network wants.
            inputs[0]['inputs'] = [
                image[:1].expand(input_channels(model), -1, -1)
                for image in inputs[0]['inputs']
            ]

        model.data_preprocessor.register_forward_pre_hook(set_channels)
        return model

    def count_inputs(model: nn.Module, *args, inputs, **kwargs) -> dict:
        # MMSegmentation 1.2.2 also gives the shape, and MMEngine 0.10.7
        # refuses to be told twice.
        return count(model, inputs=inputs, **kwargs)

    stock.MODELS = SimpleNamespace(build=build)
    stock.get_model_complexity_info = count_inputs
    try:
        read_config(args.config, args.cfg_options)
        args.cfg_options = read_options(args.cfg_options)
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    stock.parse_args = lambda: args
    stock.main()


if __name__ == '__main__':
    main()
