# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Bring LabelMeFacade into the layout of this package.

SOURCE is a copy of https://github.com/cvjena/labelmefacade (for research,
non-commercial): images/, labels/ with colored label maps, train.txt and
test.txt. Images are copied, labels become class indices, "various" 255.
"""
import argparse
import shutil
import sys
from pathlib import Path
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', type=Path, help='the published folder')
    parser.add_argument(
        '--out', type=Path, help='folder to write, such as data/labelmefacade')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args(argv)
    args.out = args.out or args.old_out and Path(args.old_out)
    if args.out is None:
        parser.error('--out is needed')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
from PIL import Image

from mmseg_textkd.datasets import LabelMeFacadeDataset
from mmseg_textkd.utils.arguments import warn_renamed

VARIOUS = (0, 0, 0)


def to_indices(path: Path) -> np.ndarray:
    """Read a colored label map.

    Args:
        path (Path): PNG in the published colors.

    Returns:
        np.ndarray: Class indices, uint8, 255 where unlabeled, shape (H, W).

    Raises:
        ValueError: If there is a color of no class.
    """
    colors = np.asarray(Image.open(path).convert('RGB'))
    labels = np.full(colors.shape[:2], 254, np.uint8)
    labels[(colors == VARIOUS).all(axis=2)] = 255
    for label, color in enumerate(LabelMeFacadeDataset.METAINFO['palette']):
        labels[(colors == color).all(axis=2)] = label
    if (labels == 254).any():
        raise ValueError(f'{path} has colors of no class, such as '
                         f'{colors[labels == 254][0].tolist()}.')
    return labels


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Convert both splits."""
    args = parse_args(argv)
    warn_renamed(args, out='--out')
    for split in ('train', 'test'):
        try:
            text = (args.source / f'{split}.txt').read_text()
            names = [
                Path(line.split()[0]).stem for line in text.split('\n')
                if line.strip()
            ]
            for kind in ('img', 'ann'):
                (args.out / kind / split).mkdir(parents=True, exist_ok=True)
            for name in names:
                labels = to_indices(args.source / 'labels' / f'{name}.png')
                Image.fromarray(labels).save(args.out / 'ann' / split /
                                             f'{name}.png')
                shutil.copyfile(args.source / 'images' / f'{name}.jpg',
                                args.out / 'img' / split / f'{name}.jpg')
        except OSError as error:
            sys.exit(f'labelmefacade: {error}. {args.source} must be the '
                     'published folder, with images, labels, train.txt and '
                     'test.txt; one with img and ann has been converted.')
        except ValueError as error:
            sys.exit(f'labelmefacade: {error}')
        print(f'{split}: {len(names)} images')


if __name__ == '__main__':
    main()
