# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
from typing import Any, List

from mmengine import fileio
from mmseg.registry import DATASETS

from mmseg_textkd.text import Vocabulary
from .episode_dataset import EpisodeDataset

SPLITS = dict(train=range(520), val=range(520, 760), test=range(760, 1000))
PICTURES = 10


@DATASETS.register_module()
class FSS1000Episodes(EpisodeDataset):
    """FSS-1000 few-shot dataset: 1,000 classes of ten images each.

    520 classes are for training, 240 for validation and 240 for testing, each
    part in alphabetical order. All images of the part are episodes::

        data/FSS-1000
        ├── ac_wall  ├── 1.jpg  ├── 1.png ... 10.jpg, 10.png
        ├── acorn ...

    The object is where the mask is at least 128.

    Source: Li et al., `FSS-1000 <https://arxiv.org/abs/1907.12347>`_, CVPR
    2020; the parts as `HSNet's code <https://github.com/juhongm999/hsnet>`_
    has them.

    Args:
        split (str): 'train', 'val' or 'test'. Defaults to 'test'.
        shot (int): Support images of the test to compare with. HSNet's
            one-shot test has 1.jpg for support and the other nine for
            queries; LSeg's takes all ten. Defaults to 0: LSeg's.
        **kwargs: Other arguments of ``BaseSegDataset``.

    Raises:
        FileNotFoundError: If the folder or a class is missing.
        ValueError: If there is no such part.
    """
    METAINFO = dict(
        classes=('others', *Vocabulary.from_spec('fss1000').names),
        palette=[[k // 36 * 9, k // 6 % 6 * 51, k % 6 * 51]
                 for k in range(1001)])

    def __init__(self,
                 split: str = 'test',
                 shot: int = 0,
                 **kwargs: Any) -> None:
        if split not in SPLITS:
            raise ValueError(f'`split` must be one of {list(SPLITS)}, but got '
                             f'{split!r}.')
        self.skip_first = split == 'test' and shot == 1
        super().__init__(SPLITS[split], **kwargs)

    def load_data_list(self) -> List[dict]:
        """List the episodes.

        Returns:
            list[dict]: Sample information, in the order of HSNet's.
        """
        root = self.data_prefix.get('img_path') or self.data_root
        folders = {
            k: osp.join(root, self.METAINFO['classes'][k + 1])
            for k in self.class_ids
        }
        missing = [
            folder for folder in folders.values()
            if not fileio.isdir(folder, backend_args=self.backend_args)
        ]
        if missing:
            raise FileNotFoundError(
                f'{len(missing)} of {len(folders)} folders of FSS-1000 are '
                f'missing in {osp.abspath(root)}, the first is '
                f'{osp.basename(missing[0])}.')
        # Alphabetical: 1, 10, 2, ...
        numbers = sorted(map(str, range(1, PICTURES + 1)))
        return [
            self.episode(
                osp.join(folder, number + self.img_suffix),
                osp.join(folder, number + self.seg_map_suffix), k)
            for k, folder in folders.items()
            for number in numbers[self.skip_first:]
        ]
