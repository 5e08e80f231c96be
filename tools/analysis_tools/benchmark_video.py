# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Measure what a video costs beside its network.

Frames per second of the network alone, on batches that are ready, and of the
whole pipeline: decoding, preparing, the network, drawing and encoding. Both
take the same frames in turn, round by round.
"""
import argparse
from pathlib import Path
from typing import Any, Dict, Optional, Sequence


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('video', help='video file')
    parser.add_argument(
        'config', help='config of a text network, or name of a released one')
    parser.add_argument('checkpoint', nargs='?', help='its weights')
    parser.add_argument(
        '--batch-size',
        type=int,
        default=4,
        help='frames that the network takes at a time (default: %(default)s)')
    parser.add_argument(
        '--threads',
        type=int,
        help="threads of the network on a CPU (default: PyTorch's)")
    parser.add_argument(
        '--runs', type=int, default=10, help='rounds (default: %(default)s)')
    parser.add_argument(
        '--warmup',
        type=int,
        default=1,
        help='rounds before, which do not count (default: %(default)s)')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

from mmseg_textkd.apis import TextSegInferencer  # before mmseg

# isort: split
import tempfile

import torch
from mmengine.device import get_device

from mmseg_textkd.analysis.benchmark import interleave, stopwatch, summarize
from mmseg_textkd.apis.video import read_frames, segment_video
from mmseg_textkd.utils.report import describe, environment, table


def main(argv: Optional[Sequence[str]] = None) -> Dict[str, Dict[str, Any]]:
    """Run the tool.

    Returns:
        dict[str, dict]: Of 'network' and 'pipeline', what ``summarize`` gives
        and ``fps``.
    """
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or get_device()
    inferencer = TextSegInferencer(args.config, args.checkpoint, device)
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
        seconds = interleave({
            k: stopwatch(v, device)
            for k, v in arms.items()
        }, args.runs, args.warmup)
    found = summarize(seconds, 'network')
    rows = []
    for name, summary in found.items():
        summary['fps'] = len(frames) / summary['median_ms'] * 1e3
        low, high = (1 / ratio for ratio in summary['ratio_ci95'][::-1])
        rows.append((name, f'{summary["fps"]:.1f}',
                     f'{1 / summary["ratio"]:.3f} [{low:.3f}, {high:.3f}]'))
    height, width = frames[0].shape[:2]
    print(f'{len(frames)} frames of {height}x{width}, batches of '
          f'{args.batch_size}, {torch.get_num_threads()} thread(s); '
          f'{describe(environment())}')
    print(table(('', 'frames per second', 'of the network alone'), rows))
    return found


if __name__ == '__main__':
    main()
