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

import cv2
import torch
from mmengine.config import DictAction
from torch import Tensor

from mmseg_textkd.deploy.export import OPSET, Exported, metadata, to_onnx
from mmseg_textkd.deploy.export_check import check
from mmseg_textkd.deploy.exportable import ExportableSegmentor, Size
from mmseg_textkd.deploy.load_stock import load_stock
from mmseg_textkd.utils.io import (MAX_PIXELS, list_images, read_image,
                                   write_files)

NUM_IMAGES = 10
# Added to the size for a second one, which the graph has not seen. The first
# is awkward; some networks need multiples of 32.
OFFSETS = ((23, 41), (64, 128))


def parser(description: str, suffix: str) -> argparse.ArgumentParser:
    """Make the parser of what all formats have in common."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='stock config')
    parser.add_argument('checkpoint', type=Path, help='its checkpoint')
    parser.add_argument('out', type=Path, help=f'file to write, *{suffix}')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
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
        default=MAX_PIXELS,
        help='larger images are refused before they are read (default: '
        '%(default)s)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='settings of the config to override, as key=value')
    return parser


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace,
             suffix: str) -> argparse.Namespace:
    """Check the arguments against each other and fill in defaults."""
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
        parser.error(f'OUT must end in {suffix}, but got {args.out}')
    if not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent}')
    if args.out.exists():
        parser.error(f'{args.out} exists; remove it or write elsewhere')
    return args


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
                                     args.cfg_options)
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
    try:
        export(args, convert)
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError,
            TypeError, ValueError) as error:
        sys.exit(f'Error: {error}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    arguments = parser(__doc__, '.onnx')
    arguments.add_argument(
        '--opset',
        type=int,
        default=OPSET,
        help='version of the operators, at least 18 (default: %(default)s)')
    args = complete(arguments, arguments.parse_args(argv), '.onnx')
    if args.opset < 18:
        arguments.error('--opset must be at least 18: torch writes no older '
                        f'ones, but got {args.opset}')
    run(args, partial(to_onnx, opset=args.opset))


if __name__ == '__main__':
    main()
