# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Show what a deployed network predicts, without PyTorch or this package.

tools/deployment/deploy.py puts this file into each folder that it writes; it
reads any of them and needs numpy, OpenCV and the runtime of the folder. The
input is an image, a folder of images, a video file or, with --webcam, a
camera. Images of more than 89478485 pixels are refused before they are read;
the environment variable OPENCV_IO_MAX_IMAGE_PIXELS sets another limit.
"""
import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import (Any, Callable, Dict, Iterator, List, Optional, Sequence,
                    Tuple)

if __name__ == '__main__':
    # OpenCV looks at it when it is imported.
    os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', '89478485')

# isort: split
import cv2  # noqa: E402
import numpy as np  # noqa: E402

NETWORK, CLASSES = 'network.json', 'classes.txt'
IMAGES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
CODECS = {'.mp4': 'mp4v', '.avi': 'MJPG'}
LEGEND_WIDTH, ROW = 160, 22  # pixels
Named = Iterator[Tuple[str, np.ndarray]]
# From the array that the network takes to the one that it gives.
Predict = Callable[[np.ndarray], np.ndarray]


# ------------------------------------------- one function for each runtime
def load_onnx(folder: Path, meta: Dict, threads: int) -> Predict:
    """ONNX Runtime; on TensorRT, for which the folder is, if it has that."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads would take the cores from whoever runs next.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    wanted = ['CPUExecutionProvider']
    if meta['runtime'] == 'tensorrt':
        wanted[:0] = ['TensorrtExecutionProvider', 'CUDAExecutionProvider']
    there = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(
        str(folder / 'model.onnx'),
        options,
        providers=[name for name in wanted if name in there])
    meta['provider'] = session.get_providers()[0]
    return lambda image: session.run(None, {'image': image})[0]


def load_openvino(folder: Path, meta: Dict, threads: int) -> Predict:
    """OpenVINO on the CPU."""
    import openvino

    # Otherwise some CPUs would compute in bfloat16.
    config: Dict[str, Any] = {'INFERENCE_PRECISION_HINT': 'f32'}
    if threads:
        config['INFERENCE_NUM_THREADS'] = threads
    model = openvino.Core().compile_model(
        str(folder / 'model.xml'), 'CPU', config)
    return lambda image: model(image)[0]


