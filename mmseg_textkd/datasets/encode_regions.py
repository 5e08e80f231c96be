# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Computation of the region embeddings of a config before a run."""
import copy
import hashlib
import json
import os
from typing import Any, Dict, Iterator, Mapping, Tuple

from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, TRANSFORMS

from mmseg_textkd.clip.region_embeddings import RegionEmbeddings
from mmseg_textkd.clip.region_store import RegionStore
from mmseg_textkd.utils.config import dicts, type_name
from mmseg_textkd.utils.progress import track

KIND = 'LoadRegionEmbeddings'


def ensure_regions(cfg: Mapping,
                   progress: bool = False,
                   everything: bool = False) -> int:
    """Compute the missing region embeddings of the training data.

    Of several processes one makes them, and the others wait. What is made is
    kept at once, so a killed process goes on where it was.

    Args:
        cfg (Mapping): An ``mmengine.Config``. All datasets of its
            ``train_dataloader`` with a ``LoadRegionEmbeddings`` are looked
            at.
        progress (bool): Whether to show a progress bar. Defaults to False.
        everything (bool): Whether to look at every image. Otherwise a data
            set that has once been gone through, and whose files have not been
            touched since, is passed over. Defaults to False.

    Returns:
        int: Number of images whose embeddings this call has made.

    Raises:
        TextTowerError: If something is missing and the tower cannot be had.
    """
    from filelock import FileLock
    made = 0
    for dataset_cfg, transform in _find(cfg.get('train_dataloader')):
        store = TRANSFORMS.build(transform).store
        store.folder.mkdir(parents=True, exist_ok=True)
        # Transforms are looked up in the scope that a runner would set. Of a
        # killed holder the system releases the lock.
        with DefaultScope.overwrite_default_scope(
                cfg.get('default_scope')
                or 'mmseg'), FileLock(store.folder / '.lock'):
            dataset = DATASETS.build(dataset_cfg)
            store.check_weights()
            settings = [store.settings, dataset_cfg['pipeline']]
            mark = store.folder / 'complete' / _listing(dataset, settings)
            if everything or not mark.is_file():
                made += _fill(store, dataset, progress)
                mark.parent.mkdir(exist_ok=True)
                mark.touch()
    return made


def _fill(store: RegionStore, dataset: Any, progress: bool) -> int:
    """Compute the missing embeddings of a dataset; returns their number."""
    store.device = get_device()
    made = 0
    for i in track(range(len(dataset)), 'Encoding regions', show=progress):
        results = dataset[i]
        image, labels = results['img'], results['gt_seg_map']
        key = store.key(image, labels)
        if RegionEmbeddings.load(store.path(key), key) is None:
            store.get(image, labels)
            made += 1
    if made:
        print_log(
            f'Made the region embeddings of {made} images in '
            f'{store.folder}', 'current')
    return made


def _listing(dataset: Any, settings: Any) -> str:
    """Hash the files of a dataset by name, size and time of change.

    It only saves a look at each image: embeddings are found by content.
    """
    total = hashlib.sha256(
        json.dumps(settings, sort_keys=True, default=str).encode())
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        label_map = info.get('label_map')
        total.update(f'{label_map} {info.get("reduce_zero_label")};'.encode())
        for name in ('img_path', 'seg_map_path'):
            path = str(info.get(name))
            try:
                stat = os.stat(path)
                total.update(
                    f'{path} {stat.st_size} {stat.st_mtime_ns};'.encode())
            except OSError:  # not on a disk
                total.update(f'{path};'.encode())
    return total.hexdigest()


def _find(loader: Any) -> Iterator[Tuple[Dict, Dict]]:
    """Find datasets that load region embeddings, with their transforms."""
    if hasattr(loader, 'to_dict'):
        loader = loader.to_dict()
    for node in dicts(loader):
        pipeline = node.get('pipeline') or []
        types = [type_name(transform) for transform in pipeline]
        if KIND in types:
            place = types.index(KIND)
            yield (dict(
                copy.deepcopy(node), pipeline=copy.deepcopy(pipeline[:place])),
                   dict(pipeline[place]))
