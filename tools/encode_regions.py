# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Make the region embeddings of a config's training data, or check them.

Every image is looked at; what is there and sound is kept, so a killed run
goes on where it was. `tools/train.py` does this by itself when the data set
has not been gone through before or its files have been touched.
"""
import argparse
import sys
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='training config')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmseg_textkd.clip.weights import TextTowerError
from mmseg_textkd.datasets.encode_regions import ensure_regions
from mmseg_textkd.utils.arguments import read_config


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    try:
        cfg = read_config(args.config, args.cfg_options, network=False)
        if 'LoadRegionEmbeddings' not in str(cfg.get('train_dataloader')):
            sys.exit(f'Error: no pipeline of the train_dataloader of '
                     f'{args.config} has a LoadRegionEmbeddings.')
        made = ensure_regions(cfg, progress=True, everything=True)
    except (TextTowerError, ValueError, OSError) as error:
        sys.exit(f'Error: {error}')
    print(f'{made} images encoded; all others were there')


if __name__ == '__main__':
    main()
