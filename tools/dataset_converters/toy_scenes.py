# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make ToyScenes: seeded street-like scenes, about 15 s on one core."""
import argparse
import sys
import time

from mmseg_textkd.datasets.toy_scenes_generator import generate_toy_scenes


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'root',
        nargs='?',
        default='data/toy_scenes',
        help='where to write it (default: data/toy_scenes)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--num-train', type=int, default=400)
    parser.add_argument('--num-val', type=int, default=100)
    parser.add_argument('--height', type=int, default=128)
    parser.add_argument('--width', type=int, default=256)
    parser.add_argument(
        '--workers', type=int, default=1, help='processes (default: 1)')
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace a ToyScenes folder that is there already')
    return parser.parse_args()


def main() -> int:
    """Generate, or say why not."""
    args = parse_args()
    start = time.time()
    try:
        written = generate_toy_scenes(**vars(args))
    except (ValueError, OSError) as error:
        print(f'toy_scenes: {error}', file=sys.stderr)
        return 1
    if written:
        print(f'ToyScenes: {args.num_train} training and {args.num_val} '
              f'validation images in {args.root} '
              f'({time.time() - start:.0f} s)')
    else:
        print(f'ToyScenes is complete in {args.root}; nothing to do')
    return 0


if __name__ == '__main__':
    sys.exit(main())
