# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Compare what networks cost: parameters and multiply-accumulates.

Prints a Markdown table of the configs, each as it is trained and in the form
in which it is deployed (`textkd2mmseg.py --l2 keep`), both without auxiliary
heads. Neither weights nor class vectors are needed. Counted by MMEngine's
`get_model_complexity_info`, as `get_flops.py` does.
"""
import argparse
import logging
import warnings
from pathlib import Path
from typing import List, Optional, Sequence

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmseg_textkd.deploy import fold_state_dict, to_stock_cfg
from mmseg_textkd.models.text_parameters import text_providers

COLUMNS = ('network', 'parameters (M)', 'GMACs', 'deployed: parameters (M)',
           'deployed: GMACs')


def build(cfg: Config) -> nn.Module:
    """Build a network without auxiliary heads, with any vectors as text."""
    model = dict(cfg.model)
    model.pop('auxiliary_head', None)
    built = revert_sync_batchnorm(MODELS.build(model)).eval()
    for provider in text_providers(built).values():
        if not provider.filled:
            # Their values do not matter here.
            provider.fill(torch.ones(provider.num_classes, provider.dim))
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
        shape (Sequence[int]): Height and width of one picture, in pixels.

    Returns:
        list[str]: Millions of parameters, and 1e9 multiply-accumulates.
    """
    if model is None:
        return ['-', '-']
    found = get_model_complexity_info(
        model,
        inputs=(torch.zeros(1, 3, *shape), ),
        show_table=False,
        show_arch=False)
    return [f'{found["params"] / 1e6:.3f}', f'{found["flops"] / 1e9:.3f}']


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG')
    parser.add_argument(
        '--shape',
        nargs=2,
        type=int,
        default=(512, 512),
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the picture (default: 512 512)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings of all configs to override, as key=value')
    args = parser.parse_args(argv)
    # It warns of each operator that it takes for free.
    MMLogger.get_current_instance().setLevel(logging.ERROR)
    print(f'{args.shape[0]}x{args.shape[1]}, without auxiliary heads\n')
    print(f'| {" | ".join(COLUMNS)} |\n{"| --- " * len(COLUMNS)}|')
    for path in args.configs:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(args.cfg_options or {})
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        model = build(cfg)
        cells = [path.stem, *count(model, args.shape)]
        cells += count(deploy(model, cfg), args.shape)
        print(f'| {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