def load_ncnn(folder: Path, meta: Dict, threads: int) -> Predict:
    """Tencent's ncnn on the CPU."""
    import ncnn
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    if threads:
        net.opt.num_threads = threads
    net.opt.use_bf16_storage = False
    for name in ('packed', 'storage', 'arithmetic'):
        setattr(net.opt, f'use_fp16_{name}', meta['precision'] == 'fp16')
    if net.load_param(str(folder / 'model.param')) or net.load_model(
            str(folder / 'model.bin')):
        raise ValueError('ncnn lacks a layer of it, or the file is damaged')

    def predict(image: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        # Without the batch, which it does not have.
        extractor.input('in0', ncnn.Mat(image[0]))
        failed, out = extractor.extract('out0')
        if failed:
            raise ValueError(f'ncnn stopped with {failed}')
        return np.array(out)[None]

    return predict


def load_litert(folder: Path, meta: Dict, threads: int) -> Predict:
    """LiteRT, once TensorFlow Lite."""
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(
        model_path=str(folder / 'model.tflite'), num_threads=threads or None)
    interpreter.allocate_tensors()
    first, = interpreter.get_input_details()
    last, = interpreter.get_output_details()

    def predict(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(first['index'], image)
        interpreter.invoke()
        return interpreter.get_tensor(last['index'])

    return predict


def load_executorch(folder: Path, meta: Dict, threads: int) -> Predict:
    """ExecuTorch; its Python binding takes tensors of PyTorch."""
    import torch
    from executorch.runtime import Runtime
    if threads:
        torch.set_num_threads(threads)
    method = Runtime.get().load_program(str(
        folder / 'model.pte')).load_method('forward')
    return lambda image: method.execute([torch.from_numpy(image)])[0].numpy()


def load_torchscript(folder: Path, meta: Dict, threads: int) -> Predict:
    """TorchScript in PyTorch."""
    import torch
    if threads:
        torch.set_num_threads(threads)
    model = torch.jit.load(str(folder / 'model.pt'))

    def predict(image: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(image)).numpy()

    return predict


LOADERS = dict(
    onnx=load_onnx,
    openvino=load_openvino,
    ncnn=load_ncnn,
    litert=load_litert,
    executorch=load_executorch,
    tensorrt=load_onnx,
    torchscript=load_torchscript)


class Network:
    """A deployed network: images (H, W, 3), BGR, in; labels (H, W) out.

    Args:
        folder (Path): What ``tools/deployment/deploy.py`` wrote.
        threads (int): How many it may use; 0 for as many as its runtime
            takes by itself. Defaults to 0.

    Raises:
        ImportError: If the runtime is missing.
        ValueError: If the folder is not such a one, or damaged.
    """

    def __init__(self, folder: Path, threads: int = 0) -> None:
        folder = Path(folder)
        try:
            self.meta = json.loads((folder / NETWORK).read_text())
            lines = (folder / CLASSES).read_text(encoding='utf-8').splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f'{folder} is no folder of tools/deployment/'
                             f'deploy.py: {error}') from error
        for name, expected in self.meta['sha256'].items():
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != expected:
                raise ValueError(f'{folder / name} is damaged: its SHA-256 is '
                                 f'not that of {NETWORK}. Copy it anew.')
        rows = [line.split(maxsplit=3) for line in lines]
        self.classes = [row[3] for row in rows]
        # OpenCV's order is BGR.
        self.colors = np.array([row[2::-1] for row in rows], np.uint8)
        self.spec, self.size = self.meta['preprocess'], self.meta['size']
        runtime = self.meta['runtime']
        try:
            self.predict = LOADERS[runtime](folder, self.meta, threads)
        except ImportError as error:
            raise ImportError(
                f'{folder} is for {runtime}, which is not installed: pip '
                f'install {self.meta["needs"]} ({error})') from error
        except Exception as error:  # each has its own
            raise ValueError(
                f'{runtime} cannot load {folder}: {error}') from error
        self.seconds: List[float] = []

    def inputs(self, picture: np.ndarray) -> np.ndarray:
        """Make the array that the network takes, resized if it must be.

        Args:
            picture (np.ndarray): (H, W, 3), uint8, BGR.

        Returns:
            np.ndarray: (1, H, W, 3), uint8, or (1, 3, H, W), float32.
        """
        image = picture
        if self.size:
            image = cv2.resize(picture, self.size[::-1])
        if self.spec:
            if self.spec['swap_channels']:
                image = image[..., ::-1]
            image = image.astype(np.float32)
            if self.spec['mean'] is not None:
                image -= np.float32(self.spec['mean'])
                image /= np.float32(self.spec['std'])
            image = image.transpose(2, 0, 1)
        return np.ascontiguousarray(image[None])

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Predict the class of every pixel."""
        image = self.inputs(picture)
        start = time.perf_counter()
        try:
            output = self.predict(image)
        except Exception as error:  # each runtime has its own
            height, width = picture.shape[:2]
            raise ValueError(f'the network does not take {height}x{width}, '
                             'deploy it for one size (--size H W): '
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
    limit = os.environ.get('OPENCV_IO_MAX_IMAGE_PIXELS', '2**30')
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
                             f'{limit} pixels: {error}') from error
        if picture is None:
            raise ValueError(f'{name} cannot be read as an image of at most '
                             f'{limit} pixels')
        yield os.path.basename(name), picture


def frames(capture: cv2.VideoCapture) -> Named:
    """Yield the frames of a video or a camera until it ends."""
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield '', frame


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second that can be written; 25 where that is not known."""
    rate = float(capture.get(cv2.CAP_PROP_FPS))
    # Cameras and streams say 0, -1, NaN or 90000.
    return rate if 0 < rate <= 1000 else 25.


def parse_args(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', nargs='?', help='image, folder or video')
    parser.add_argument(
        '--folder',
        type=Path,
        default=Path(__file__).resolve().parent,
        help='deployed network (default: where this file is)')
    parser.add_argument(
        '--out', help='image, folder or video (.mp4, .avi) to write')
    parser.add_argument(
        '--opacity',
        type=float,
        default=0.5,
        help='of the classes over the image (default: 0.5)')
    parser.add_argument(
        '--threads',
        type=int,
        default=0,
        help='default: as many as the runtime takes by itself')
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
    if not args.out and not args.show:
        parser.error('give --out, --show or both')
    if not 0 <= args.opacity <= 1:
        parser.error(f'--opacity must be in [0, 1], but got {args.opacity}')
    if args.threads < 0:
        parser.error(f'--threads must be at least 0, but got {args.threads}')
    if args.input and args.out and os.path.exists(args.out) and os.path.exists(
            args.input) and os.path.samefile(args.input, args.out):
        parser.error(f'--out would write over the input {args.input}')
    return args


class Writer:
    """Writes an image, images to a folder, or a video."""

    def __init__(self, out: str, folder: bool, fps: Optional[float]) -> None:
        self.out, self.folder, self.fps = out, folder, fps
        self.video: Any = None
        if fps and os.path.splitext(out)[1] not in CODECS:
            raise ValueError(f'a video is written as {" or ".join(CODECS)}, '
                             f'not as {out}')

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
            codec = cv2.VideoWriter.fourcc(
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
    network, fps = Network(args.folder, args.threads), None
    still = args.webcam is None and (os.path.isdir(args.input)
                                     or args.input.lower().endswith(IMAGES))
    if still:
        source = images(args.input)
    else:
        name = args.input if args.webcam is None else args.webcam
        capture = cv2.VideoCapture(name)
        if not capture.isOpened():
            raise ValueError(f'cannot open {name} as a video or camera')
        source, fps = frames(capture), frame_rate(capture)
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
    except (ImportError, OSError, ValueError, cv2.error) as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
