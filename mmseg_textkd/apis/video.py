# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Segmentation of videos of any length, as a pipeline of threads."""
import os
import os.path as osp
import queue
import threading
from typing import (TYPE_CHECKING, Any, Callable, Iterable, Iterator, List,
                    NamedTuple, Optional, Tuple, Union)

import cv2
import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor

from ..deploy.run import Writer, frame_rate
from ..utils.progress import track
from .drawing import draw_labels

if TYPE_CHECKING:
    from .text_seg_inferencer import TextSegInferencer

Source = Union[str, 'os.PathLike[str]', int, Iterable[np.ndarray]]
END = object()
# Mean absolute difference of two frames, in gray levels at 64x36, from which
# on they are of two scenes.
SCENE_CUT = 30.


class VideoError(ValueError):
    """A video that cannot be read, or not to its end."""


class Segmented(NamedTuple):
    """A frame of a video with its labels.

    Attributes:
        number (int): Number of the frame, from 0.
        frame (np.ndarray): uint8, BGR, shape (H, W, 3).
        labels (np.ndarray): Class numbers, shape (H, W).
    """
    number: int
    frame: np.ndarray
    labels: np.ndarray


class _Stage:
    """Thread that consumes an iterable and fills a bounded queue.

    The queues are short, so that a fast stage waits for a slow one and memory
    is constant. What fails in a thread is raised where its items are read.
    """

    def __init__(self, items: Iterable, length: int,
                 stopped: threading.Event) -> None:
        self.queue: queue.Queue = queue.Queue(length)
        self.stopped, self.error = stopped, None
        self.thread = threading.Thread(
            target=self._run, args=(items, ), daemon=True)
        self.thread.start()

    def _run(self, items: Iterable) -> None:
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:
            self.error = error
        finally:
            # Where nobody reads on, too: a writer must be released.
            getattr(items, 'close', bool)()
        self._put(END)

    def _put(self, item: Any) -> bool:
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator:
        while not self.stopped.is_set():
            try:
                item = self.queue.get(timeout=.1)
            except queue.Empty:
                continue
            if item is END:
                if self.error is not None:
                    raise self.error
                return
            yield item


