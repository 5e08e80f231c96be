# Copyright (c) mmseg_textkd contributors. All rights reserved.
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Sequence

import mmcv
import numpy as np
from mmengine import fileio

from ..utils.progress import track
from .camvid import CamVidDataset
from .check_labels import CheckLabels

NUM_CLASSES = len(CamVidDataset.METAINFO['classes'])
# Of labels as they are in the files: 11 is not 255 yet.
CHECK = CheckLabels(NUM_CLASSES + 1)


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
        try:
            _check_sample(info, report.sizes[split], report.pixels[split])
        except ValueError as error:
            report.problems.append(str(error))
    return report


def _check_sample(info: dict, sizes: Counter, pixels: np.ndarray) -> None:
    """Count the labels of one sample, or raise what is wrong with it."""
    image = _read(info['img_path'], 'color', 'cv2')
    sizes[image.shape[:2]] += 1
    # Decoded as LoadAnnotations does, but not cast to uint8, which would
    # wrap the values of a 16 bit file.
    labels = _read(info['seg_map_path'], 'unchanged', 'pillow').squeeze()
    labels = labels.astype(np.int64)
    CHECK(dict(info, img=image, gt_seg_map=labels))
    values, counts = np.unique(labels, return_counts=True)
    np.add.at(pixels, np.minimum(values, NUM_CLASSES), counts)


def _read(path: str, flag: str, backend: str) -> np.ndarray:
    """Decode an image."""
    try:
        picture = mmcv.imfrombytes(fileio.get(path), flag, backend=backend)
    except Exception as err:
        # Decoders raise all sorts of things at a broken file.
        raise ValueError(f'{path} cannot be read: {err}') from err
    if picture is None:
        raise ValueError(f'{path} cannot be read: broken or no image')
    return picture
