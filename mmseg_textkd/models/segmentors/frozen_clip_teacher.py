# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict

import torch
import torch.nn.functional as F
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_textkd.text.checksum import checksum
from ..ebseg import FrozenCLIPViT
from .normalization import to_rgb


@MODELS.register_module()
class FrozenCLIPTeacher:
    """CLIP's image tower, which tells what it sees at each patch.

    It sees images and no labels, and is asked for no names: it may teach
    where classes are hidden (``unseen``).

    No module: it is in no module tree, state dict or optimizer, and takes no
    gradient. It is loaded when it is first needed, and moves to the device of
    its inputs. Copies of a student share it.

    Args:
        surgery_blocks (int): See :meth:`CLIPFeatures.dense`. Defaults to 6,
            for 12 blocks.
        **kwargs: Arguments of :class:`FrozenCLIPViT`: ``model``,
            ``pretrained`` and, of another tower than ViT-B/16, its sizes;
            ``scale``, the size of its images relative to the student's.
    """

    # It gives no logits.
    classes = None
    num_classes = None

    def __init__(self, surgery_blocks: int = 6, **kwargs: Any) -> None:
        self.surgery_blocks = surgery_blocks
        self.tower = FrozenCLIPViT(**kwargs).requires_grad_(False).eval()

    def __deepcopy__(self, memo: Dict) -> 'FrozenCLIPTeacher':
        return self

    @property
    def name(self) -> str:
        """str: What it is called in messages."""
        return self.tower.model

    def checksum(self) -> str:
        """Hash all weights, to prove that training has not touched them.

        Returns:
            str: See :func:`mmseg_textkd.text.checksum.checksum`, of the tower
            and of the positional embedding that stands for its own.
        """
        return self.tower.checksum() + checksum(self.tower)

    @torch.no_grad()
    def __call__(self, inputs: Tensor,
                 preprocessor: SegDataPreProcessor) -> Dict[str, Tensor]:
        """Look at a batch.

        Args:
            inputs (Tensor): Images as the student gets them, with shape
                (N, 3, H, W).
            preprocessor (SegDataPreProcessor): The student's, which says how
                they were normalized.

        Returns:
            dict[str, Tensor]: ``embeddings``, of unit length, with shape
            (N, D, h, w).
        """
        tower = self.tower.to(inputs.device)
        features = tower(to_rgb(inputs, preprocessor), cover=True)
        dense = features.dense(self.surgery_blocks)
        return dict(embeddings=F.normalize(dense, dim=1))
