# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Show what a network predicts, with numpy, OpenCV and ONNX Runtime alone.

MODEL is a graph of tools/deployment/export_onnx.py. The input is an image, a
folder of images, a video file or, with --webcam, a camera. Images of more than
89478485 pixels are refused before they are read; the environment variable
OPENCV_IO_MAX_IMAGE_PIXELS sets another limit.
"""
import argparse
import json
import os
import sys
import time
from typing import Iterator, Optional, Sequence, Tuple

IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
CODECS = {'.mp4': 'mp4v', '.avi': 'MJPG'}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='ONNX file')
    parser.add_argument('input', nargs='?', help='image, folder or video')
    parser.add_argument(
        '--out', help='image, folder or video (.mp4, .avi) to write')
    parser.add_argument(
        '--opacity',
        type=float,
        default=0.5,
        help='of the classes over the image (default: 0.5)')
    parser.add_argument('--show', action='store_true', help='open a window')
    parser.add_argument(
        '--webcam',
        type=int,
        nargs='?',
        const=0,
        metavar='NUMBER',
        help='take the camera of this number (default: 0) as the input')
    args = parser.parse_args(argv)
    if (args.input is None) == (args.webcam is None):
        parser.error('give an input or --webcam, one of them')
    if args.webcam is not None and args.webcam < 0:
        parser.error('--webcam must be the number of a camera, 0 or more, '
                     f'but got {args.webcam}')
    if not args.out and not args.show:
        parser.error('give --out, --show or both')
    if not 0 <= args.opacity <= 1:
        parser.error(f'--opacity must be in [0, 1], but got {args.opacity}')
    if args.input and args.out and os.path.exists(args.out) and os.path.exists(
            args.input) and os.path.samefile(args.input, args.out):
        parser.error(f'--out would write over the input {args.input}')
    return args


if __name__ == '__main__':
    # Before the imports below, which take time.
    parse_args()

# OpenCV looks at it when it is imported.
LIMIT = os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', '89478485')

# isort: split
import cv2
import numpy as np
import onnxruntime

LEGEND_WIDTH, ROW = 160, 22  # pixels
Named = Iterator[Tuple[str, np.ndarray]]


class Network:
    """An exported network: images (H, W, 3), BGR, in; labels (H, W) out."""

    def __init__(self, path: str) -> None:
        try:
            self.session = onnxruntime.InferenceSession(
                path, providers=['CPUExecutionProvider'])
        except Exception as error:  # it has its own
            raise ValueError(f'cannot load {path}: {error}') from error
        meta = self.session.get_modelmeta().custom_metadata_map
        if 'mmseg_textkd' not in meta:
            raise ValueError(f'{path} is not of tools/deployment/'
                             'export_onnx.py: it names no classes')
        meta = json.loads(meta['mmseg_textkd'])
        self.classes, self.spec = meta['classes'], meta['preprocess']
        # OpenCV's order is BGR.
        self.colors = np.array(meta['palette'], np.uint8)[:, ::-1]
        shape = self.session.get_inputs()[0].shape
        height, width = shape[2:] if self.spec else shape[1:3]
        # Names instead of numbers: any size.
        self.size = None if isinstance(height, str) else (width, height)
        self.seconds = []

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Predict the class of every pixel."""
        image = cv2.resize(picture, self.size) if self.size else picture
        if self.spec:
            if self.spec['swap_channels']:
                image = image[..., ::-1]
            image = image.astype(np.float32)
            if self.spec['mean'] is not None:
                image -= np.float32(self.spec['mean'])
                image /= np.float32(self.spec['std'])
            image = image.transpose(2, 0, 1)
        start = time.perf_counter()
        try:
            output, = self.session.run(
                None, {'image': np.ascontiguousarray(image[None])})
        except Exception as error:  # it has its own
            height, width = picture.shape[:2]
            raise ValueError(f'the network does not take {height}x{width}, '
                             'export it for one size (--size H W): '
                             f'{error}') from error
        self.seconds.append(time.perf_counter() - start)
        labels = output.argmax(1) if output.ndim == 4 else output
        return cv2.resize(
            labels[0].astype(np.uint16),
            picture.shape[1::-1],
            interpolation=cv2.INTER_NEAREST)

    def draw(self, picture: np.ndarray, opacity: float) -> np.ndarray:
        """Blend an image with its classes; a legend stands to the right."""
        labels = self(picture)
        shown = (1 - opacity) * picture + opacity * self.colors[labels]
        legend = np.full((len(picture), LEGEND_WIDTH, 3), 255, np.uint8)
        counts = np.bincount(labels.ravel(), minlength=len(self.classes))
        # Those that are seen, the largest first, as many as there is room.
        order = [k for k in np.argsort(-counts, kind='stable') if counts[k]]
        for row, k in enumerate(order[:len(picture) // ROW]):
            y = row * ROW
            legend[y + 4:y + 18, 6:30] = self.colors[k]
            cv2.putText(legend, self.classes[k], (36, y + 16),
                        cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1,
                        cv2.LINE_AA)
        return np.hstack([shown.astype(np.uint8), legend])


def images(path: str) -> Named:
    """Yield names and images of an image or of a folder of images."""
    names = [path]
    if os.path.isdir(path):
        names = [
            os.path.join(path, name) for name in sorted(os.listdir(path))
            if name.lower().endswith(IMAGES)
        ]
        if not names:
            raise ValueError(f'there are no images in {path}')
    for name in names:
        try:
            picture = cv2.imread(name)
        except cv2.error as error:
            raise ValueError(f'{name} cannot be read as an image of at most '
                             f'{LIMIT} pixels: {error}') from error
        if picture is None:
            raise ValueError(f'{name} cannot be read as an image of at most '
                             f'{LIMIT} pixels')
        yield os.path.basename(name), picture


def frames(capture: cv2.VideoCapture) -> Named:
    """Yield the frames of a video or a camera until it ends."""
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield '', frame


class Writer:
    """Writes an image, images to a folder, or a video."""

    def __init__(self, out: str, folder: bool, fps: Optional[float]) -> None:
        self.out, self.folder, self.fps = out, folder, fps
        self.video = None
        if fps and os.path.splitext(out)[1] not in CODECS:
            raise ValueError(f'a video is written as {" or ".join(CODECS)}, '
                             f'but --out is {out}')

    def write(self, name: str, shown: np.ndarray) -> None:
        """Write one image."""
        if not self.fps:  # no video
            path = self.out
            if self.folder:
                os.makedirs(path, exist_ok=True)
                path = os.path.join(path, name)
            if not cv2.imwrite(path, shown):
                raise OSError(f'cannot write {path}')
            return
        if self.video is None:
            codec = cv2.VideoWriter_fourcc(
                *CODECS[os.path.splitext(self.out)[1]])
            self.video = cv2.VideoWriter(self.out, codec, self.fps,
                                         shown.shape[1::-1])
            if not self.video.isOpened():
                raise OSError(f'cannot write {self.out}')
        self.video.write(shown)

    def close(self) -> None:
        """Finish a video."""
        if self.video is not None:
            self.video.release()


def run(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    network, fps = Network(args.model), None
    still = args.webcam is None and (os.path.isdir(args.input)
                                     or args.input.lower().endswith(IMAGES))
    if still:
        source = images(args.input)
    else:
        name = args.input if args.webcam is None else args.webcam
        capture = cv2.VideoCapture(name)
        if not capture.isOpened():
            raise ValueError(f'cannot open {name} as a video or camera')
        source, fps = frames(capture), capture.get(cv2.CAP_PROP_FPS) or 25
    folder = still and os.path.isdir(args.input)
    writer = Writer(args.out, folder, fps) if args.out else None
    start = time.perf_counter()
    try:
        for name, picture in source:
            shown = network.draw(picture, args.opacity)
            if writer:
                writer.write(name, shown)
            if args.show:
                cv2.imshow('mmseg_textkd', shown)
                # An image waits for a key, a video does not; q ends it.
                if cv2.waitKey(0 if still else 1) & 0xff in (27, ord('q')):
                    break
    except KeyboardInterrupt:
        pass
    finally:
        if writer:
            writer.close()
    seconds, number = time.perf_counter() - start, len(network.seconds)
    if not number:
        raise ValueError('the input has no frames')
    print(f'{number} images: {number / seconds:.1f} fps with reading, '
          f'drawing and writing; the network alone '
          f'{1 / np.median(network.seconds):.1f} fps (median)')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the demo."""
    args = parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, cv2.error) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
