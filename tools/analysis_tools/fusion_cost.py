# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Tell what a fusion of image and text costs where it is kept at inference.

Prints a Markdown table: the stock network, and the network of CONFIG with a
fusion of every combination of the settings that --vary gives. One image,
without auxiliary heads; multiply-accumulates of convolutions and matrix
products, attention included, as in docs/en/networks.md. No files are needed.
"""
import argparse
import copy
import itertools
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a text network')
    parser.add_argument(
        '--fusion',
        default='TwoWayBridge',
        help='type of the fusion (default: %(default)s)')
    parser.add_argument(
        '--vary',
        nargs='+',
        metavar='KEY=VALUE',
        help='settings of the fusion, such as width=64,128 stride=1,2')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(1024, 2048),
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the input (default: 1024 2048)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from mmseg_textkd.analysis.benchmark import randomize_text
from mmseg_textkd.deploy import to_stock_cfg
from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.utils.arguments import read_config, read_options
from mmseg_textkd.utils.report import count_cost, table


def cost(model: Dict, size: Sequence[int]) -> Tuple[float, float]:
    """Count parameters and multiply-accumulates.

    Args:
        model (dict): Config of a segmentor.
        size (Sequence[int]): Height and width of the image.

    Returns:
        tuple[float, float]: Both in units of 1e6 and 1e9.
    """
    built = revert_sync_batchnorm(MODELS.build(copy.deepcopy(model))).eval()
    params, flops = count_cost(
        built, lambda: built(torch.zeros(1, input_channels(built), *size)))
    return params / 1e6, flops / 2e9


def combinations(vary: Dict[str, Any]) -> List[Dict[str, Any]]:
    """All combinations of settings, each one value or several."""
    lists = [v if isinstance(v, (list, tuple)) else [v] for v in vary.values()]
    return [dict(zip(vary, values)) for values in itertools.product(*lists)]


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    try:
        cfg = randomize_text(read_config(args.config))
        settings = combinations(read_options(args.vary))
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    init_default_scope(cfg.get('default_scope') or 'mmseg')
    cfg.model.pop('auxiliary_head', None)
    cfg.model.decode_head.pop('fusion', None)
    stock = cost(to_stock_cfg(cfg).model, args.size)
    rows = [('none (stock)', f'{stock[0]:.2f}', f'{stock[1]:.2f}', '')]
    for setting in settings:
        cfg.model.decode_head.fusion = dict(
            type=args.fusion, use='inference', **setting)
        params, macs = cost(cfg.model, args.size)
        words = ', '.join(f'{k} {v}' for k, v in setting.items())
        rows.append((words or 'defaults', f'{params:.2f}', f'{macs:.2f}',
                     f'{100 * (macs / stock[1] - 1):+.1f} %'))
    print(
        table((f'{args.fusion}, {args.size[0]}x{args.size[1]}',
               'parameters (M)', 'GMACs', 'beside stock'), rows))


if __name__ == '__main__':
    main()
