# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Generator of the seeded ToyScenes dataset."""
import json
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Dict, Optional, Tuple, Union

import cv2

from ..utils.io import new_folder
from ..utils.progress import track
from .toy_scenes_painter import CLASSES, IGNORE_INDEX, PALETTE
from .toy_scenes_renderer import Scene, render_scene, render_video

__all__ = [
    'CLASSES', 'IGNORE_INDEX', 'MANIFEST', 'PALETTE', 'Scene',
    'generate_toy_scenes', 'generate_toy_videos', 'read_manifest',
    'render_scene', 'render_video'
]

# Raise it whenever the painted pixels change: an older folder is then refused
# instead of being compared, unnoticed, with figures of the new images.
VERSION = 1
MANIFEST = 'toy_scenes.json'
NAME = 'ToyScenes'
PARTS = ('img_dir', 'ann_dir')


def read_manifest(root: Union[str, Path]) -> Optional[Dict]:
    """Read the manifest of a ToyScenes folder.

    Args:
        root (str | Path): The data root.

    Returns:
        dict, optional: The manifest's content; None where there is none or
        where a file that it promises is missing.
    """
    root = Path(root)
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding='utf-8'))
        for split, count in manifest['splits'].items():
            for part in PARTS:
                names = {p.name for p in (root / part / split).glob('*.png')}
                if names != {f'{i:04d}.png' for i in range(count)}:
                    return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def _write_scene(item: Tuple[str, int], root: Path, seed: int, height: int,
                 width: int) -> None:
    """Render and write one scene (module level: workers import it)."""
    split, index = item
    scene = render_scene(seed, split, index, height, width)
    for part, pixels in zip(PARTS, (scene.image, scene.label)):
        path = root / part / split / f'{index:04d}.png'
        if not cv2.imwrite(str(path), pixels):
            raise OSError(f'could not write {path}')


def _is_ours(manifest: Path) -> bool:
    """Whether a manifest is that of a generated folder."""
    try:
        return json.loads(manifest.read_text('utf-8'))['name'] == NAME
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_target(root: Path, wanted: Dict, force: bool) -> bool:
    """Whether ``root`` is complete already; raise for other folders.

    Raises:
        FileExistsError: If something else is there.
    """
    if not os.path.lexists(root):
        return False
    if root.is_dir() and not any(root.iterdir()):
        return False
    found = read_manifest(root)
    if found == wanted and not force:
        return True
    # --force must never delete a folder that merely has the same name.
    allowed = {*PARTS, MANIFEST}
    if (not root.is_dir() or {p.name
                              for p in root.iterdir()} - allowed
            or not _is_ours(root / MANIFEST)):
        raise FileExistsError(
            f'{root} holds files that are not ToyScenes; nothing was touched. '
            'Choose another folder or clear this one by hand.')
    if force:
        return False
    state = ('is incomplete' if found is None else
             f'was made with other settings ({found}, not {wanted})')
    raise FileExistsError(f'{root} {state}; nothing was touched. Pass --force '
                          '(force=True) to make it anew.')


def generate_toy_videos(root: Union[str, Path],
                        num_videos: int = 8,
                        num_frames: int = 48,
                        seed: int = 0,
                        height: int = 128,
                        width: int = 256) -> None:
    """Write videos of a moving camera, with labels for every frame.

    In the layout of :class:`VideoFramesDataset`; all or nothing.

    Args:
        root (str | Path): The data root, such as 'data/toy_videos'.
        num_videos (int): Number of videos. Defaults to 8.
        num_frames (int): Frames of each. Defaults to 48.
        seed (int): Defaults to 0.
        height (int): Frame height in pixels. Defaults to 128.
        width (int): Frame width in pixels. Defaults to 256.

    Raises:
        ValueError: If a number is out of range.
        FileExistsError: If something is at ``root``.
    """
    for name, value, low in (('num_videos', num_videos, 1),
                             ('num_frames', num_frames, 1), ('seed', seed, 0),
                             ('height', height, 32), ('width', width, 32)):
        if value < low:
            raise ValueError(f'{name} must be at least {low}, got {value}')
    root = Path(os.path.realpath(root))
    root.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(root) as new:
        for video in range(num_videos):
            folder = new / f'video{video:02d}'
            for part in ('origin', 'mask'):
                (folder / part).mkdir(parents=True)
            scenes = render_video(seed, video, num_frames, height, width)
            for number, scene in enumerate(scenes):
                for part, pixels in (('origin', scene.image), ('mask',
                                                               scene.label)):
                    path = folder / part / f'{number:04d}.png'
                    if not cv2.imwrite(str(path), pixels):
                        raise OSError(f'could not write {path}')


