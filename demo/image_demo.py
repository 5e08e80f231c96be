# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Segment images or a video, into the trained classes or into your own.

The input is an image, a folder of images, a video file or, with --webcam, a
camera. With --classes the classifier is folded anew for these names; nothing
is trained.
"""
import argparse
import os
import sys
from typing import Any, Optional, Sequence

# Those of mmseg_textkd: models.new_words, utils.io, apis.video.
NEW_WORDS = ('unit', 'projected', 'ridge', 'raw')
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
CODECS = {'.mp4': 'mp4v', '.avi': 'MJPG'}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', nargs='?', help='image, folder or video')
    parser.add_argument('config', nargs='?', help='config of the network')
    parser.add_argument('checkpoint', nargs='?', help='its weights')
    parser.add_argument(
        '--model',
        metavar='NAME',
        help='a released model in place of config and checkpoint, see '
        'model_zoo/README.md')
    parser.add_argument(
        '--classes',
        help='names with commas between them, "road, tree, bus stop"; or a '
        'vocabulary: a .txt or .json file, or a key such as camvid')
    parser.add_argument(
        '--other',
        nargs='?',
        const='other',
        help='a word for everything else: one more class (default: other)')
    parser.add_argument(
        '--threshold',
        type=float,
        help='pixels whose class is less probable than this are "other"')
    parser.add_argument(
        '--new-bias',
        type=float,
        default=0.,
        help='added to the logits of new classes, which the training has '
        'taught the network to avoid (default: 0)')
    parser.add_argument(
        '--new-words',
        choices=NEW_WORDS,
        help='how vectors of new classes are used (default: what fits the '
        'network)')
    parser.add_argument(
        '--text-model', help='text model (default: that of the training)')
    parser.add_argument('--tower', dest='old_tower', help=argparse.SUPPRESS)
    parser.add_argument('--pretrained', help='its tag or file of weights')
    parser.add_argument(
        '--templates', help='prompt templates (default: of the training)')
    parser.add_argument(
        '--embeddings', help='embeddings file to take instead of a tower')
    parser.add_argument(
        '--similarity',
        help='classes, with commas between them, whose cosine with every '
        'pixel is drawn too; images only')
    parser.add_argument(
        '--out',
        help='folder for images (vis, pred), or video to write (.mp4, .avi)')
    parser.add_argument(
        '--max-pixels',
        type=int,
        default=89_478_485,
        help='larger images are refused before they are read (default: '
        '%(default)s)')
    parser.add_argument(
        '--batch-size',
        type=int,
        default=4,
        help='frames of a video at a time (default: 4)')
    parser.add_argument(
        '--smoothing',
        type=float,
        metavar='A',
        help='average the logits of a video over its frames: weight of the '
        'past, between 0 and 1; begun anew at scene cuts')
    parser.add_argument(
        '--opacity',
        type=float,
        default=0.5,
        help='of the classes over the image (default: 0.5)')
    parser.add_argument(
        '--no-legend', action='store_true', help='draw no names of classes')
    parser.add_argument(
        '--font', help='TrueType font of the legend, for other scripts')
    parser.add_argument('--show', action='store_true', help='open a window')
    parser.add_argument(
        '--webcam',
        type=int,
        nargs='?',
        const=0,
        metavar='NUMBER',
        help='take the camera of this number (default: 0) as the input')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU, or the CPU)')
    args = parser.parse_args(argv)
    args.text_model = args.text_model or args.old_tower
    given = [p for p in (args.input, args.config, args.checkpoint) if p]
    expected = (args.webcam is None) + 2 * (args.model is None)
    if len(given) != expected:
        parser.error('give an input or --webcam, one of them, and a config '
                     'with its checkpoint or --model')
    args.input = given.pop(0) if args.webcam is None else None
    args.config, args.checkpoint = given or (args.model, None)
    if args.webcam is not None and args.webcam < 0:
        parser.error('--webcam must be the number of a camera, 0 or more, '
                     f'but got {args.webcam}')
    if not args.out and not args.show:
        parser.error('give --out, --show or both')
    if not 0 <= args.opacity <= 1:
        parser.error(f'--opacity must be in [0, 1], but got {args.opacity}')
    args.still = args.webcam is None and (os.path.isdir(
        args.input) or args.input.lower().endswith(SUFFIXES))
    if args.out and not args.still:
        if os.path.splitext(args.out)[1] not in CODECS:
            parser.error(f'a video is written as {" or ".join(CODECS)}, but '
                         f'--out is {args.out}')
    if overwrites(args):
        parser.error(f'--out would write over the input {args.input}')
    if not (args.classes or args.embeddings or args.other):
        for name in ('text_model', 'pretrained', 'templates', 'new_bias',
                     'new_words'):
            if getattr(args, name):
                parser.error(f'--{name.replace("_", "-")} is for new classes: '
                             'it belongs to --classes or --embeddings')
    return args


def overwrites(args: argparse.Namespace) -> bool:
    """Whether results would be written to the place of the input."""
    if not args.out or args.webcam is not None:
        return False
    source, targets = args.input, [args.out]
    if args.still:
        targets = [os.path.join(args.out, name) for name in ('vis', 'pred')]
        if not os.path.isdir(source):
            source = os.path.dirname(os.path.abspath(source))
    return os.path.exists(source) and any(
        os.path.exists(path) and os.path.samefile(source, path)
        for path in targets)


if __name__ == '__main__':
    # Before the imports below, which take seconds.
    parse_args()

import cv2
import numpy as np

from mmseg_textkd.apis import TextSegInferencer
from mmseg_textkd.apis.video import segment_video
from mmseg_textkd.text import Vocabulary
from mmseg_textkd.utils.arguments import warn_renamed
from mmseg_textkd.utils.io import list_images
from mmseg_textkd.utils.progress import track


def split(words: str) -> Any:
    """Read class names: those of a vocabulary, or what is between commas."""
    endings = '.txt', '.json', '+synonyms'
    if words in Vocabulary.keys() or words.endswith(endings):
        return words
    return [word.strip() for word in words.split(',')]


def run_video(inferencer: TextSegInferencer, args: argparse.Namespace) -> int:
    """Segment a video.

    Returns:
        int: Number of its frames.
    """

    def show(image: np.ndarray) -> bool:
        cv2.imshow('mmseg_textkd', image)
        return cv2.waitKey(1) & 0xff in (27, ord('q'))

    return segment_video(
        inferencer,
        args.input if args.webcam is None else args.webcam,
        args.out,
        show if args.show else None,
        batch_size=args.batch_size if args.webcam is None else 1,
        smoothing=args.smoothing,
        opacity=args.opacity,
        legend=not args.no_legend)


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    inferencer = TextSegInferencer(
        args.config,
        args.checkpoint,
        device=args.device,
        font=args.font,
        max_pixels=args.max_pixels)
    inferencer.show_progress = False
    if (args.classes or args.embeddings or args.other
            or args.threshold is not None):
        inferencer.set_classes(
            split(args.classes) if args.classes else None,
            other=args.other,
            threshold=args.threshold,
            new_bias=args.new_bias,
            new_words=args.new_words,
            tower=args.text_model,
            pretrained=args.pretrained,
            templates=args.templates,
            embeddings=args.embeddings)
    print(f'{len(inferencer.classes)} labels: {inferencer.source}')
    if not args.still:
        print(f'{run_video(inferencer, args)} frames')
        return
    inputs = [args.input]
    if os.path.isdir(args.input):
        inputs = [str(path) for path in list_images(args.input)]
    # One by one: results are not kept in memory.
    for path in track(inputs, 'Segmenting'):
        inferencer(
            path,
            out_dir=args.out or '',
            show=args.show,
            opacity=args.opacity,
            legend=not args.no_legend,
            similarity=split(args.similarity) if args.similarity else ())
    print(f'{len(inputs)} images')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the demo."""
    args = parse_args(argv)
    warn_renamed(args, tower='--text-model')
    try:
        run(args)
    except (AssertionError, OSError, ValueError, RuntimeError,
            cv2.error) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
