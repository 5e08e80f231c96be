# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
import re
from typing import Any, List

from mmengine import fileio
from mmseg.datasets import PascalVOCDataset
from mmseg.registry import DATASETS

from .episode_dataset import EpisodeDataset, check_fold


@DATASETS.register_module()
class PASCAL5iEpisodes(EpisodeDataset):
    """PASCAL-5i dataset of few-shot episodes, sampled as HSNet does.

    Fold i holds the classes 5i to 5i + 4 of PASCAL VOC. The list of the fold
    names pairs of an image and one of its classes; the episodes are the
    list, from its start again until there are so many. Label 255 is ignored.

    Source: Shaban et al., One-Shot Learning for Semantic Segmentation, BMVC
    2017; the lists are ``data/splits/pascal/val/fold{0..3}.txt`` of
    `HSNet's code <https://github.com/juhongm999/hsnet>`_.

    Args:
        fold (int): The fold, 0 to 3. Defaults to 0.
        ann_file (str): The list; ``{fold}`` in it is replaced. A line is
            ``2007_000033__01``: the image, and the class from 1 on.
        num_episodes (int): Number of episodes. Defaults to 1000.
        **kwargs: Other arguments of ``BaseSegDataset``.

    Raises:
        FileNotFoundError: If the list is missing.
        ValueError: If there is no such fold, or the list is none of it.
    """
    METAINFO = dict(
        classes=('others', *PascalVOCDataset.METAINFO['classes'][1:]),
        palette=PascalVOCDataset.METAINFO['palette'])

    def __init__(self,
                 fold: int = 0,
                 ann_file: str = 'splits/pascal/val/fold{fold}.txt',
                 num_episodes: int = 1000,
                 **kwargs: Any) -> None:
        self.num_episodes = num_episodes
        first = 5 * check_fold(fold)
        super().__init__(
            range(first, first + 5),
            ann_file=ann_file.format(fold=fold),
            **kwargs)

    def load_data_list(self) -> List[dict]:
        """List the episodes.

        Returns:
            list[dict]: Sample information, in the order of the episodes.
        """
        if not fileio.exists(self.ann_file, backend_args=self.backend_args):
            raise FileNotFoundError(
                f'The list {osp.abspath(self.ann_file)} does not exist. It is '
                'one of data/splits/pascal/val/fold{0..3}.txt of '
                'https://github.com/juhongm999/hsnet.')
        text = fileio.get_text(self.ann_file, backend_args=self.backend_args)
        pairs = []
        for line in text.split():
            match = re.fullmatch(r'(\w+?)__(\d\d?)', line)
            if match is None or int(match[2]) - 1 not in self.class_ids:
                raise ValueError(
                    f'{self.ann_file} has the line {line!r}; expected a '
                    'image and one of the classes '
                    f'{[k + 1 for k in self.class_ids]}, such as '
                    f'2007_000033__{self.class_ids[0] + 1:02d}. It may be '
                    'the list of another fold.')
            pairs.append((match[1], int(match[2]) - 1))
        if not pairs:
            raise ValueError(f'{self.ann_file} is empty.')
        episodes = []
        for number in range(self.num_episodes):
            name, class_id = pairs[number % len(pairs)]
            episodes.append(
                self.episode(
                    osp.join(self.data_prefix['img_path'],
                             name + self.img_suffix),
                    osp.join(self.data_prefix['seg_map_path'],
                             name + self.seg_map_suffix),
                    class_id,
                    foreground=class_id + 1,
                    ignored=255))
        return episodes
