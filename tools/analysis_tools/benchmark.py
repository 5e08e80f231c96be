# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Time the stock network, the text network and the folded one of a config.

All are built in one process and run in turn, one image at a time, from the
image's tensor to the logits at the resolution of the head. `stock again` is
a second stock network: what it differs by is noise. Weights and class vectors
are random; no checkpoint, vectors or data are needed.

Or time folders of tools/deployment/deploy.py, of any runtimes, such as stock
and folded: benchmark.py FOLDER FOLDER ... The first is what the others are
compared with. The peak of the machine, in the same rounds, is the product of
two large float32 matrices.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from benchmark_options import add_options, parse_options

# Of mmseg_textkd.analysis.benchmark_backends.
NAMES = ['eager', 'compile', 'onnxruntime', 'cuda', 'cuda-graph']


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'config',
        nargs='+',
        help='config of a text network, or deployed folders')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(1024, 2048),
        metavar=('HEIGHT', 'WIDTH'),
        help='size of the input (default: 1024 2048)')
    parser.add_argument(
        '--backends',
        nargs='+',
        choices=NAMES,
        default=NAMES,
        help='what runs the network (default: all; what is not there is '
        'skipped)')
    add_options(parser, runs=50, warmup=10)
    args = parse_options(parser, argv)
    args.folders = Path(args.config[0]).is_dir()
    if len(args.config) > 1 and not args.folders:
        parser.error('one config at a time, or folders')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmseg_textkd.analysis.benchmark import (interleave, num_bytes,
                                             peak_memory, randomize_text,
                                             stopwatch, summarize)
from mmseg_textkd.analysis.benchmark_backends import (BACKENDS, Backend,
                                                      Skipped, onnxruntime)
from mmseg_textkd.analysis.benchmark_folders import time_folders
from mmseg_textkd.analysis.benchmark_report import (TIME_HEADER, time_cells,
                                                    write_results)
from mmseg_textkd.deploy import fold, to_stock_cfg
from mmseg_textkd.models.input_channels import input_channels
from mmseg_textkd.models.text_parameters import text_providers
from mmseg_textkd.utils.arguments import read_config, warn_renamed
from mmseg_textkd.utils.config import type_name
from mmseg_textkd.utils.report import count_cost, describe, environment, table

STOCK = 'stock'


def build_networks(cfg: Config) -> Dict[str, nn.Module]:
    """Build what is compared.

    Args:
        cfg (Config): Config of a text network.

    Returns:
        dict[str, nn.Module]: By name, in evaluation mode.

    Raises:
        ValueError: If the config has no text, or does not fold.
    """
    cfg = randomize_text(cfg)
    torch.manual_seed(0)
    text = MODELS.build(cfg.model).eval()
    if not text_providers(text):
        raise ValueError('the network of the config has no text; give a text '
                         'config, from which the stock one is derived.')
    folded = {}
    if type_name(cfg.model) == 'TextKD':  # most do not fold
        keys = ('score_map', 'alignment_head', 'text_loss')
        stock = {k: v for k, v in cfg.model.items() if k not in keys}
        stock['type'] = 'EncoderDecoder'
    else:
        stock = to_stock_cfg(cfg).model
        folded = {'text, folded': fold(text, cfg)}
    networks = {
        STOCK: MODELS.build(stock),
        'stock again': MODELS.build(stock),
        'text, unfolded': text,
        **folded
    }
    return {k: revert_sync_batchnorm(m).eval() for k, m in networks.items()}


