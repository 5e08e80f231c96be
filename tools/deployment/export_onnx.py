# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Export a stock network to ONNX.

CONFIG and CHECKPOINT are MMSegmentation's; a text network is folded first
(tools/model_converters/textkd2mmseg.py), but for one that keeps its fusion of
image and text, which is exported as it is. What is exported is compared with
PyTorch, on random inputs and on images of yours, before it is written.
"""
import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

from export_options import NUM_IMAGES, complete, parser

OPSET = 20  # that of mmseg_textkd.deploy.export


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    arguments = parser(__doc__, '.onnx')
    arguments.add_argument(
        '--opset',
        type=int,
        default=OPSET,
        help='version of the operators, at least 18 (default: %(default)s)')
    args = complete(arguments, argv, '.onnx')
    if args.opset < 18:
        arguments.error('--opset must be at least 18: torch writes no older '
                        f'ones, but got {args.opset}')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import cv2
import torch
from torch import Tensor

from mmseg_textkd.deploy.export import Exported, metadata, to_onnx
from mmseg_textkd.deploy.export_check import check
from mmseg_textkd.deploy.exportable import ExportableSegmentor, Size
from mmseg_textkd.deploy.load_stock import load_stock
from mmseg_textkd.utils.arguments import read_options, warn_renamed
from mmseg_textkd.utils.io import (MAX_PIXELS, list_images, read_image,
                                   write_files)

# Added to the size for a second one, which the graph has not seen. The first
# is awkward; some networks need multiples of 32.
OFFSETS = ((23, 41), (64, 128))


def read_images(folder: Path,
                network: ExportableSegmentor,
                size: Optional[Size],
                max_pixels: int = MAX_PIXELS) -> List[Tensor]:
    """Read the first images of a folder as inputs of the network.

    Args:
        folder (Path): The folder.
        network (ExportableSegmentor): The network.
        size (tuple[int, int], optional): Height and width to resize to.
        max_pixels (int): Most pixels of an image. Defaults to 89478485.

    Returns:
        list[Tensor]: Inputs, one image each.

    Raises:
        ValueError: If there is none, or one cannot be read.
    """
    inputs = []
    for path in list_images(folder)[:NUM_IMAGES]:
        image = read_image(path, max_pixels)
        if size is not None:
            image = cv2.resize(image, size[::-1])
        image = torch.from_numpy(image)[None]
        if not network.preprocess:
            image = network.preprocessor(
                dict(inputs=list(image.permute(0, 3, 1, 2))))['inputs']
        inputs.append(image)
    return inputs


def random_images(network: ExportableSegmentor, size: Size,
                  dynamic: bool) -> Dict[str, List[Tensor]]:
    """Make a random input and, for a dynamic graph, one of another size.

    Returns:
        dict[str, list[Tensor]]: Inputs by what they are.

    Raises:
        ValueError: If the network itself does not run at the size.
    """
    images = {}
    others = [(size[0] + i, size[1] + j) for i, j in OFFSETS * dynamic]
    for height, width in [size, *others]:
        image = network.example((height, width))
        try:
            network.reference(image)
        except (AssertionError, RuntimeError, ValueError) as error:
            if images and (height, width) != others[-1]:
                continue
            raise ValueError('the network itself does not run at '
                             f'{height}x{width}: {error}') from error
        images[f'random {height}x{width}'] = [image]
        if len(images) == 1 + dynamic:
            break
    return images


def export(args: argparse.Namespace, convert: Callable[..., Exported]) -> None:
    """Do what the command line says."""
    cfg, model, classes = load_stock(args.config, args.checkpoint,
                                     read_options(args.cfg_options))
    network = ExportableSegmentor(model, args.output, args.preprocess).eval()
    size = args.size or cfg.model.data_preprocessor.get('size')
    if size is None:
        raise ValueError('the config names no size: give --size H W.')
    size = tuple(size)
    if cfg.model.get('test_cfg', {}).get('mode') == 'slide':
        print('The config tests in windows (slide); the graph takes the whole '
              'image at once.')
    images = random_images(network, size, args.dynamic)
    if args.images:
        inputs = read_images(args.images, network,
                             None if args.dynamic else size, args.max_pixels)
        images[f'{len(inputs)} images of {args.images}'] = inputs
    exported = convert(network, size, args.dynamic, metadata(network, classes))
    lines = [check(k, network, exported, v) for k, v in images.items()]
    write_files({args.out: exported.data})
    print('\n'.join(lines))
    kind = 'dynamic size' if args.dynamic else f'{size[0]}x{size[1]}'
    print(f'wrote {args.out}: {args.output}, {kind}, '
          f'{len(exported.data) / 1e6:.1f} MB')


def run(args: argparse.Namespace, convert: Callable[..., Exported]) -> None:
    """Export, or leave with a message."""
    warn_renamed(args, out='--out')
    try:
        export(args, convert)
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError,
            TypeError, ValueError) as error:
        sys.exit(f'Error: {error}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    run(args, partial(to_onnx, opset=args.opset))


if __name__ == '__main__':
    main()
