# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from mmseg_textkd.clip.region_store import RegionStore
from mmseg_textkd.clip.weights import PathLike


@TRANSFORMS.register_module()
class LoadRegionEmbeddings(BaseTransform):
    """Load CLIP image embeddings of the regions of the classes in an image.

    Put it directly behind ``LoadAnnotations``, in front of whatever changes
    the image, and let :class:`PackRegionInputs` pack what it loads;
    ``mmseg_textkd.add_region_embeddings`` does both in a config. The
    embeddings are made once and kept in a folder: by ``tools/train.py`` and
    ``tools/encode_regions.py``, with a progress bar; what they have not made
    is made here, which takes the tower into memory.

    Required Keys:

    - img, gt_seg_map

    Added Keys:

    - region_embeddings (:class:`RegionEmbeddings`)

    Args:
        folder (str or PathLike): See :class:`RegionStore`.
        model (str): See :class:`TextTower`. It must be the model of the text
            embeddings.
        pretrained (str, optional): See :class:`TextTower`. Defaults to None.
        cache_dir (str or PathLike, optional): See :class:`TextTower`.
            Defaults to None.
        min_pixels (int): Pixels, in the label map as it was loaded, from
            which on a class is present. Defaults to 64.
        fill (int): Value of the pixels outside a region. Defaults to 128,
            as in GKC.
        ignore_index (int): Label that is no class. Defaults to 255.
    """

    def __init__(self,
                 folder: PathLike,
                 model: str,
                 pretrained: Optional[str] = None,
                 cache_dir: Optional[PathLike] = None,
                 min_pixels: int = 64,
                 fill: int = 128,
                 ignore_index: int = 255) -> None:
        self.store = RegionStore(folder, model, pretrained, cache_dir,
                                 min_pixels, fill, ignore_index)

    def transform(self, results: dict) -> dict:
        """Load the embeddings of one sample.

        Args:
            results (dict): Result dict of the pipeline.

        Returns:
            dict: The same dict with ``region_embeddings``.

        Raises:
            ValueError: If there is no uint8 image with a label map of its
                size.
        """
        image, labels = results.get('img'), results.get('gt_seg_map')
        if (image is None or labels is None or image.dtype != np.uint8
                or image.ndim != 3 or labels.shape != image.shape[:2]):
            found = [
                'none' if a is None else f'{a.dtype} {a.shape}'
                for a in (image, labels)
            ]
            raise ValueError(
                'LoadRegionEmbeddings needs a uint8 image (H, W, 3) and a '
                f'label map (H, W), but got {found[0]} and {found[1]} for '
                f'{results.get("img_path", "a sample")}. Put it directly '
                'behind LoadAnnotations.')
        results['region_embeddings'] = self.store.get(image, labels)
        return results

    def __repr__(self) -> str:
        store = self.store
        return (f'{self.__class__.__name__}(folder={str(store.folder)!r}, '
                f'model={store.model!r}, pretrained={store.pretrained!r}, '
                f'{store.options})')
