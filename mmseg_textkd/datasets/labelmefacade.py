# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
from typing import List

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS


@DATASETS.register_module()
class LabelMeFacadeDataset(BaseSegDataset):
    """LabelMeFacade dataset: facades, 8 classes, 255 is unlabeled.

    .. code-block:: none

        data/labelmefacade
        ├── img/train  ├── ann/train    100 images
        └── img/test   └── ann/test     845 images

    ``tools/dataset_converters/labelmefacade.py`` makes it of the published
    images and colored labels; what those call "various" is 255. The split is
    the published one and has no validation part.

    Source: `A Fast Approach for Pixelwise Labeling of Facade Images
    <https://doi.org/10.1109/ICPR.2010.742>`_.

    Raises:
        FileNotFoundError: If the images or a label map are not there.
    """

    METAINFO = dict(
        classes=('building', 'car', 'door', 'pavement', 'road', 'sky',
                 'vegetation', 'window'),
        palette=[[128, 0, 0], [128, 0, 128], [128, 128, 0], [128, 128, 128],
                 [128, 64, 0], [0, 128, 128], [0, 128, 0], [0, 0, 128]])

    def load_data_list(self) -> List[dict]:
        """Load annotations; missing files raise with how to get them.

        Returns:
            list[dict]: All data info of the data set.
        """
        data_list = super().load_data_list()
        missing = [
            path for info in data_list
            for path in (info['img_path'], info.get('seg_map_path'))
            if path is not None and not osp.isfile(path)
        ]
        if missing or not data_list:
            found = f'no {missing[0]}' if missing else 'no image'
            raise FileNotFoundError(
                f'LabelMeFacade: {found} in {osp.abspath(self.data_root)} '
                f'({len(missing)} files are missing). Make it with "python '
                'tools/dataset_converters/labelmefacade.py SOURCE '
                'data/labelmefacade", or set data_root to where it is.')
        return data_list
