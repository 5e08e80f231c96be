# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Command line options and reports of the benchmarks."""
import argparse
import json
from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence

import torch

from ..utils.io import write_files

TIME_HEADER = ('median [quartiles], ms', 'minimum, ms',
               'ratio [95 % interval]')


def time_cells(summary: Mapping[str, Any]) -> List[str]:
    """Format median, quartiles, minimum and ratio as table cells."""
    low, high = summary['ratio_ci95']
    return [
        f'{summary["median_ms"]:.2f} '
        f'[{summary["q1_ms"]:.2f}, {summary["q3_ms"]:.2f}]',
        f'{summary["min_ms"]:.2f}',
        f'{summary["ratio"]:.3f} [{low:.3f}, {high:.3f}]'
    ]


def write_results(results: Mapping[str,
                                   Any], page: str, json_path: Optional[Path],
                  markdown_path: Optional[Path]) -> None:
    """Print a report and write the requested files atomically."""
    print(page)
    files = {}
    if json_path:
        files[json_path] = json.dumps(results, indent=2).encode() + b'\n'
    if markdown_path:
        files[markdown_path] = page.encode()
    write_files(files)


def add_options(parser: argparse.ArgumentParser, runs: int,
                warmup: int) -> None:
    """Add the common options of the benchmarks.

    Args:
        parser (ArgumentParser): Parser of the tool.
        runs (int): Default number of rounds.
        warmup (int): Default number of rounds before.
    """
    parser.add_argument(
        '--runs',
        type=int,
        default=runs,
        help='rounds, in each of which everything runs once, in a drawn '
        'order (default: %(default)s)')
    parser.add_argument(
        '--warmup',
        type=int,
        default=warmup,
        help='rounds before, which do not count (default: %(default)s)')
    parser.add_argument(
        '--threads', type=int, help='on the CPU (default: that of PyTorch)')
    parser.add_argument('--json', type=Path, help='file to write')
    parser.add_argument('--markdown', type=Path, help='file to write')


def parse_options(parser: argparse.ArgumentParser,
                  argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse a command line, check the common options, set the threads.

    Args:
        parser (ArgumentParser): Parser with :func:`add_options`.
        argv (Sequence[str], optional): The command line.

    Returns:
        Namespace: The arguments.
    """
    args = parser.parse_args(argv)
    for name, least in dict(runs=2, warmup=0, threads=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name} must be at least {least}')
    for path in filter(None, (args.json, args.markdown)):
        # Known now and not after all has been measured.
        if not path.parent.is_dir():
            parser.error(f'there is no folder {path.parent}')
    if args.threads:
        torch.set_num_threads(args.threads)
    return args