def read_frames(source: Source) -> Tuple[Iterator[np.ndarray], float, int]:
    """Open a video, a camera, or frames that are there already.

    Args:
        source: File, number of a camera,
            or frames, uint8, BGR, shape (H, W, 3).

    Returns:
        tuple: The frames, frames per second, and how many there should be, 0
        if that is not known.

    Raises:
        VideoError: If it cannot be opened; while it is read, if it has no
            frames or they change size.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, (str, int)):
        return _same_size(source, 'the input'), 25., 0
    if isinstance(source, str) and not osp.isfile(source) \
            and '://' not in source:
        raise VideoError(f'there is no video {source}.')
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise VideoError(f'{source} cannot be decoded: it is damaged, no '
                         'video, or no camera, or in a format that this '
                         'OpenCV does not know.')
    fps = frame_rate(capture)
    number = 0 if isinstance(source, int) else max(
        int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def decode() -> Iterator[np.ndarray]:
        try:
            while True:
                there, frame = capture.read()
                if not there:
                    return
                yield frame
        finally:
            capture.release()

    return _same_size(decode(), str(source)), fps, number


def _same_size(frames: Iterable[np.ndarray],
               name: str) -> Iterator[np.ndarray]:
    """Require frames, all of one size."""
    first = None
    for number, frame in enumerate(frames):
        if first is None:
            first = frame.shape
        if frame.shape != first:
            raise VideoError(
                f'{name}: frame {number} is {frame.shape[1]}x{frame.shape[0]}'
                f', but those before it were {first[1]}x{first[0]}. Cut the '
                'video there.')
        yield frame
    if first is None:
        raise VideoError(f'{name} has no frames.')


class LogitSmoother:
    r"""Exponential average of the logits of a video.

    :math:`s_t = \alpha s_{t-1} + (1 - \alpha) z_t`, begun anew at each cut
    between two scenes.

    Args:
        alpha (float): Weight of the past, in (0, 1).
        cut (float): Mean absolute difference of two frames, in gray levels,
            from which on they are of two scenes. Defaults to 30.

    Raises:
        ValueError: If ``alpha`` is out of range.
    """

    def __init__(self, alpha: float, cut: float = SCENE_CUT) -> None:
        if not 0 < alpha < 1:
            raise ValueError('`smoothing` is the weight of the past, between '
                             f'0 and 1, but got {alpha}.')
        self.alpha, self.cut = alpha, cut
        self.average: Optional[Tensor] = None
        self._small: Optional[np.ndarray] = None

    def reset(self) -> None:
        """Begin anew, as for another video."""
        self.average = self._small = None

    def __call__(self, logits: Tensor, frame: np.ndarray) -> Tensor:
        """Take the next frame.

        Args:
            logits (Tensor): Its logits, shape (K, H, W).
            frame (np.ndarray): The frame, uint8, BGR.

        Returns:
            Tensor: Average over the scene so far, same shape.
        """
        small = cv2.cvtColor(
            cv2.resize(frame, (64, 36), interpolation=cv2.INTER_AREA),
            cv2.COLOR_BGR2GRAY).astype(np.float32)
        begins = self._small is None or np.abs(small -
                                               self._small).mean() > self.cut
        self._small = small
        if begins or self.average.shape != logits.shape:
            self.average = logits
        else:
            self.average = torch.lerp(logits, self.average, self.alpha)
        return self.average


def stream_video(inferencer: 'TextSegInferencer',
                 source: Source,
                 batch_size: int = 4,
                 smoothing: Optional[float] = None) -> Iterator[Segmented]:
    """Segment the frames of a video, one after the other.

    Frames are decoded and prepared in a thread of their own while the network
    runs. At most some three batches are held, whatever the length.

    Args:
        inferencer (TextSegInferencer): The network with its classes.
        source: See :func:`read_frames`.
        batch_size (int): Frames that the network takes at a time. Defaults
            to 4.
        smoothing (float, optional): See :class:`LogitSmoother`. Defaults to
            None: each frame for itself.

    Yields:
        Segmented: Frames in their order.

    Raises:
        ValueError: If ``smoothing`` is out of range or comes with a
            threshold, or a frame is no image that the network takes.
        VideoError: See :func:`read_frames`.
    """
    frames, _, _ = read_frames(source)
    yield from _stream(inferencer, frames, batch_size, smoothing,
                       threading.Event())


def _stream(inferencer: 'TextSegInferencer', frames: Iterable[np.ndarray],
            batch_size: int, smoothing: Optional[float],
            stopped: threading.Event) -> Iterator[Segmented]:
    if batch_size < 1:
        raise ValueError(f'batch_size must be at least 1, not {batch_size}.')
    smoother = None
    if smoothing is not None:
        smoother = LogitSmoother(smoothing)
        if inferencer.threshold is not None:
            raise ValueError('`smoothing` and a threshold cannot be combined.')

    def batches() -> Iterator[Tuple[List[np.ndarray], dict]]:
        held: List[np.ndarray] = []

        def packed() -> Tuple[List[np.ndarray], dict]:
            return held, inferencer.collate_fn(
                [inferencer.pipeline(frame) for frame in held])

        for frame in _flushed(frames):
            if frame is not None:
                held += inferencer._inputs_to_list([frame])
            if held and (frame is None or len(held) == batch_size):
                yield packed()
                held = []

    number = 0
    try:
        for held, data in _Stage(batches(), 1, stopped):
            for frame, labels in zip(
                    held, _predict(inferencer, held, data, smoother)):
                yield Segmented(number, frame, labels)
                number += 1
    finally:
        stopped.set()


def _flushed(frames: Iterable[np.ndarray]) -> Iterator[Optional[np.ndarray]]:
    """The frames and, at their end or where they fail, None.

    What came before a fault is segmented before the fault is told.
    """
    try:
        yield from frames
    except VideoError:
        yield None
        raise
    yield None


@torch.no_grad()
def _predict(inferencer: 'TextSegInferencer', held: List[np.ndarray],
             data: dict, smoother: Optional[LogitSmoother]) -> List:
    """Label maps of a batch, as arrays."""
    single = inferencer.model.out_channels == 1
    # Nothing to smooth where all is of one class.
    if smoother is None or single and not inferencer.adapter.binary:
        return [
            sample.pred_sem_seg.data[0].cpu().numpy()
            for sample in inferencer.forward(data)
        ]
    batch = inferencer.model.data_preprocessor(data, False)
    with inferencer.lock:
        samples = inferencer.model(**batch, mode='predict')
    maps = [
        smoother(sample.seg_logits.data, frame)
        for sample, frame in zip(samples, held)
    ]
    if inferencer.adapter.binary:
        # Of one logit MMSegmentation gives the sigmoid.
        threshold = inferencer.model.decode_head.threshold
        return [(scores > threshold)[0].long().cpu().numpy()
                for scores in maps]
    return [scores.argmax(dim=0).cpu().numpy() for scores in maps]


def segment_video(inferencer: 'TextSegInferencer',
                  source: Source,
                  out: Optional[str] = None,
                  show: Optional[Callable[[np.ndarray], bool]] = None,
                  batch_size: int = 4,
                  smoothing: Optional[float] = None,
                  opacity: float = 0.5,
                  legend: bool = True,
                  progress: bool = True) -> int:
    """Segment a video and write it, drawn.

    Decoding, the network, drawing and encoding run at the same time, each in
    a thread, so that the slowest of them, which should be the network, sets
    the pace.

    Args:
        inferencer (TextSegInferencer): The network with its classes.
        source: See :func:`read_frames`.
        out (str, optional): Video to write, ``.mp4`` or ``.avi``. Defaults
            to None.
        show (Callable, optional): Called with each drawn frame, BGR; True
            ends the video. Defaults to None.
        batch_size (int): See :func:`stream_video`. Defaults to 4.
        smoothing (float, optional): See :class:`LogitSmoother`. Defaults to
            None.
        opacity (float): See :func:`draw_labels`. Defaults to 0.5.
        legend (bool): See :func:`draw_labels`. Defaults to True.
        progress (bool): Whether to show a progress bar. Defaults to True.

    Returns:
        int: Number of frames. A video that ends before its header says so is
        told in the log. Where ``show`` ends it, some more may be in ``out``.

    Raises:
        OSError: If ``out`` cannot be written.
        ValueError: If ``out`` is the source or has another ending.
        VideoError: See :func:`read_frames`. What came before the fault has
            been written then.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if (isinstance(source, str) and osp.isfile(source) and out is not None
            and osp.exists(out) and osp.samefile(source, out)):
        raise ValueError(f'{out} is the video that is read; write elsewhere.')
    frames, fps, expected = read_frames(source)
    writer = None if out is None else Writer(out, False, fps)
    meta, stopped = inferencer.model.dataset_meta, threading.Event()
    segmented = _stream(inferencer, frames, batch_size, smoothing, stopped)
    bar = track(None, 'Segmenting', 'frame', expected or None, progress)
    ended = threading.Event()

    palette = [color[::-1] for color in meta['palette']]  # BGR, as frames are

    def drawn(items: Iterable[Segmented]) -> Iterator[np.ndarray]:
        for item in items:
            yield draw_labels(item.frame, item.labels, meta['classes'],
                              palette, opacity, legend, inferencer.font)

    def encoded(images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        try:
            for image in images:
                if writer is not None:
                    writer.write('', image)
                yield image
        finally:
            if writer is not None:
                writer.close()
            ended.set()

    # Not `stopped`, which is set where a fault is: what was segmented before
    # it is drawn and written before it is raised.
    stop = threading.Event()
    count = 0
    network = _Stage(segmented, 2 * batch_size, stop)
    drawing = _Stage(drawn(network), 2 * batch_size, stop)
    encoding = _Stage(encoded(drawing), 2 * batch_size, stop)
    try:
        for image in encoding:
            count += 1
            bar.update()
            if show is not None and show(image):
                break
    except KeyboardInterrupt:
        pass
    finally:
        stopped.set()
        stop.set()
        ended.wait(timeout=10)
        bar.close()
    if show is None and 0 < count < expected:
        print_log(
            f'{source} ended after {count} of the {expected} frames that its '
            'header promises; those are written.', 'current', 30)
    return count
