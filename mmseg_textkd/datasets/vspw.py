# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict, Optional, Sequence

from mmseg.registry import DATASETS

from .video_frames import VideoFramesDataset

# As its `label_num_dic_final.json` has them, without 0, "others".
CLASSES = (
    'wall', 'ceiling', 'door', 'stair', 'ladder', 'escalator',
    'Playground_slide', 'handrail_or_fence', 'window', 'rail', 'goal',
    'pillar', 'pole', 'floor', 'ground', 'grass', 'sand', 'athletic_field',
    'road', 'path', 'crosswalk', 'building', 'house', 'bridge', 'tower',
    'windmill', 'well_or_well_lid', 'other_construction', 'sky', 'mountain',
    'stone', 'wood', 'ice', 'snowfield', 'grandstand', 'sea', 'river', 'lake',
    'waterfall', 'water', 'billboard_or_Bulletin_Board', 'sculpture',
    'pipeline', 'flag', 'parasol_or_umbrella', 'cushion_or_carpet', 'tent',
    'roadblock', 'car', 'bus', 'truck', 'bicycle', 'motorcycle',
    'wheeled_machine', 'ship_or_boat', 'raft', 'airplane', 'tyre',
    'traffic_light', 'lamp', 'person', 'cat', 'dog', 'horse', 'cattle',
    'other_animal', 'tree', 'flower', 'other_plant', 'toy', 'ball_net',
    'backboard', 'skateboard', 'bat', 'ball',
    'cupboard_or_showcase_or_storage_rack', 'box',
    'traveling_case_or_trolley_case', 'basket', 'bag_or_package', 'trash_can',
    'cage', 'plate', 'tub_or_bowl_or_pot', 'bottle_or_cup', 'barrel',
    'fishbowl', 'bed', 'pillow', 'table_or_desk', 'chair_or_seat', 'bench',
    'sofa', 'shelf', 'bathtub', 'gun', 'commode', 'roaster', 'other_machine',
    'refrigerator', 'washing_machine', 'Microwave_oven', 'fan', 'curtain',
    'textiles', 'clothes', 'painting_or_poster', 'mirror',
    'flower_pot_or_vase', 'clock', 'book', 'tool', 'blackboard', 'tissue',
    'screen_or_television', 'computer', 'printer', 'Mobile_phone', 'keyboard',
    'other_electronic_product', 'fruit', 'food', 'instrument', 'train')


@DATASETS.register_module()
class VSPWDataset(VideoFramesDataset):
    """VSPW: 3,536 videos, 15 labeled frames a second, 124 classes.

    .. code-block:: none

        data/VSPW_480p              (or data/VSPW, in full size)
        ├── train.txt, val.txt, test.txt    a video a line
        └── data
            └── 1001_5z_ijQjUf_0 ├── origin ├── 00000001.jpg ...
                                 └── mask   ├── 00000001.png ...

    Labels 1 to 124 are the classes; 0 and 255 are not scored, nor is 254.
    Label maps of "test" are not public.

    Source: `VSPW <https://github.com/VSPW-dataset/VSPW-dataset-download>`_
    (CVPR 2021).

    Args:
        ann_file (str): 'val.txt' or another list.
        videos_dir (str): Defaults to 'data'.
        reduce_zero_label (bool): Whether 0 is no class. Defaults to True.
        **kwargs: As of :class:`VideoFramesDataset`.
    """

    METAINFO = dict(
        classes=CLASSES,
        # Its own, as none was published.
        palette=[[(67 * k + 40) % 256, (151 * k + 90) % 256,
                  (199 * k + 20) % 256] for k in range(len(CLASSES))])

    def __init__(self,
                 ann_file: str = 'val.txt',
                 videos_dir: str = 'data',
                 reduce_zero_label: bool = True,
                 **kwargs: Any) -> None:
        super().__init__(
            ann_file=ann_file,
            videos_dir=videos_dir,
            reduce_zero_label=reduce_zero_label,
            **kwargs)

    @classmethod
    def get_label_map(cls,
                      new_classes: Optional[Sequence] = None
                      ) -> Dict[int, int]:
        """Map labels as the base class does, and 254 to 255.

        Args:
            new_classes (list, tuple, optional): Subset of the classes.
                Defaults to None.

        Returns:
            dict[int, int]: Label, less 1, to label in training.
        """
        label_map = super().get_label_map(new_classes) or {}
        label_map[253] = 255
        return label_map
