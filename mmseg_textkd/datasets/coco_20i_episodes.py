# Copyright (c) mmseg_textkd contributors. All rights reserved.
import io
import json
import os.path as osp
import pickle
from typing import Any, Dict, List

import numpy as np
from mmengine import fileio
from mmseg.datasets import COCOStuffDataset
from mmseg.registry import DATASETS

from .episode_dataset import EpisodeDataset, check_fold


@DATASETS.register_module()
class COCO20iEpisodes(EpisodeDataset):
    """COCO-20i dataset of few-shot episodes, sampled as HSNet does.

    Fold i holds the classes i, i + 4, i + 8, ... of the 80 things of COCO.
    For each episode a class is drawn, then one of its images, with numpy's
    legacy generator and HSNet's seed.

    Source: Nguyen and Todorovic, Feature Weighting and Boosting for Few-Shot
    Segmentation, ICCV 2019; the lists are ``data/splits/coco/val/
    fold{0..3}.pkl`` of `HSNet's code
    <https://github.com/juhongm999/hsnet>`_, whose label maps (class + 1, 0:
    none of the things) go with them.

    Args:
        fold (int): The fold, 0 to 3. Defaults to 0.
        ann_file (str): The list; ``{fold}`` in it is replaced. A ``.pkl`` of
            HSNet, of which nothing but numbers, texts, lists and dicts is
            read, or a ``.json`` of the same: file names by class.
        num_episodes (int): Number of episodes. Defaults to 1000.
        seed (int): Seed of the draws. Defaults to 0, HSNet's.
        shot (int): Support images that HSNet would draw. They are drawn
            and dropped, so that the queries are those of that test. Defaults
            to 0: LSeg's.
        **kwargs: Other arguments of ``BaseSegDataset``.

    Raises:
        FileNotFoundError: If the list is missing.
        ValueError: If there is no such fold, or the list is none of it.
    """
    METAINFO = dict(
        classes=('others', *COCOStuffDataset.METAINFO['classes'][:80]),
        palette=[[0, 0, 0], *COCOStuffDataset.METAINFO['palette'][:80]])

    def __init__(self,
                 fold: int = 0,
                 ann_file: str = 'splits/coco/val/fold{fold}.pkl',
                 num_episodes: int = 1000,
                 seed: int = 0,
                 shot: int = 0,
                 **kwargs: Any) -> None:
        self.num_episodes, self.seed, self.shot = num_episodes, seed, shot
        super().__init__(
            range(check_fold(fold), 80, 4),
            ann_file=ann_file.format(fold=fold),
            **kwargs)

    def load_data_list(self) -> List[dict]:
        """Sample the episodes.

        Returns:
            list[dict]: Sample information, in the order of the episodes.
        """
        pictures = self._read_list()
        rng = np.random.RandomState(self.seed)

        def draw(number: int) -> int:
            # As HSNet draws, down to the state that the generator is left in.
            return int(rng.choice(number, 1, replace=False)[0])

        episodes = []
        for _ in range(self.num_episodes):
            class_id = self.class_ids[draw(len(self.class_ids))]
            names = pictures[class_id]
            name = names[draw(len(names))]
            support = 0
            while support < self.shot:
                support += names[draw(len(names))] != name
            stem = name[:-len(self.img_suffix)]
            episodes.append(
                self.episode(
                    osp.join(self.data_prefix['img_path'], name),
                    osp.join(self.data_prefix['seg_map_path'],
                             stem + self.seg_map_suffix),
                    class_id,
                    foreground=class_id + 1))
        return episodes

    def _read_list(self) -> Dict[int, List[str]]:
        """Load the file names of each class of the fold."""
        path = self.ann_file
        if not fileio.exists(path, backend_args=self.backend_args):
            raise FileNotFoundError(
                f'The list {osp.abspath(path)} does not exist. It is one of '
                'data/splits/coco/val/fold{0..3}.pkl of '
                'https://github.com/juhongm999/hsnet.')
        data = fileio.get(path, backend_args=self.backend_args)
        try:
            content = (
                json.loads(data) if path.endswith('.json') else
                _PlainUnpickler(io.BytesIO(data)).load())
            names = {int(k): list(v) for k, v in content.items()}
        except (AttributeError, EOFError, TypeError, ValueError,
                pickle.UnpicklingError) as error:
            raise ValueError(f'{path} is no list of file names by class, or '
                             f'not safe to read: {error}') from error
        for k in self.class_ids:
            names_of = names.get(k) or ()
            if not names_of or not all(
                    isinstance(n, str) and n.endswith(self.img_suffix)
                    for n in names_of):
                raise ValueError(
                    f'{path} has no *{self.img_suffix} images of class {k}; '
                    'it may be the list of another fold.')
            if self.shot and len(set(names_of)) < 2:
                raise ValueError(f'{path} has one image of class {k}, but '
                                 'a support image must be another one.')
        return names


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of numbers, strings, lists and dicts only."""

    def find_class(self, module: str, name: str) -> None:
        """Raise for anything that would be imported."""
        raise pickle.UnpicklingError(f'it imports {module}.{name}')
