# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Measure what averaging the logits of a video does to its labels.

Of the validation set of a config, whose images are the frames of videos in
their order: mIoU and mVC (see VideoConsistencyMetric) for each weight of the
past. The network runs once.
"""
import argparse
from typing import Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the network')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument(
        '--smoothing',
        type=float,
        nargs='+',
        default=[0., .3, .5, .7],
        help='weights of the past; 0: no smoothing (default: %(default)s)')
    parser.add_argument(
        '--video',
        help='regular expression whose first group is, in the path of a '
        'frame, the name of its video (default: its folder)')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmseg_textkd.apis.video import LogitSmoother  # before mmseg

# isort: split
import cv2
import torch
from mmengine.device import get_device
from mmengine.runner import Runner
from mmseg.apis import init_model

from mmseg_textkd.evaluation import VideoConsistencyMetric
from mmseg_textkd.utils.arguments import read_options
from mmseg_textkd.utils.config import load_config


@torch.no_grad()
def main(argv: Optional[Sequence[str]] = None) -> dict:
    """Run the tool.

    Returns:
        dict: Metrics by the weight of the past.
    """
    args = parse_args(argv)
    cfg = load_config(args.config, read_options(args.cfg_options))
    model = init_model(cfg, args.checkpoint, args.device or get_device())
    loader = Runner.build_dataloader(cfg.val_dataloader)
    arms = {}
    for weight in args.smoothing:
        metric = VideoConsistencyMetric(iou_metrics=['mIoU'], video=args.video)
        metric.dataset_meta = loader.dataset.metainfo
        arms[weight] = LogitSmoother(weight) if weight else None, metric
    for batch in loader:
        for sample in model.test_step(batch):
            logits = sample.seg_logits.data
            frame = cv2.imread(sample.img_path)
            for smoother, metric in arms.values():
                averaged = smoother(logits, frame) if smoother else logits
                sample.pred_sem_seg.data = averaged.argmax(0, keepdim=True)
                metric.process(batch, [sample.to_dict()])
    found = {
        weight: metric.evaluate(len(loader.dataset))
        for weight, (_, metric) in arms.items()
    }
    names = ('mIoU', 'wIoU', 'mVC_8', 'mVC_16')
    print(f'| weight of the past | {" | ".join(names)} |')
    print('| --- ' * (len(names) + 1) + '|')
    for weight, metrics in found.items():
        values = ' | '.join(f'{metrics[name]:.2f}' for name in names)
        print(f'| {weight:g} | {values} |')
    return found


if __name__ == '__main__':
    main()
