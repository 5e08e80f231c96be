# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Check a CamVid folder before training on it; nothing is converted.

The SegNet tutorial's layout is read as it is. This reads every file and says
which are missing, broken, of another size than their image, or hold labels
beyond the classes.
"""
import argparse
import sys

SPLITS = ['train', 'val', 'test']


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data_root', help='folder with train, trainannot ...')
    parser.add_argument(
        '--split',
        nargs='+',
        choices=SPLITS,
        default=SPLITS,
        help='splits to check (default: all)')
    return parser.parse_args()


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmseg_textkd.datasets.camvid import CamVidDataset
from mmseg_textkd.datasets.check_camvid import CamVidReport, check_camvid

MAX_SHOWN = 20


def show(report: CamVidReport) -> None:
    """Print sizes, pixel shares, warnings and problems."""
    for split, sizes in report.sizes.items():
        text = ', '.join(f'{number} of {width}x{height}'
                         for (height, width), number in sizes.most_common())
        print(f'{split}: {sum(sizes.values())} images read'
              f'{": " + text if text else ""}')
    names = (*CamVidDataset.METAINFO['classes'], 'unlabeled')
    width = max(len(split) for split in report.pixels) + 5
    head = ''.join(split.rjust(width) for split in report.pixels)
    print(f'\npixels in % {head}')
    for index, name in enumerate(names):
        shares = (100 * pixels[index] / max(pixels.sum(), 1)
                  for pixels in report.pixels.values())
        print(name.ljust(12) + ''.join(f'{s:{width}.2f}' for s in shares))
    print()
    for warning in report.warnings:
        print(f'warning: {warning}')
    for problem in report.problems[:MAX_SHOWN]:
        print(f'problem: {problem}')
    if len(report.problems) > MAX_SHOWN:
        print(f'... and {len(report.problems) - MAX_SHOWN} more problems')


def main() -> int:
    """Check, print what was found, and return the exit status."""
    args = parse_args()
    report = check_camvid(args.data_root, args.split, progress=True)
    show(report)
    if report.problems:
        print(f'{len(report.problems)} problems in {args.data_root}')
        return 1
    print(f'{args.data_root} is good')
    return 0


if __name__ == '__main__':
    sys.exit(main())