def measure(networks: Mapping[str, nn.Module], backend: Backend,
            inputs: Tensor, runs: int, warmup: int) -> Dict[str, Dict]:
    """Measure the networks with one backend.

    Args:
        networks (Mapping[str, nn.Module]): By name.
        backend (Backend): The backend.
        inputs (Tensor): Float tensor with shape (1, 3, H, W).
        runs (int): Number of rounds.
        warmup (int): Number of rounds before.

    Returns:
        dict[str, dict]: By name of the network, as of :func:`summarize`, and
        the weights with the peak of other tensors in bytes.

    Raises:
        Skipped: If it cannot be had here.
    """
    if backend.device == 'cuda' and not torch.cuda.is_available():
        raise Skipped('no CUDA device')
    inputs = inputs.to(backend.device)
    functions = {
        name: backend.prepare(model.to(backend.device), inputs)
        for name, model in networks.items()
    }
    seconds = interleave(
        {
            name: stopwatch(function, backend.device)
            for name, function in functions.items()
        }, runs, warmup)
    results = summarize(seconds, STOCK)
    for name, model in networks.items():
        results[name]['peak_bytes'] = None
        if backend.sees_memory:
            own = num_bytes([*model.parameters(), *model.buffers()])
            results[name]['peak_bytes'] = own + peak_memory(
                functions[name], backend.device)
    return results


def page(results: Mapping[str, Any]) -> str:
    """Write the results as Markdown."""
    counts = [(name, f'{c["params"]:,}', f'{c["flops"] / 1e9:.4f}')
              for name, c in results['networks'].items()]
    times, skipped = [], []
    for backend, rows in results['backends'].items():
        if 'skipped' in rows:
            skipped.append(f'- `{backend}` was skipped: {rows["skipped"]}')
            continue
        for name, row in rows.items():
            peak = row['peak_bytes']
            times.append((backend, name, *time_cells(row),
                          'n/a' if peak is None else f'{peak / 2**20:.1f}'))
    height, width = results['size']
    parts: List[str] = [
        f'`{results["config"]}`, one image of {height}x{width}, float32; '
        f'{results["runs"]} rounds after {results["warmup"]}; '
        f'{describe(results["environment"])}',
        table(('network', 'parameters', 'GFLOPs'), counts),
        table(('backend', 'network', *TIME_HEADER, 'peak memory, MiB'), times)
    ]
    return '\n\n'.join(parts + ['\n'.join(skipped)] * bool(skipped)) + '\n'


def folders_page(results: Mapping[str, Any]) -> str:
    """Write the times of deployed folders as Markdown."""
    rows = [(name, *time_cells(row), f'{row["gflops"]:.1f}',
             f'{100 * row["share_of_peak"]:.0f} %')
            for name, row in results['arms'].items()]
    return '\n\n'.join(
        (f'One picture of {"x".join(map(str, results["size"]))}; '
         f'{results["runs"]} rounds after {results["warmup"]}; '
         f'{describe(results["environment"])} Peak: '
         f'{results["gflops_peak"]:.1f} GFLOP/s.',
         table(('folder', *TIME_HEADER, 'GFLOP/s', 'of peak'), rows))) + '\n'


def run_folders(args: argparse.Namespace) -> None:
    """Time deployed folders."""
    where = environment()
    try:
        found = time_folders({p: Path(p)
                              for p in args.config}, args.runs, args.warmup,
                             torch.get_num_threads(), None, args.size)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    results = dict(
        runs=args.runs, warmup=args.warmup, environment=where, **found)
    write_results(results, folders_page(results), args.out)


@torch.no_grad()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, json='--out', markdown='--out')
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.folders:
        run_folders(args)
        return
    args.config, = args.config
    where = environment(*[onnxruntime] * (onnxruntime is not None))
    init_default_scope('mmseg')
    try:
        networks = build_networks(read_config(args.config))
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f'Error: {error}')
    channels = input_channels(next(iter(networks.values())))
    inputs = torch.randn(1, channels, *args.size)
    results = dict(
        config=args.config,
        size=list(args.size),
        runs=args.runs,
        warmup=args.warmup,
        environment=where,
        networks={
            k: count_cost(m, lambda m=m: m(inputs))._asdict()
            for k, m in networks.items()
        },
        backends={})
    for name in sorted(set(args.backends), key=list(BACKENDS).index):
        try:
            results['backends'][name] = measure(networks, BACKENDS[name],
                                                inputs, args.runs, args.warmup)
        except Skipped as reason:
            print(f'{name} is skipped: {reason}')
            results['backends'][name] = dict(skipped=str(reason))
    write_results(results, page(results), args.out)


if __name__ == '__main__':
    main()
