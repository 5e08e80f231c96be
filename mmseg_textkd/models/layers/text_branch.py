# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Sequence

from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from ..new_words import place_new_words
from ..text_providers import build_text
from .pixel_projection import PixelProjection


class TextBranch(BaseModule):
    """Pixel projection and text provider of one head.

    Args:
        in_channels (int): Channels C of the head's features.
        num_classes (int): Number of classes K.
        text (dict): Config of the :class:`TextProvider`.
        norm (str): Norm of the pixel embeddings: 'bn', 'l2' or 'none'.
            Defaults to 'bn'.
        norm_cfg (dict, optional): Config of the batch norm. Defaults to
            None: BN.
        fusion (dict, optional): Config of a :class:`TextFusion`, in which
            image and text meet. Defaults to None.
        project (bool): Whether features are projected before the norm; if
            not, they must have the width of the class embeddings. Defaults
            to True.
    """

    def __init__(self,
                 in_channels: int,
                 num_classes: int,
                 text: dict,
                 norm: str = 'bn',
                 norm_cfg: Optional[dict] = None,
                 fusion: Optional[dict] = None,
                 project: bool = True) -> None:
        super().__init__()
        self.text = build_text(text, num_classes=num_classes)
        self.projection = PixelProjection(in_channels, self.text.dim, norm,
                                          norm_cfg, project)
        self.fusion = None
        if fusion is not None:
            self.fusion = MODELS.build(
                fusion,
                default_args=dict(
                    in_channels=in_channels,
                    dim=self.text.dim,
                    num_classes=num_classes,
                    norm_cfg=norm_cfg))

    @property
    def default_new_words(self) -> str:
        """str: How vectors of new words are used, see
        :func:`.place_new_words`. Cosines take them raw, as LSeg does.
        """
        return 'raw'

    def place_words(self,
                    vectors: Tensor,
                    trained: Sequence[Optional[int]],
                    how: Optional[str] = None) -> Tensor:
        """Map the vectors of the new ones among words by
        :func:`.place_new_words`.

        Args:
            vectors (Tensor): Vectors of K' words, unit rows with shape
                (K', D).
            trained (Sequence[int | None]): For each word the index of the
                class that it was in the training, None for a new one.
            how (str, optional): See there. Defaults to None:
                :attr:`default_new_words`.

        Returns:
            Tensor: The vectors, with those of trained words as they were.

        Raises:
            ValueError: If ``how`` is unknown or not possible.
        """
        how = how or self.default_new_words
        new = [k for k, row in enumerate(trained) if row is None]
        seen = self.text.class_embeddings
        if new and how != 'raw':
            seen = self.text.trained_vectors()
        vectors = vectors.clone()
        vectors[new] = place_new_words(vectors[new], seen.to(vectors.device),
                                       how)
        return vectors
