# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
from typing import List

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from .toy_scenes_painter import CLASSES, PALETTE


@DATASETS.register_module()
class ToyScenesDataset(BaseSegDataset):
    """ToyScenes dataset of generated street scenes: 8 classes, 255 unlabeled.

    The data set is made, not downloaded:
    ``python tools/dataset_converters/toy_scenes.py``. Its layout is
    ``{img_dir,ann_dir}/{train,val}/NNNN.png``.

    Args:
        img_suffix (str): Defaults to '.png'.
        **kwargs: As for ``BaseSegDataset``.

    Raises:
        FileNotFoundError: If the images or the labels are not there.
    """

    METAINFO = dict(classes=CLASSES, palette=PALETTE)

    def __init__(self, img_suffix: str = '.png', **kwargs) -> None:
        super().__init__(img_suffix=img_suffix, **kwargs)

    def load_data_list(self) -> List[dict]:
        """Load annotations; missing files raise with how to make them.

        Returns:
            list[dict]: All data info of the data set.
        """
        root = self.data_root or 'data/toy_scenes'
        hint = ('Make the data set with "python tools/dataset_converters/'
                f'toy_scenes.py --out {root}", or set data_root to where it '
                'is.')
        for key in ('img_path', 'seg_map_path'):
            folder = self.data_prefix.get(key)
            if folder and not osp.isdir(folder):
                raise FileNotFoundError(
                    f'ToyScenes: no folder {osp.abspath(folder)} '
                    f'(data_prefix[{key!r}]). {hint}')
        data_list = super().load_data_list()
        if not data_list:
            raise FileNotFoundError(f'ToyScenes: no *{self.img_suffix} in '
                                    f'{self.data_prefix["img_path"]}. {hint}')
        return data_list
