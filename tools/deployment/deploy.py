# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Deploy a network to a runtime, and prove that it runs there.

A text network is folded first; config and checkpoint may also be stock ones.
What is exported runs in the runtime and is compared with PyTorch before OUT
is there: a folder with the model, its classes and colors, a page about it,
and a program that runs it (run.py), for which only the runtime, numpy and
OpenCV are needed.
"""
import argparse
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

# Of mmseg_textkd.deploy.runtimes: all, and those that take normalized input.
NAMES = ('onnx', 'openvino', 'ncnn', 'litert', 'executorch', 'tensorrt',
         'torchscript')
NORMALIZED = ('ncnn', 'tensorrt')
NUM_IMAGES = 10


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config, with text or stock')
    parser.add_argument('checkpoint', type=Path, help='its checkpoint')
    parser.add_argument(
        '--out', type=Path, required=True, help='folder to write')
    parser.add_argument(
        '--to', choices=NAMES, required=True, help='the runtime')
    parser.add_argument(
        '--precision',
        choices=('fp32', 'fp16', 'int8'),
        default='fp32',
        help='int8 needs --calibrate (default: %(default)s)')
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
        choices=('logits', 'probabilities', 'argmax'),
        default='logits',
        help='scores (1, K, H, W), float32, or labels (1, H, W), uint8 '
        '(default: %(default)s)')
    parser.add_argument(
        '--preprocess',
        action=argparse.BooleanOptionalAction,
        help='take an image (1, H, W, 3), uint8, BGR, and normalize it in the '
        'graph, or a normalized one (1, 3, H, W), float32 (default: the '
        'first, but for ncnn and tensorrt)')
    parser.add_argument(
        '--images',
        type=Path,
        help=f'folder; compare on its first {NUM_IMAGES} images as well')
    parser.add_argument(
        '--eval',
        metavar='CONFIG',
        help='measure the mIoU on the validation set of this config; in int8 '
        'layers stay in float32 where it would fall by more than 1')
    parser.add_argument(
        '--calibrate',
        type=Path,
        help='folder of images for int8, such as those of the training set')
    parser.add_argument(
        '--num-images',
        type=int,
        default=100,
        help='images to take from it, spread over all (default: %(default)s)')
    parser.add_argument(
        '--opset',
        type=int,
        default=20,
        help='of ONNX, at least 18 (default: %(default)s)')
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=89_478_485,
        help='larger images are refused before they are read (default: '
        '%(default)s)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    args = parser.parse_args(argv)
    if (args.precision == 'int8') != (args.calibrate is not None):
        parser.error('--precision int8 and --calibrate FOLDER go together')
    if args.num_images < 1:
        parser.error('--num-images must be at least 1')
    if args.size and min(args.size) < 1:
        parser.error(f'--size must be positive, but got {args.size}')
    if args.opset < 18:
        parser.error('--opset must be at least 18: torch writes no older '
                     f'ones, but got {args.opset}')
    if args.preprocess is None:
        args.preprocess = args.to not in NORMALIZED
    elif args.preprocess and args.to == 'ncnn':
        parser.error('ncnn takes no bytes: leave out --preprocess')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import cv2
import numpy as np
import torch
from torch import Tensor

from mmseg_textkd.deploy.export import metadata
from mmseg_textkd.deploy.export_check import validation
from mmseg_textkd.deploy.exportable import ExportableSegmentor, Size
from mmseg_textkd.deploy.folder import deploy, require
from mmseg_textkd.deploy.load_stock import load_stock
from mmseg_textkd.deploy.runtimes import Form
from mmseg_textkd.utils.arguments import explain, read_options
from mmseg_textkd.utils.io import check_image, list_images, read_image

# Added to the size for a second one, which the graph has not seen. The first
# is awkward; some networks need multiples of 32.
OFFSETS = ((23, 41), (64, 128))
DIVISORS = (8, 16, 32, 64)


def read_inputs(paths: Sequence[Path], network: ExportableSegmentor,
                size: Optional[Size], max_pixels: int) -> List[Tensor]:
    """Read images as inputs of the network.

    Args:
        paths (Sequence[Path]): The images.
        network (ExportableSegmentor): The network.
        size (tuple[int, int], optional): Height and width to resize to.
        max_pixels (int): Most pixels of an image.

    Returns:
        list[Tensor]: Inputs, one image each.

    Raises:
        ValueError: If one cannot be read or is too large.
    """
    inputs = []
    for path in paths:
        image = read_image(path, max_pixels)
        if size is not None:
            image = cv2.resize(image, size[::-1])
        image = torch.from_numpy(image)[None]
        if not network.preprocess:
            image = network.preprocessor(
                dict(inputs=list(image.permute(0, 3, 1, 2))))['inputs']
        inputs.append(image)
    return inputs


def runs(network: ExportableSegmentor, size: Size) -> Optional[Exception]:
    """Tell why the network itself does not run at a size, if it does not."""
    try:
        network.reference(network.example(size))
    except (AssertionError, RuntimeError, ValueError) as error:
        return error
    return None


def random_images(network: ExportableSegmentor, size: Size,
                  dynamic: bool) -> Dict[str, List[Tensor]]:
    """Make a random input and, for a dynamic graph, one of another size.

    Returns:
        dict[str, list[Tensor]]: Inputs by what they are.

    Raises:
        ValueError: If the network itself does not run at the size.
    """
    error = runs(network, size)
    if error:
        larger = ([-(-n // d) * d for n in size] for d in DIVISORS)
        able = [s for s in larger if not runs(network, s)]
        hint = f' Take --size {able[0][0]} {able[0][1]}.' if able else ''
        raise ValueError('the network itself does not run at '
                         f'{size[0]}x{size[1]}: {error}.{hint}') from error
    sizes = [size]
    if dynamic:
        others = [(size[0] + i, size[1] + j) for i, j in OFFSETS]
        sizes += [s for s in others if not runs(network, s)][:1]
    return {f'random {h}x{w}': [network.example((h, w))] for h, w in sizes}


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    require(args.to, args.precision, args.dynamic)
    if args.out.exists():
        raise FileExistsError(f'{args.out} exists; remove it or write '
                              'elsewhere')
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {args.out.parent}')
    shown = list_images(args.images)[:NUM_IMAGES] if args.images else []
    calibration: List[Path] = []
    if args.calibrate:
        found = list_images(args.calibrate)
        number = min(args.num_images, len(found))
        calibration = [found[i * len(found) // number] for i in range(number)]
    for path in (*shown, *calibration):  # before hours of work
        check_image(path, args.max_pixels)
    if args.eval:
        validation(args.eval)
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
    if shown:
        images[f'{len(shown)} images of {args.images}'] = read_inputs(
            shown, network, None if args.dynamic else size, args.max_pixels)
    else:
        print('Only random inputs are compared: no --images are given.')
    inputs = [
        np.ascontiguousarray(image.numpy())
        for image in read_inputs(calibration, network, size, args.max_pixels)
    ]
    meta = deploy(
        args.out, args.to, network,
        Form(size, args.dynamic, args.precision, metadata(network, classes),
             args.opset), classes, images, inputs, args.eval,
        dict(config=Path(args.config).name, checkpoint=args.checkpoint.name))
    for compared in meta['checks']:
        print(compared['text'])
    for key in ('mIoU_fp32', 'mIoU'):
        if meta.get(key) is not None:
            print(f'{key}: {meta[key]:.2f}')
    if len(meta.get('float32_layers', ())) > 1:
        print('in float32, for the mIoU fell by more than 1: '
              f'{", ".join(meta["float32_layers"])}')
    if args.to == 'tensorrt':
        print(f'run in ONNX Runtime ({meta["provider"]}); build the engine '
              f'where the GPU is: {args.out}/README.md')
    megabytes = sum((args.out / f).stat().st_size for f in meta['sha256'])
    print(f'wrote {args.out}: {args.to}, {args.precision}, {args.output}, '
          f'{megabytes / 1e6:.2f} MB; try it:\n  python {args.out}/run.py '
          'street.jpg --out shown.png')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    try:
        run(args)
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError,
            TypeError, ValueError) as error:
        sys.exit(f'Error: {explain(error)}')


if __name__ == '__main__':
    main()
