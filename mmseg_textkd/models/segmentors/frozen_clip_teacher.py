# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict

import torch
import torch.nn.functional as F
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor

from mmseg_textkd.utils.checkpoint import checksum
from ..ebseg import FrozenCLIPViT
from .normalization import to_rgb


@MODELS.register_module()
class FrozenCLIPTeacher:
    """Frozen CLIP image encoder as teacher of dense image embeddings.

    Its outputs depend on neither labels nor class names, so that it may be
    used with ``unseen`` classes.

    It is no module: it is in no module tree, state dict or optimizer, and
    gets no gradient. It is loaded on first use and moved to the device of its
    inputs. Copies of a student share it.

    Args:
        surgery_blocks (int): See :meth:`CLIPFeatures.dense`. Defaults to 6,
            for 12 blocks.
        **kwargs: Arguments of :class:`FrozenCLIPViT`: ``model``,
            ``pretrained`` and, of another tower than ViT-B/16, its sizes;
            ``scale``, the size of its images relative to the student's.
    """

    # It has no logits.
    classes = None
    num_classes = None

    def __init__(self, surgery_blocks: int = 6, **kwargs: Any) -> None:
        self.surgery_blocks = surgery_blocks
        self.tower = FrozenCLIPViT(**kwargs).requires_grad_(False).eval()

    def __deepcopy__(self, memo: Dict) -> 'FrozenCLIPTeacher':
        return self

    @property
    def name(self) -> str:
        """str: Name of the model in messages."""
        return self.tower.model

    def checksum(self) -> str:
        """Hash all weights, to prove that training has not changed them.

        Returns:
            str: See :func:`.checkpoint.checksum`, of the tower and of its
            positional embedding.
        """
        return self.tower.checksum() + checksum(self.tower)

    @torch.no_grad()
    def __call__(self, inputs: Tensor,
                 preprocessor: SegDataPreProcessor) -> Dict[str, Tensor]:
        """Embed the patches of a batch.

        Args:
            inputs (Tensor): Normalized images of the student, with shape
                (N, 3, H, W).
            preprocessor (SegDataPreProcessor): That of the student.

        Returns:
            dict[str, Tensor]: ``embeddings``, of unit length, with shape
            (N, D, h, w).
        """
        tower = self.tower.to(inputs.device)
        features = tower(to_rgb(inputs, preprocessor), cover=True)
        dense = features.dense(self.surgery_blocks)
        return dict(embeddings=F.normalize(dense, dim=1))
