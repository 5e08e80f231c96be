# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Compare what networks cost: parameters, multiply-accumulates and time.

Prints a Markdown table of the configs, each as it is trained and in the form
in which it is deployed (`textkd2mmseg.py --l2 keep`), both without auxiliary
heads. Neither weights nor class vectors are needed: both are drawn, and cost
the same. Frozen towers count. Multiply-accumulates are those of convolutions
and matrix products, attention included, as PyTorch's `FlopCounterMode` has
them. Times are those of one image at a time, from pixels to logits.
"""
import argparse
import copy
import statistics
import sys
import warnings
from pathlib import Path
from typing import Dict, List, Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'configs',
        nargs='+',
        type=Path,
        metavar='CONFIG',
        help='configs of networks')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the input (default: 512 512)')
    parser.add_argument(
        '--shape', dest='old_shape', type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument(
        '--runs',
        type=int,
        default=0,
        help='also time what is deployed, or else trained, on the CPU, in '
        'this number of rounds (default: 0, no times)')
    parser.add_argument(
        '--threads', type=int, help='on the CPU (default: that of PyTorch)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of all configs to override')
    args = parser.parse_args(argv)
    args.size = args.size or args.old_shape or (512, 512)
    if args.runs == 1 or args.runs < 0:
        parser.error('--runs must be 0 or at least 2')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from mmseg_textkd.analysis.benchmark import (interleave, randomize_clip,
                                             stopwatch)
from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.models import EBSeg
from mmseg_textkd.models.ebseg.frozen_tower import FrozenTower
from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.models.text_parameters import text_providers
from mmseg_textkd.utils.arguments import read_config, warn_renamed
from mmseg_textkd.utils.report import (count_params, describe, environment,
                                       flops_by_module, table)

COLUMNS = ('network', 'parameters (M)', 'GMACs', 'deployed: parameters (M)',
           'deployed: GMACs')


def build(cfg: Config) -> nn.Module:
    """Build a network without auxiliary heads, with any vectors as text."""
    model = copy.deepcopy(dict(cfg.model))
    model.pop('auxiliary_head', None)
    if MODELS.get(model['type']) is EBSeg:
        return build_ebseg(model)
    built = revert_sync_batchnorm(MODELS.build(model))
    built.requires_grad_(False).eval()
    for provider in text_providers(built).values():
        if not provider.filled:
            # Their values do not matter here.
            provider.fill(torch.ones(provider.num_classes, provider.dim))
    return built


def build_ebseg(model: Dict) -> nn.Module:
    """Build EBSeg with towers whose weights are drawn."""
    import timm
    head = model['decode_head']
    head['text'] = dict(
        type='ControlEmbeddings', kind='random', dim=head['text']['dim'])
    head.pop('test_text', None)
    built = MODELS.build(model).requires_grad_(False).eval()
    randomize_clip(built.image_encoder)
    backbone = model['backbone']
    if isinstance(backbone['model'], str):
        sam = timm.create_model(backbone['model'], num_classes=0)
        built.backbone.load_network = lambda: sam
    return built


def deploy(model: nn.Module, cfg: Config) -> Optional[nn.Module]:
    """Bring a network into its deployed form; None if it has none."""
    try:
        state = fold_state_dict(model, keep_l2=True)
        deployed = build(to_stock_cfg(cfg, keep_l2=True))
    except ValueError as error:
        warnings.warn(f'no deployed form: {error}')
        return None
    deployed.load_state_dict(state, strict=True)
    return deployed


def count(model: Optional[nn.Module], shape: Sequence[int]) -> List[str]:
    """Count parameters and multiply-accumulates.

    Args:
        model (nn.Module, optional): A segmentor in evaluation mode.
        shape (Sequence[int]): Height and width of one image, in pixels.

    Returns:
        list[str]: Millions of parameters, and 1e9 multiply-accumulates.
    """
    if model is None:
        return ['-', '-']
    channels = input_channels(model)
    flops = flops_by_module(lambda: model(torch.zeros(1, channels, *shape)))
    towers = [m.network for m in model.modules() if isinstance(m, FrozenTower)]
    number = count_params(model, *towers)
    return [f'{number / 1e6:.3f}', f'{flops["Global"] / 2e9:.3f}']


def measure(models: Dict[str, nn.Module], shape: Sequence[int],
            runs: int) -> Dict[str, str]:
    """Time networks in turn, by median and quartiles.

    Args:
        models (dict[str, nn.Module]): Networks in evaluation mode.
        shape (Sequence[int]): Height and width of one image, in pixels.
        runs (int): Number of rounds, after one for warming up.

    Returns:
        dict[str, str]: Seconds.
    """
    pictures = {
        name: torch.rand(1, input_channels(model), *shape)
        for name, model in models.items()
    }
    arms = {
        name: stopwatch(lambda name=name: models[name](pictures[name]), 'cpu')
        for name in models
    }
    with torch.no_grad():
        seconds = interleave(arms, runs, warmup=1)
    cells = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, method='inclusive')
        cells[name] = f'{middle:.3f} [{low:.3f}, {high:.3f}]'
    return cells


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, shape='--size')
    if args.threads:
        torch.set_num_threads(args.threads)
    rows, timed = {}, {}
    stems = [path.stem for path in args.configs]
    for path in args.configs:
        # Of runs all are called `config.py`.
        name = path.stem if stems.count(path.stem) == 1 else str(path)
        try:
            cfg = read_config(path, args.cfg_options)
        except (OSError, ValueError) as error:
            sys.exit(f'Error: {error}')
        init_default_scope(cfg.get('default_scope') or 'mmseg')
        model = build(cfg)
        rows[name] = count(model, args.size)
        deployed = deploy(model, cfg)
        rows[name] += count(deployed, args.size)
        if args.runs:
            timed[name] = deployed or model
    columns = list(COLUMNS)
    where = f'{args.size[0]}x{args.size[1]}, without auxiliary heads'
    if args.runs:
        columns.append('seconds')
        where += f'. {describe(environment())}'
        for name, cell in measure(timed, args.size, args.runs).items():
            rows[name].append(cell)
    lines = [(name, *cells) for name, cells in rows.items()]
    print(f'{where}\n\n{table(columns, lines)}')


if __name__ == '__main__':
    main()
