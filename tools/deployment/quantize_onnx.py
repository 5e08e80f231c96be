# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Quantise an exported network to 8 bits, with images to calibrate on.

Static quantisation of ONNX Runtime (QDQ): weights int8 by channel, activations
uint8 with ranges between the extremes that the images show. The classifier
(the last convolution) and all that comes after it stay float32.
"""
import argparse
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'model', type=Path, help='graph of tools/deployment/export_onnx.py')
    parser.add_argument('--out', type=Path, help='file to write, *.onnx')
    parser.add_argument('old_out', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument(
        '--calibration',
        type=Path,
        required=True,
        help='folder of images, such as those of the training set')
    parser.add_argument(
        '--num-images',
        type=int,
        default=100,
        help='images to take from it, spread over all (default: 100)')
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=89_478_485,
        help='larger images are refused before they are read (default: '
        '%(default)s)')
    parser.add_argument(
        '--eval',
        metavar='CONFIG',
        help='measure the mIoU of both on the validation set of this config')
    args = parser.parse_intermixed_args(argv)
    args.out = args.out or args.old_out and Path(args.old_out)
    if args.out is None:
        parser.error('--out is needed')
    if args.num_images < 1:
        parser.error('--num-images must be at least 1')
    if args.out.suffix != '.onnx':
        parser.error(f'--out must end in .onnx, but got {args.out}')
    if not args.out.parent.is_dir():
        parser.error(f'there is no folder {args.out.parent}')
    if args.out.exists():
        parser.error(f'{args.out} exists; remove it or write elsewhere')
    return args


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import numpy as np
import onnx
import onnxruntime.quantization as ort
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, METRICS
from onnxruntime.quantization.shape_inference import quant_pre_process

from mmseg_textkd.deploy.onnx_network import OnnxNetwork
from mmseg_textkd.utils.arguments import warn_renamed
from mmseg_textkd.utils.io import (check_image, list_images, read_image,
                                   write_files)

CHECKED = sys.maxsize  # pixels: what is read has been checked
OPERATORS = ['Conv', 'MatMul', 'Gemm', 'Relu', 'Add']


class ImageReader(ort.CalibrationDataReader):
    """Gives ONNX Runtime one image after another.

    Args:
        network (OnnxNetwork): The network, which says how to prepare them.
        paths (list[Path]): The images.
    """

    def __init__(self, network: OnnxNetwork, paths: List[Path]) -> None:
        self.network = network
        self.paths = iter(paths)

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        """Get the next input, or None after the last."""
        path = next(self.paths, None)
        if path is None:
            return None
        return dict(image=self.network.inputs(read_image(path, CHECKED)))


def quantize(path: Path, network: OnnxNetwork, images: List[Path],
             out: Path) -> None:
    """Write the quantised graph."""
    prepared = out.with_name('prepared.onnx')
    # Its symbolic shape inference does not know all operators.
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    convs = [n for n in onnx.load(prepared).graph.node if n.op_type == 'Conv']
    ort.quantize_static(
        str(prepared),
        str(out),
        ImageReader(network, images),
        quant_format=ort.QuantFormat.QDQ,
        per_channel=True,
        activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8,
        op_types_to_quantize=OPERATORS,
        nodes_to_exclude=[convs[-1].name])


def agreement(networks: Sequence[OnnxNetwork], images: List[Path]) -> float:
    """Share of the pixels to which two networks give the same class."""
    same = []
    for path in images:
        image = read_image(path, CHECKED)
        first, second = (network.labels(image) for network in networks)
        same.append((first == second).mean())
    return float(np.mean(same))


def mean_iou(network: OnnxNetwork, config: str) -> float:
    """Measure the mIoU in per cent on the validation set of a config.

    Labels are resized to the ground truth, where the sizes differ.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    classes = network.meta['classes']
    if list(dataset.metainfo['classes']) != classes:
        raise ValueError(f'{config} has other classes than the network: '
                         f'{dataset.metainfo["classes"]} and {classes}')
    metric = METRICS.build(dict(cfg.val_evaluator, prefix=None))
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        data = dataset[i]
        truth = data['data_samples'].gt_sem_seg.data
        labels = network.labels(data['inputs'].permute(1, 2, 0).numpy())
        labels = torch.from_numpy(labels.astype(np.int64))[None, None]
        labels = torch.nn.functional.interpolate(
            labels.double(), truth.shape[1:], mode='nearest').long()[0]
        metric.process({}, [
            dict(pred_sem_seg=dict(data=labels), gt_sem_seg=dict(data=truth))
        ])
    return metric.evaluate(len(dataset))['mIoU']


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    network = OnnxNetwork(args.model)
    images = list_images(args.calibration)
    images = images[::max(len(images) // args.num_images, 1)][:args.num_images]
    for path in images:  # before hours of calibration
        check_image(path, args.max_pixels)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, 'int8.onnx')
        quantize(args.model, network, images, out)
        quantized = OnnxNetwork(out)
        share = agreement((network, quantized), images)
        data = out.read_bytes()
    lines = [[
        name, f'{size / 1e6:.2f} MB',
        f'mIoU {mean_iou(net, args.eval):.2f}' if args.eval else ''
    ] for name, size, net in (('FP32', args.model.stat().st_size, network),
                              ('INT8', len(data), quantized))]
    write_files({args.out: data})
    print('\n'.join('  '.join(line) for line in lines))
    print(f'the same class at {100 * share:.2f} % of the pixels of '
          f'{len(images)} images of {args.calibration}')
    print(f'wrote {args.out}')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    warn_renamed(args, out='--out')
    try:
        run(args)
    except (AssertionError, ImportError, KeyError, OSError, RuntimeError,
            TypeError, ValueError) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