def generate_toy_scenes(root: Union[str, Path],
                        num_train: int = 400,
                        num_val: int = 100,
                        seed: int = 0,
                        height: int = 128,
                        width: int = 256,
                        workers: int = 1,
                        force: bool = False,
                        progress: bool = False) -> bool:
    """Generate ToyScenes atomically.

    The images are written into a temporary folder beside ``root``, which is
    renamed at the end. Every image has a seed of its own, so neither order
    nor the number of workers changes a byte.

    Args:
        root (str | Path): The data root, such as 'data/toy_scenes'.
        num_train (int): Training images. Defaults to 400.
        num_val (int): Validation images. Defaults to 100.
        seed (int): Defaults to 0.
        height (int): Image height in pixels. Defaults to 128.
        width (int): Image width in pixels. Defaults to 256.
        workers (int): Processes; 1 stays in this one. Defaults to 1.
        force (bool): Replace an existing ToyScenes folder. Defaults to False.
        progress (bool): Show a progress bar. Defaults to False.

    Returns:
        bool: Whether anything was written; False if it was there already.

    Raises:
        ValueError: If a number is out of range.
        FileExistsError: If ``root`` is something else, incomplete, or made
            with other settings (the last two only without ``force``).
    """
    for name, value, low in (('num_train', num_train,
                              1), ('num_val', num_val, 1), ('seed', seed, 0),
                             ('height', height, 32), ('width', width, 32),
                             ('workers', workers, 1)):
        if value < low:
            raise ValueError(f'{name} must be at least {low}, got {value}')
    # A link such as data/toy_scenes -> elsewhere is filled where it points.
    root = Path(os.path.realpath(root))
    splits = dict(train=num_train, val=num_val)
    wanted = dict(
        name=NAME,
        version=VERSION,
        seed=seed,
        height=height,
        width=width,
        splits=splits,
        classes=list(CLASSES),
        ignore_index=IGNORE_INDEX)
    if _check_target(root, wanted, force):
        return False
    root.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(
        tempfile.mkdtemp(
            prefix=f'.{root.name}-', suffix='.tmp', dir=root.parent))
    try:
        new, old = holder / 'new', holder / 'old'
        for split in splits:
            for part in PARTS:
                (new / part / split).mkdir(parents=True)
        items = [(s, i) for s, count in splits.items() for i in range(count)]
        write = partial(
            _write_scene, root=new, seed=seed, height=height, width=width)
        bar = partial(track, task='Drawing', total=len(items), show=progress)
        if workers == 1:
            for item in bar(items):
                write(item)
        else:
            # OpenMP or pthreads pools of OpenCV do not survive a fork.
            with ProcessPoolExecutor(
                    workers, initializer=cv2.setNumThreads,
                    initargs=(0, )) as pool:
                list(bar(pool.map(write, items, chunksize=8)))
        (new / MANIFEST).write_text(
            json.dumps(wanted, indent=2) + '\n', encoding='utf-8')
        # Somebody else may have been faster: look again before the swap.
        if _check_target(root, wanted, force):
            return False
        if root.exists():
            os.replace(root, old)
        try:
            os.replace(new, root)
        except OSError:
            if old.exists():
                os.replace(old, root)
            raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)
    return True
