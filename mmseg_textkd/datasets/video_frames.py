# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
import os.path as osp
import re
from typing import Any, List, Sequence, Union

from mmengine import fileio
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS


def frame_order(name: str) -> List[Union[str, int]]:
    """Get a key to sort frames by: 2 comes before 10.

    Args:
        name (str): Name or path of a frame.

    Returns:
        list[str | int]: Its texts and numbers, by turns.
    """
    return [
        int(part) if i % 2 else part
        for i, part in enumerate(re.split(r'(\d+)', name))
    ]


@DATASETS.register_module()
class VideoFramesDataset(BaseSegDataset):
    """Videos as folders of frames, in their order.

    .. code-block:: none

        DATA_ROOT
        ├── a_video ├── origin  ├── 00000001.jpg ...
        │           └── mask    ├── 00000001.png ...
        └── another_video ...

    Labels may be there for some frames only: the others are left out, unless
    ``data_prefix`` has no ``seg_map_path``.

    Args:
        data_prefix (dict): ``img_path`` and ``seg_map_path``: the folders of
            frames and of label maps within that of a video. Defaults to
            ``dict(img_path='origin', seg_map_path='mask')``.
        videos_dir (str): Folder of the videos below ``data_root``. Defaults
            to ''.
        ann_file (str): A list of videos, one a line. Defaults to '', all of
            them.
        **kwargs: As of ``BaseSegDataset``; ``metainfo`` with the classes.

    Raises:
        FileNotFoundError: If there is no video, or one that is listed is
            missing or has no frames.
    """

    def __init__(self,
                 data_prefix: dict = dict(
                     img_path='origin', seg_map_path='mask'),
                 videos_dir: str = '',
                 **kwargs: Any) -> None:
        self.videos_dir = videos_dir
        self.folders = dict(data_prefix)
        super().__init__(data_prefix=dict(), **kwargs)

    def load_data_list(self) -> List[dict]:
        """List all frames, video by video.

        Returns:
            list[dict]: Sample information as of ``BaseSegDataset``, with the
            name of its ``video``.
        """
        root = osp.join(self.data_root or '', self.videos_dir)
        names = self._videos(root)
        data_list = []
        for name in names:
            frames = self._stems(
                osp.join(root, name, self.folders['img_path']),
                self.img_suffix)
            if not frames:
                raise FileNotFoundError(
                    f'the video {osp.join(root, name)} has no '
                    f'*{self.img_suffix} in its folder '
                    f'{self.folders["img_path"]!r}.')
            labels = self.folders.get('seg_map_path')
            if labels is not None:
                there = set(
                    self._stems(
                        osp.join(root, name, labels), self.seg_map_suffix))
                frames = [frame for frame in frames if frame in there]
            for frame in frames:
                info = dict(
                    img_path=osp.join(root, name, self.folders['img_path'],
                                      frame + self.img_suffix),
                    video=name,
                    label_map=self.label_map,
                    reduce_zero_label=self.reduce_zero_label,
                    seg_fields=[])
                if labels is not None:
                    info['seg_map_path'] = osp.join(
                        root, name, labels, frame + self.seg_map_suffix)
                data_list.append(info)
        if not data_list:
            raise FileNotFoundError(
                f'no labeled frame in the {len(names)} videos of '
                f'{osp.abspath(root)}; see the layout in '
                f'{type(self).__name__}.')
        return data_list

    def _videos(self, root: str) -> List[str]:
        """Names of the videos."""
        if not osp.isdir(root):
            raise FileNotFoundError(
                f'there is no folder of videos {osp.abspath(root)}; see the '
                f'layout in {type(self).__name__}.')
        if not self.ann_file:
            return sorted((e.name for e in os.scandir(root) if e.is_dir()),
                          key=frame_order)
        text = fileio.get_text(self.ann_file, backend_args=self.backend_args)
        return [line.strip() for line in text.splitlines() if line.strip()]

    @staticmethod
    def _stems(folder: str, suffix: str) -> Sequence[str]:
        """Names of the files with this suffix, sorted, without it."""
        if not osp.isdir(folder):
            return []
        return sorted(
            (name[:-len(suffix)]
             for name in os.listdir(folder) if name.endswith(suffix)),
            key=frame_order)
