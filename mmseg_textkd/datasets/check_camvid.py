# Copyright (c) mmseg_textkd contributors. All rights reserved.
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

import mmcv
import numpy as np
from mmengine import fileio

from ..utils.progress import track
from .camvid import CamVidDataset

NUM_CLASSES = len(CamVidDataset.METAINFO['classes'])
# 255 in a file is what 11 becomes anyway; some copies have it already.
ALLOWED = (*range(NUM_CLASSES), CamVidDataset.UNLABELED, 255)


@dataclass
class CamVidReport:
    """Result of :func:`check_camvid`.

    Args:
        sizes (dict[str, Counter]): For each split the number of images of
            each (height, width).
        pixels (dict[str, np.ndarray]): For each split the number of pixels of
            each class and, last, of unlabeled ones; int64 of length K + 1.
        problems (list[str]): What training would stop at or suffer from.
        warnings (list[str]): What is unusual, such as the size of a split.
    """
    sizes: Dict[str, Counter] = field(default_factory=dict)
    pixels: Dict[str, np.ndarray] = field(default_factory=dict)
    problems: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)


def check_camvid(data_root: str,
                 splits: Sequence[str] = ('train', 'val', 'test'),
                 progress: bool = False) -> CamVidReport:
    """Check every image and label map of CamVid.

    The dataset itself only does the cheap checks when it is built (folders,
    missing files, number of images) and those of a sample when it is loaded.
    This one goes through all of it before a long training does.

    Args:
        data_root (str): The folder that holds ``train``, ``trainannot`` ...
        splits (Sequence[str]): Splits to check. Defaults to all three.
        progress (bool): Show a progress bar. Defaults to False.

    Returns:
        CamVidReport: Sizes, pixels per class, problems and warnings. The
        data are good if there is no problem.
    """
    report = CamVidReport()
    samples = []
    owner: Dict[str, str] = {}
    for split in splits:
        report.sizes[split] = Counter()
        report.pixels[split] = np.zeros(NUM_CLASSES + 1, dtype=np.int64)
        dataset = CamVidDataset(
            data_root=data_root,
            data_prefix=dict(img_path=split, seg_map_path=f'{split}annot'),
            lazy_init=True)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                infos = dataset.load_data_list()
        except (OSError, ValueError) as err:
            report.problems.append(f'{split}: {err}')
            continue
        report.warnings += [str(item.message) for item in caught]
        samples += [(split, info) for info in infos]
        for info in infos:
            name = info['seg_map_path'].replace('\\', '/').split('/')[-1]
            if owner.setdefault(name, split) != split:
                report.problems.append(f'{name} is in {owner[name]} and in '
                                       f'{split}: the splits overlap')

    for split, info in track(samples, 'Reading', show=progress):
        problem = _check_sample(info, report.sizes[split],
                                report.pixels[split])
        if problem:
            report.problems.append(problem)
    return report


def _check_sample(info: dict, sizes: Counter,
                  pixels: np.ndarray) -> Optional[str]:
    """Count the labels of one sample and return its errors."""
    image, problem = _read(info['img_path'], 'color', 'cv2')
    if problem:
        return problem
    sizes[image.shape[:2]] += 1
    # Decoded as LoadAnnotations does, but not cast to uint8, which would
    # wrap the values of a 16 bit file.
    path = info['seg_map_path']
    seg_map, problem = _read(path, 'unchanged', 'pillow')
    if problem:
        return problem
    seg_map = seg_map.squeeze()
    if seg_map.ndim != 2:
        return (f'{path} has shape {seg_map.shape} instead of one label per '
                'pixel: is it a color image of the labels?')
    if seg_map.shape != image.shape[:2]:
        return (f'{path} is {seg_map.shape[1]}x{seg_map.shape[0]} but its '
                f'image {info["img_path"]} is {image.shape[1]}x'
                f'{image.shape[0]} (width x height)')
    values, counts = np.unique(seg_map.astype(np.int64), return_counts=True)
    bad = [int(value) for value in values if value not in ALLOWED]
    if bad:
        return (f'{path} holds labels beyond the classes: {bad[:10]}'
                f'{" ..." if len(bad) > 10 else ""}; allowed are 0 to '
                f'{NUM_CLASSES - 1}, and {CamVidDataset.UNLABELED} or 255 '
                'for unlabeled')
    np.add.at(pixels, np.minimum(values, NUM_CLASSES), counts)
    return None


def _read(path: str, flag: str,
          backend: str) -> Tuple[Optional[np.ndarray], Optional[str]]:
    """Decode an image; return it or the error, the other is None."""
    try:
        picture = mmcv.imfrombytes(fileio.get(path), flag, backend=backend)
    except Exception as err:
        # Decoders raise all sorts of things at a broken file.
        return None, f'{path} cannot be read: {err}'
    if picture is None:
        return None, f'{path} cannot be read: broken or no image'
    return picture, None
