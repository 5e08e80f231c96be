# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Options of all exports; it imports nothing that takes time."""
import argparse
from pathlib import Path
from typing import Optional, Sequence

NUM_IMAGES = 10


def parser(description: str, suffix: str) -> argparse.ArgumentParser:
    """Make the parser of what all formats have in common."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='stock config')
    parser.add_argument('checkpoint', type=Path, help='its checkpoint')
    parser.add_argument('--out', type=Path, help=f'file to write, *{suffix}')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help="size of the input (default: the config's crop size)")
    parser.add_argument(
        '--dynamic',
        action='store_true',
        help='take other sizes too; checked at two')
    parser.add_argument(
        '--output',
        choices=('logits', 'argmax'),
        help='logits (1, K, H, W), float32, or labels (1, H, W), uint8 '
        '(default: argmax with --preprocess, else logits)')
    parser.add_argument(
        '--softmax',
        action='store_true',
        help='probabilities instead of logits')
    parser.add_argument(
        '--preprocess',
        action='store_true',
        help='take an image (1, H, W, 3), uint8, BGR, instead of a normalized '
        'one (1, 3, H, W), float32')
    parser.add_argument(
        '--images',
        type=Path,
        help=f'folder; compare on its first {NUM_IMAGES} images as well')
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=89_478_485,
        help='larger images are refused before they are read (default: '
        '%(default)s)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    return parser


def complete(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]],
             suffix: str) -> argparse.Namespace:
    """Parse the arguments, check them and fill in defaults."""
    args = parser.parse_intermixed_args(argv)
    args.out = args.out or args.old_out and Path(args.old_out)
    if args.out is None:
        parser.error('--out is needed')
    if args.output is None:
        args.output = ('argmax'
                       if args.preprocess and not args.softmax else 'logits')
    if args.softmax and args.output == 'argmax':
        parser.error('--softmax changes no label: leave it out, or take '
                     '--output logits')
    if args.softmax:
        args.output = 'probabilities'
    if args.size and min(args.size) < 1:
        parser.error(f'--size must be positive, but got {args.size}')
    if args.out.suffix != suffix:
        parser.error(f'--out must end in {suffix}, but got {args.out}')
    if not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent}')
    if args.out.exists():
        parser.error(f'{args.out} exists; remove it or write elsewhere')
    return args
