# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Options that all benchmarks have; it imports nothing that takes time."""
import argparse
from pathlib import Path
from typing import Optional, Sequence


def add_options(parser: argparse.ArgumentParser, runs: int,
                warmup: int) -> None:
    """Add the options that all benchmarks have.

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
    parser.add_argument(
        '--out',
        type=Path,
        nargs='+',
        metavar='FILE',
        help='files to write: *.json with every run, *.md as it is printed')
    for name in ('json', 'markdown'):
        parser.add_argument(
            f'--{name}', dest=f'old_{name}', type=Path, help=argparse.SUPPRESS)


def parse_options(parser: argparse.ArgumentParser,
                  argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Read a command line and check its common options.

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
    args.out = [
        *(args.out or ()), *filter(None, (args.old_json, args.old_markdown))
    ]
    for path in args.out:
        # Known now and not after all has been measured.
        if path.suffix not in ('.json', '.md'):
            parser.error(f'--out must end in .json or .md, but got {path}')
        if not path.parent.is_dir():
            parser.error(f'there is no folder {path.parent}')
    return args
