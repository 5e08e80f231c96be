# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Measure the segmentation of videos.

speed: frames per second of the network alone, on batches that are ready, and
of the whole pipeline, which decodes, prepares, draws and encodes as well; both
take the same frames in turn, round by round. smoothing: mIoU and mVC (see
VideoConsistencyMetric) for each weight of the past when logits are averaged
over the frames, of the validation set of a config, whose images are the
frames of videos in their order. table: make the tables from a ledger alone.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

PAGE = '''<!-- Made by tools/analysis_tools/video.py of {ledger}; not to be \
edited. -->
# Videos

What the numbers mean and what follows from them: \
[words](../en/user_guides/words.md#run-a-video).

## Frames per second

Of the network alone and of the whole pipeline (decoding, preparing, the \
network, drawing, encoding), median over the rounds; in brackets the 95 % \
interval of the ratio, by bootstrap over the rounds.

{speed}

## Averaging the logits

Percent; `mVC_C`: share of the pixels that are right in all of C consecutive \
frames, among those whose label stays. One training each, so no spread.

{smoothing}

## Where

{where}
'''
METRICS = 'mIoU', 'wIoU', 'mVC_8', 'mVC_16'


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        dest='command', required=True, help='what to do')
    speed = commands.add_parser('speed', help='frames per second')
    speed.add_argument('video', help='video file')
    speed.add_argument(
        'config', help='config of a text network, or name of a released one')
    speed.add_argument('checkpoint', nargs='?', help='its weights')
    speed.add_argument(
        '--batch-size',
        type=int,
        default=4,
        help='frames that the network takes at a time (default: %(default)s)')
    speed.add_argument(
        '--threads',
        type=int,
        help="threads of the network on a CPU (default: PyTorch's)")
    speed.add_argument(
        '--runs', type=int, default=10, help='rounds (default: %(default)s)')
    speed.add_argument(
        '--warmup',
        type=int,
        default=1,
        help='rounds before, which do not count (default: %(default)s)')
    smoothing = commands.add_parser('smoothing', help='mIoU and mVC')
    smoothing.add_argument(
        'config', help='config of a network, or name of a released one')
    smoothing.add_argument('checkpoint', nargs='?', help='its weights')
    smoothing.add_argument(
        '--smoothing',
        type=float,
        nargs='+',
        default=[0., .1, .3, .5, .7],
        help='weights of the past; 0: no smoothing (default: %(default)s)')
    smoothing.add_argument(
        '--video',
        help='regular expression whose first group is, in the path of a '
        'frame, the name of its video (default: its folder)')
    smoothing.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        metavar='KEY=VALUE',
        help='settings of the config to override')
    for command in (speed, smoothing):
        command.add_argument(
            '--device',
            help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
        command.add_argument(
            '--ledger', type=Path, help='file to add the results to, *.jsonl')
        command.add_argument(
            '--network',
            help='name of the network in the ledger (default: the config)')
    made = commands.add_parser('table', help='make the tables')
    made.add_argument('ledger', type=Path, help='file to read, *.jsonl')
    made.add_argument(
        '--out', type=Path, help='page to write (default: print it)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmseg_textkd.apis import TextSegInferencer, find_model  # before mmseg

# isort: split
import hashlib
import tempfile

import cv2
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner
from mmseg.apis import init_model

from mmseg_textkd.analysis.benchmark import interleave, stopwatch, summarize
from mmseg_textkd.apis.video import LogitSmoother, read_frames, segment_video
from mmseg_textkd.evaluation import VideoConsistencyMetric
from mmseg_textkd.study import Ledger, LedgerError
from mmseg_textkd.utils.arguments import explain, read_options
from mmseg_textkd.utils.config import load_config
from mmseg_textkd.utils.io import write_files
from mmseg_textkd.utils.report import describe, environment, table


def measure_speed(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Time the network and the whole pipeline on the frames of a video."""
    if args.threads:
        torch.set_num_threads(args.threads)
    where = environment(cv2)
    inferencer = TextSegInferencer(args.config, args.checkpoint, args.device)
    frames = list(read_frames(args.video)[0])
    batches = [
        inferencer.collate_fn([
            inferencer.pipeline(frame)
            for frame in frames[start:start + args.batch_size]
        ]) for start in range(0, len(frames), args.batch_size)
    ]

    @torch.no_grad()
    def network() -> None:
        for batch in batches:
            # A copy: the preprocessor changes the dict, not its tensors.
            inferencer.forward(dict(batch))

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / 'out.mp4')

        def pipeline() -> None:
            segment_video(
                inferencer,
                args.video,
                out,
                batch_size=args.batch_size,
                progress=False)

        arms = dict(network=network, pipeline=pipeline)
        seconds = interleave(
            {
                k: stopwatch(v, args.device)
                for k, v in arms.items()
            }, args.runs, args.warmup)
    found: Dict[str, Any] = summarize(seconds, 'network')
    for summary in found.values():
        summary['fps'] = len(frames) / summary['median_ms'] * 1e3
    height, width = frames[0].shape[:2]
    video = f'{len(frames)} frames of {height}x{width}'
    return [
        _entry(args, where, inferencer.cfg, inferencer.classes,
               f'{video}, {where["threads"]} thread(s)', found)
    ]


@torch.no_grad()
def measure_smoothing(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Score the averaged logits. The network runs once."""
    config, checkpoint = args.config, args.checkpoint
    if checkpoint is None:
        config, checkpoint = find_model(config)
    cfg = load_config(config, read_options(args.cfg_options))
    where = environment(cv2)
    model = init_model(cfg.copy(), str(checkpoint), args.device)
    loader = Runner.build_dataloader(cfg.val_dataloader)
    arms = {}
    for weight in args.smoothing:
        metric = VideoConsistencyMetric(iou_metrics=['mIoU'], video=args.video)
        metric.dataset_meta = loader.dataset.metainfo
        arms[weight] = LogitSmoother(weight) if weight else None, metric
    video = None
    for batch in loader:
        for sample in model.test_step(batch):
            last, video = video, metric.name_video(sample.img_path)
            for smoother, _ in arms.values():
                if smoother and video != last:
                    smoother.reset()
            logits = sample.seg_logits.data
            frame = cv2.imread(sample.img_path)
            for smoother, metric in arms.values():
                averaged = smoother(logits, frame) if smoother else logits
                labels = averaged.argmax(0, keepdim=True)
                if model.out_channels == 1:
                    labels = (averaged > model.decode_head.threshold).long()
                sample.pred_sem_seg.data = labels
                metric.process(batch, [sample.to_dict()])
    return [
        _entry(
            args, where, cfg, loader.dataset.metainfo['classes'],
            f'{weight:g}', {
                k: float(v)
                for k, v in metric.evaluate(len(loader.dataset)).items()
                if k in METRICS
            }) for weight, (_, metric) in arms.items()
    ]


def _entry(args: argparse.Namespace, where: Dict[str, Any], cfg: Config,
           classes: Sequence[str], arm: str,
           found: Dict[str, Any]) -> Dict[str, Any]:
    """Make an entry of the ledger; what is of trainings only is empty."""
    return dict(
        study=args.command,
        network=args.network or Path(args.config).stem,
        arm=arm,
        seed=0,
        train_fraction=1.,
        config_hash=hashlib.sha256(cfg.pretty_text.encode()).hexdigest(),
        iterations=0,
        classes=list(classes),
        val=found,
        curve=[],
        environment=where)


def speed_table(entries: Sequence[Dict[str, Any]]) -> str:
    """Write the table of frames per second."""
    rows = []
    for entry in entries:
        network, pipeline = (entry['val'][k] for k in ('network', 'pipeline'))
        low, high = (1 / ratio for ratio in pipeline['ratio_ci95'][::-1])
        rows.append(
            (entry['network'], entry['arm'], str(len(pipeline['runs_ms'])),
             f'{network["fps"]:.1f}', f'{pipeline["fps"]:.1f}',
             f'{1 / pipeline["ratio"]:.2f} [{low:.2f}, {high:.2f}]'))
    return table(('network', 'video', 'rounds', 'network alone',
                  'whole pipeline', 'ratio'), rows)


def smoothing_table(entries: Sequence[Dict[str, Any]]) -> str:
    """Write the table of mIoU and mVC by the weight of the past."""
    return table(
        ('network', 'weight of the past', *METRICS),
        ((entry['network'], entry['arm'], *(f'{entry["val"][name]:.2f}'
                                            for name in METRICS))
         for entry in entries))


TABLES = dict(speed=speed_table, smoothing=smoothing_table)
MEASURES = dict(speed=measure_speed, smoothing=measure_smoothing)


def make_page(path: Path) -> str:
    """Make the page of a ledger.

    Raises:
        LedgerError: If a line is damaged.
        ValueError: If it has no measurement.
    """
    entries = Ledger(path).entries
    if not entries:
        raise ValueError(f'{path} has no entry.')
    tables = {
        study: make([e for e in entries if e['study'] == study])
        for study, make in TABLES.items()
    }
    where = '\n'.join(
        dict.fromkeys(f'- {e["study"]}, {e["network"]}: '
                      f'{describe(e["environment"])}' for e in entries))
    return PAGE.format(ledger=path.name, where=where, **tables)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the tool."""
    args = parse_args(argv)
    try:
        if args.command == 'table':
            page = make_page(args.ledger)
            if args.out is None:
                print(page, end='')
            else:
                write_files({args.out: page.encode()})
            return
        # A damaged ledger is found before the measurement.
        ledger = args.ledger and Ledger(args.ledger)
        args.device = args.device or get_device()
        found = MEASURES[args.command](args)
        print(describe(found[0]['environment']))
        print(TABLES[args.command](found))
        for entry in found if ledger else ():
            ledger.append(entry)
    except (LedgerError, OSError, ValueError) as error:
        sys.exit(f'Error: {explain(error)}')


if __name__ == '__main__':
    main()
