# Copyright (c) mmseg_textkd contributors. All rights reserved.
import hashlib
import json
import logging
from pathlib import Path
from typing import Dict, Optional

import numpy as np
import torch
from mmengine.logging import print_log

from ..utils.io import write_files
from .image_tower import ImageTower
from .region_embeddings import RegionEmbeddings, encode_regions
from .weights import PathLike, hash_weights


class RegionStore:
    """Folder of region embeddings, with one file for each image.

    A file is named after the hash of all that it was made of: image and label
    map as they are in memory, weights of the tower, parameters. So what is
    stale is never found, and what is damaged is known by the hash of its own
    content; both are made anew. Files appear whole, and any number of
    processes may read and write at once. The tower is loaded only if
    something is missing.

    The folder notes the hash of the weights of each tower, so that it serves
    on machines without them too.

    Args:
        folder (str or PathLike): The folder; made when first written to.
        model (str): See :class:`TextTower`.
        pretrained (str, optional): See :class:`TextTower`. Defaults to None.
        cache_dir (str or PathLike, optional): See :class:`TextTower`.
            Defaults to None.
        min_pixels (int): See :func:`encode_regions`. Defaults to 64.
        fill (int): See :func:`encode_regions`. Defaults to 128.
        ignore_index (int): See :func:`encode_regions`. Defaults to 255.

    Raises:
        ValueError: If ``min_pixels`` or ``fill`` is out of range.
    """

    def __init__(self,
                 folder: PathLike,
                 model: str,
                 pretrained: Optional[str] = None,
                 cache_dir: Optional[PathLike] = None,
                 min_pixels: int = 64,
                 fill: int = 128,
                 ignore_index: int = 255) -> None:
        if min_pixels < 1:
            raise ValueError(
                f'`min_pixels` must be at least 1, but got {min_pixels}.')
        if not 0 <= fill <= 255:
            raise ValueError(f'`fill` must be in [0, 255], but got {fill}.')
        self.folder = Path(folder)
        self.model, self.pretrained = model, pretrained
        self.cache_dir = cache_dir
        self.options = dict(
            min_pixels=min_pixels, fill=fill, ignore_index=ignore_index)
        self.device = torch.device('cpu')
        self._weights: Optional[str] = None
        self._tower: Optional[ImageTower] = None

    # ------------------------------------------------------ the tower
    @property
    def _hash_file(self) -> Path:
        name = json.dumps([self.model, self.pretrained])
        short = hashlib.sha256(name.encode()).hexdigest()[:12]
        return self.folder / f'tower-{short}.json'

    def _read_hash(self) -> Optional[str]:
        """Read the hash of the weights in the folder, None if it has none."""
        try:
            return str(
                json.loads(self._hash_file.read_text('utf-8'))['weights'])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def check_weights(self) -> None:
        """Compare the weights with those that the folder was made with.

        To be called before a run, by one process after the other: files of
        other weights are not used any more. Without weights on this machine
        the hash in the folder is used.

        Raises:
            TextTowerError: If there are neither weights nor a hash.
        """
        weights = hash_weights(self.model, self.pretrained, self.cache_dir)
        known = self._read_hash()
        if weights is None and known is None:
            self._load()  # downloads, or says what is missing
            weights = hash_weights(self.model, self.pretrained, self.cache_dir)
        if weights is not None and weights != known:
            note = dict(
                model=self.model, pretrained=self.pretrained, weights=weights)
            write_files({self._hash_file: json.dumps(note, indent=1).encode()})
        self._weights = weights or known

    @property
    def settings(self) -> Dict:
        """dict: Settings that the embeddings depend on."""
        if self._weights is None:
            self._weights = self._read_hash()
        if self._weights is None:
            self.check_weights()
        return dict(weights=self._weights, **self.options)

    def _load(self) -> ImageTower:
        if self._tower is None:
            self._tower = ImageTower(self.model, self.pretrained,
                                     self.cache_dir).to(self.device)
        return self._tower

    # ---------------------------------------------------- the entries
    def key(self, image: np.ndarray, labels: np.ndarray) -> str:
        """Compute the name of the file of an image.

        Args:
            image (np.ndarray): uint8, BGR, with shape (H, W, 3).
            labels (np.ndarray): Label map with shape (H, W).

        Returns:
            str: Hexadecimal digits.
        """
        total = hashlib.sha256(
            json.dumps(self.settings, sort_keys=True).encode())
        for array in (image, labels):
            total.update(f'{array.dtype} {array.shape};'.encode())
            total.update(np.ascontiguousarray(array))
        return total.hexdigest()

    def path(self, key: str) -> Path:
        """Get the path of a file.

        Args:
            key (str): Its name.

        Returns:
            Path: The file, which need not be there.
        """
        return self.folder / key[:2] / f'{key}.safetensors'

    def get(self, image: np.ndarray, labels: np.ndarray) -> RegionEmbeddings:
        """Load the embeddings of an image, or compute and save them.

        Args:
            image (np.ndarray): uint8, BGR, with shape (H, W, 3).
            labels (np.ndarray): Label map with shape (H, W).

        Returns:
            RegionEmbeddings: The regions, on the CPU.

        Raises:
            TextTowerError: If the entry has to be made and the tower cannot
                be had.
            RuntimeError: If the weights have changed since the run began.
        """
        key = self.key(image, labels)
        path = self.path(key)
        regions = RegionEmbeddings.load(path, key)
        if regions is not None:
            return regions
        if path.is_file():
            print_log(f'{path} is damaged; making it anew', 'current',
                      logging.WARNING)
        if self._tower is None:
            self._load()
            weights = hash_weights(self.model, self.pretrained, self.cache_dir)
            if weights != self._weights:
                raise RuntimeError(
                    f'The weights of the image tower {self.model!r} are not '
                    f'those that {self.folder} notes. Make its entries anew '
                    'with `python tools/encode_regions.py CONFIG`.')
        regions = encode_regions(self._tower, image, labels, **self.options)
        regions.save(path, key)
        return regions
