# Copyright (c) mmseg_textkd contributors. All rights reserved.
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..utils.io import DamagedFileError, read_hashed, write_hashed
from .image_tower import ImageTower

KIND = 'mmseg_textkd.region_embeddings.1'


class RegionEmbeddings(NamedTuple):
    """Image embeddings of the regions of the classes of one image.

    Attributes:
        labels (Tensor): Classes that are present, ascending, int64, shape
            (R, ).
        vectors (Tensor): Their image embeddings, float32 unit rows, shape
            (R, D).
    """

    labels: Tensor
    vectors: Tensor

    def save(self, path: Path, key: str) -> None:
        """Write a file atomically.

        Args:
            path (Path): The file. Folders are made.
            key (str): What the embeddings were made of.
        """
        write_hashed(path, KIND, self._asdict(), dict(key=key))

    @classmethod
    def load(cls, path: Path, key: str) -> Optional['RegionEmbeddings']:
        """Read a file.

        Args:
            path (Path): The file.
            key (str): What the embeddings must have been made of.

        Returns:
            RegionEmbeddings, optional: None if there is no such file, or if
            it is damaged or of another key; it is then to be made anew.
        """
        try:
            tensors, texts = read_hashed(path, KIND)
        except (OSError, DamagedFileError):
            return None
        if set(tensors) != set(cls._fields) or texts.get('key') != key:
            return None
        return cls(**tensors)


def encode_regions(tower: ImageTower,
                   image: np.ndarray,
                   labels: np.ndarray,
                   min_pixels: int = 64,
                   fill: int = 128,
                   ignore_index: int = 255) -> RegionEmbeddings:
    """Encode the region of each class of an image.

    A region is the bounding box of all pixels of the class, with the pixels
    of other classes grayed, brought to the size of the tower. The source is
    `Global Knowledge Calibration <https://arxiv.org/abs/2303.09181>`_, there
    with the regions of instances.

    Args:
        tower (ImageTower): The tower.
        image (np.ndarray): uint8, BGR, with shape (H, W, 3).
        labels (np.ndarray): Label map with shape (H, W).
        min_pixels (int): Pixels from which on a class is present. Defaults to
            64.
        fill (int): Value of the pixels outside a region. Defaults to 128.
        ignore_index (int): Label that is no class. Defaults to 255.

    Returns:
        RegionEmbeddings: On the CPU; of no class if none is present.
    """
    classes, counts = np.unique(labels, return_counts=True)
    classes = [
        c for c, n in zip(classes.tolist(), counts)
        if n >= min_pixels and c != ignore_index
    ]
    crops = []
    for c in classes:
        mask = labels == c
        rows, columns = (np.flatnonzero(mask.any(axis=a)) for a in (1, 0))
        box = np.s_[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        crop = np.where(mask[box][..., None], image[box], np.uint8(fill))
        crop = torch.from_numpy(crop[..., ::-1].copy()).permute(2, 0, 1)
        crops.append(tower.resize(crop))
    vectors = torch.zeros(0, tower.dim)
    if crops:
        vectors = F.normalize(tower.encode_image(torch.stack(crops)), dim=1)
    return RegionEmbeddings(
        torch.tensor(classes, dtype=torch.int64),
        vectors.cpu().contiguous())
