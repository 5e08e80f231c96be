# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make ToyScenes: seeded street-like scenes, about 15 s on one core.

With --video the camera moves: folders of frames, each with its labels.
"""
import argparse
import sys
import time


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--out',
        help='folder to write (default: data/toy_scenes, with --video '
        'data/toy_videos)')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--seed', type=int, default=0, help='of the scenes (default: 0)')
    for split, number in (('train', 400), ('val', 100)):
        parser.add_argument(
            f'--num-{split}',
            type=int,
            default=number,
            help=f'images of the {split} split (default: {number})')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the images (default: 128 256)')
    for name in ('height', 'width'):
        parser.add_argument(
            f'--{name}', dest=f'old_{name}', type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        '--workers', type=int, default=1, help='processes (default: 1)')
    parser.add_argument(
        '--force',
        action='store_true',
        help='replace a ToyScenes folder that is there already')
    parser.add_argument(
        '--video', action='store_true', help='videos of a moving camera')
    parser.add_argument(
        '--num-videos', type=int, default=8, help='clips (default: 8)')
    parser.add_argument(
        '--num-frames', type=int, default=48, help='of each (default: 48)')
    args = parser.parse_intermixed_args()
    default = 'data/toy_videos' if args.video else 'data/toy_scenes'
    args.out = args.out or args.old_out or default
    args.size = args.size or (args.old_height or 128, args.old_width or 256)
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmseg_textkd.datasets.toy_scenes_generator import (generate_toy_scenes,
                                                        generate_toy_videos)
from mmseg_textkd.utils.arguments import warn_renamed


def main() -> int:
    """Generate, or say why not."""
    args = parse_args()
    warn_renamed(args, out='--out', height='--size', width='--size')
    start = time.time()
    try:
        if args.video:
            generate_toy_videos(args.out, args.num_videos, args.num_frames,
                                args.seed, *args.size)
            print(f'{args.num_videos} videos of {args.num_frames} frames in '
                  f'{args.out} ({time.time() - start:.0f} s)')
            return 0
        written = generate_toy_scenes(
            args.out,
            seed=args.seed,
            num_train=args.num_train,
            num_val=args.num_val,
            height=args.size[0],
            width=args.size[1],
            workers=args.workers,
            force=args.force,
            progress=True)
    except (ValueError, OSError) as error:
        print(f'toy_scenes: {error}', file=sys.stderr)
        return 1
    if written:
        print(f'ToyScenes: {args.num_train} training and {args.num_val} '
              f'validation images in {args.out} '
              f'({time.time() - start:.0f} s)')
    else:
        print(f'ToyScenes is complete in {args.out}; nothing to do')
    return 0


if __name__ == '__main__':
    sys.exit(main())
