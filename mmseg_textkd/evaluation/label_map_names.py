# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os.path as osp
from collections import Counter
from typing import List

from torch.utils.data import Dataset


def label_map_names(dataset: Dataset) -> List[str]:
    """Name the files that ``IoUMetric`` writes its predictions to.

    Args:
        dataset (Dataset): The test set.

    Returns:
        list[str]: Names, in the order of the images.

    Raises:
        ValueError: If two images share one: it takes the last part of their
            paths alone.
    """
    names = [
        osp.splitext(osp.basename(dataset.get_data_info(i)['img_path']))[0] +
        '.png' for i in range(len(dataset))
    ]
    name, number = Counter(names).most_common(1)[0] if names else ('', 0)
    if number > 1:
        raise ValueError(
            f'{number} images of the test set would be written to one file, '
            f'{name}: MMSegmentation takes the last part of their paths '
            'alone. Test one folder (one video, one class) at a time.')
    return names
