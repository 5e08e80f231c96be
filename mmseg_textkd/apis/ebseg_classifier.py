# Copyright (c) mmseg_textkd contributors. All rights reserved.
import os
from typing import Any, Mapping, Optional, Sequence, Union

from torch import Tensor, nn

from mmseg_textkd.models import EBSeg
from mmseg_textkd.models.ebseg.mask_embedder import MaskEmbeddings
from mmseg_textkd.models.ebseg.mask_scores import MaskScores, pixel_embeddings
from mmseg_textkd.models.layers import pixel_text_similarity
from mmseg_textkd.text import TextEmbeddings
from .open_classifier import NewClasses, OpenClassifier
from .word_encoder import WordEncoder


class EBSegClassifier(OpenClassifier):
    """EBSeg's masks, compared with the text of any classes.

    Which classes count as seen in training, its balance tells by their names.
    New words are encoded by the text tower that belongs to its image tower.

    Args:
        model (EBSeg): The network.
        text (Mapping): The config of the text of its training.
        names (Sequence[str]): The classes that it was trained with.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.text_cache.default_cache_dir`.
    """

    layer = 'mask_scores'
    logits = False

    def __init__(self,
                 model: EBSeg,
                 text: Mapping[str, Any],
                 names: Sequence[str],
                 cache_dir: Optional[Union[str, os.PathLike]] = None) -> None:
        super().__init__(model, names)
        own, encoder = model.decode_head.text, model.image_encoder
        self.words = WordEncoder(
            own.trained,
            text,
            names,
            cache_dir,
            tower=dict(
                model=encoder.model,
                pretrained=encoder.pretrained,
                cache_dir=encoder.cache_dir))
        # The checkpoint knows the names where their file is missing.
        if own.train_classes is None and own.trained.names is None:
            own.train_classes = list(names)
        self.vectors = own.trained.class_embeddings.detach().clone()

    def encode(self, classes: Any, **how: Any) -> NewClasses:
        """Find vectors, see :meth:`WordEncoder.encode`."""
        return self.words.encode(classes, **how)

    def take(self, found: NewClasses, new_bias: float = 0.) -> None:
        """Hand the vectors to :meth:`EBSeg.set_classes`."""
        if new_bias:
            raise ValueError(
                '`new_bias` is for classifiers that are trained on the seen '
                'classes alone. EBSeg balances seen and new classes by its '
                '`balance`: change decode_head.balance.beta by `cfg_options`.')
        self.model.set_classes(
            TextEmbeddings(found.vectors.cpu(), found.names, found.phrases))
        self.vectors = found.vectors

    def select(self, rows: Tensor) -> nn.Module:
        """Sum up the scores of some of the classes."""
        return MaskScores(rows)

    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """Compare the mean embedding B of a pixel's masks with the vectors."""
        return _MaskTextCosine(self.vectors[rows])


class _MaskTextCosine(nn.Module):
    """In the place of the scores, see :meth:`EBSeg.pixel_text_similarity`."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, found: MaskEmbeddings, classes: Tensor) -> Tensor:
        """Compute cosines of shape (N, n, H, W)."""
        return pixel_text_similarity(pixel_embeddings(found), self.vectors)
