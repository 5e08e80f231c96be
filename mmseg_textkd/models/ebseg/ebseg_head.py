# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.utils import ConfigType, SampleList
from torch import Tensor, nn

from mmseg_textkd.text import TextEmbeddings
from mmseg_textkd.text.vocabulary import VocabularySpec
from ..layers.balance import balance_probabilities, check_exponents
from .clip_sam_neck import FusedFeatures
from .ebseg_loss import LayerPrediction
from .mask_embedder import MaskEmbedder, MaskEmbeddings
from .mask_scores import MaskScores
from .switchable_text import SwitchableText


@MODELS.register_module()
class EBSegHead(BaseModule):
    r"""Masks with three embeddings each, compared with text (EBSeg).

    A, fully supervised: pixel features pooled by the mask, plus the query,
    through a perceptron, of a learned length. B: class tokens of frozen CLIP
    that attend to the mask. D: frozen CLIP features pooled by the mask, only
    at inference. Class logits are CLIP's factor times the products with the
    text and a learned "no object" vector.

    At inference the three are balanced (:func:`balance_probabilities`) with
    regard to whether a class was seen in training, and
    :math:`\sum_q p_{qk} \sigma(m_q)` is the score of class k at a pixel.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_.

    Args:
        num_classes (int): Number of classes K of the training.
        text (dict): Config of the :class:`TextProvider` of the training.
        decoder (dict): Config of the :class:`MaskDecoder`.
        channels (int): Width C of its queries and of the pixel features.
            Defaults to 256.
        attention_from (int): Number of CLIP's blocks before B begins.
            Defaults to 9.
        surgery_blocks (int): See :meth:`CLIPFeatures.dense`. Defaults to 6.
        balance (dict, optional): ``alpha``, ``beta`` and ``gamma`` of the
            balance. Defaults to None: those of ViT-B/16.
        loss (dict): Config of the losses. Defaults to EBSegLoss.
        train_classes (str | list, optional): Vocabulary of the training, to
            tell seen classes where the file of ``text`` is missing. Defaults
            to None: that of the file.
        test_text (dict, optional): Config of the provider of other classes
            for inference, with ``num_classes``. No part of a checkpoint.
            Defaults to None: the classes of the training.
        ignore_index (int): Label that is left out. Defaults to 255.
        align_corners (bool): Of MMSegmentation's resizing. Defaults to False.
        threshold (float): Probability above which a pixel is of the only
            class, where there is one. Defaults to 0.5.

    Raises:
        TypeError: If ``text`` or ``test_text`` build no text provider.
        ValueError: If the exponents of the balance do not make sense.
    """

    def __init__(self,
                 num_classes: int,
                 text: dict,
                 decoder: ConfigType = dict(type='MaskDecoder'),
                 channels: int = 256,
                 attention_from: int = 9,
                 surgery_blocks: int = 6,
                 balance: Optional[Dict[str, float]] = None,
                 loss: ConfigType = dict(type='EBSegLoss'),
                 train_classes: Optional[VocabularySpec] = None,
                 test_text: Optional[dict] = None,
                 ignore_index: int = 255,
                 align_corners: bool = False,
                 threshold: float = 0.5) -> None:
        super().__init__()
        self.balance = balance or dict(alpha=0.09, beta=0.3, gamma=0.7)
        check_exponents(**self.balance)
        self.ignore_index = ignore_index
        self.align_corners, self.threshold = align_corners, threshold
        self.text = SwitchableText(text, num_classes, train_classes, test_text)
        self.num_classes = num_classes
        self.out_channels = self.text.num_classes
        self.decoder = MODELS.build(decoder)
        self.embedder = MaskEmbedder(channels, self.text.dim, attention_from,
                                     surgery_blocks)
        self.no_object = nn.Parameter(torch.randn(self.text.dim))
        self.mask_scores: nn.Module = MaskScores()
        self.criterion = MODELS.build(loss)

    def set_classes(self, embeddings: Optional[TextEmbeddings]) -> None:
        """Take other classes for inference.

        Args:
            embeddings (TextEmbeddings, optional): Text embeddings of the
                classes; None for the classes of the training.

        Raises:
            ValueError: If they are of another width.
        """
        self.text.set_classes(embeddings)
        self.out_channels = self.text.num_classes

    def embed_masks(self, inputs: FusedFeatures) -> MaskEmbeddings:
        """Find masks and embed each in three ways, for inference.

        Args:
            inputs (FusedFeatures): Features of the neck.

        Returns:
            MaskEmbeddings: Those of the last layer.
        """
        decoded = self.decoder(inputs.levels, inputs.pixels)[-1]
        return self.embedder(decoded, inputs.pixels, inputs.clip)

    def classify(self, embeddings: Tensor, text: Tensor,
                 scale: float) -> Tensor:
        """Compare embeddings with text and with "no object".

        Args:
            embeddings (Tensor): Shape (N, Q, D).
            text (Tensor): Unit rows with shape (K, D).
            scale (float): CLIP's factor.

        Returns:
            Tensor: Logits with shape (N, Q, K + 1).
        """
        nothing = F.normalize(self.no_object.to(text), dim=0)
        with torch.autocast(embeddings.device.type, enabled=False):
            return scale * embeddings @ torch.cat([text, nothing[None]]).T

    def forward(self, inputs: FusedFeatures) -> Tensor:
        """Score the classes of inference at each pixel.

        Args:
            inputs (FusedFeatures): Features of the neck.

        Returns:
            Tensor: Scores with shape (N, K', H, W), not negative; for one
            class the logit of its score.
        """
        text, seen = self.text.vocabulary()
        found = self.embed_masks(inputs)
        scale = inputs.clip.logit_scale
        a, b = (
            self.classify(e, text, scale).softmax(dim=2)[..., :-1]
            for e in (found.supervised, found.attention))
        # "No object" was never learned for D.
        d = (scale * found.frozen @ text.T).softmax(dim=2)
        classes = balance_probabilities(a, b, d, seen, **self.balance)
        scores = self.mask_scores(found, classes)
        if scores.shape[1] == 1:  # MMSegmentation takes it for a logit
            return scores.clamp(1e-6, 1 - 1e-6).logit()
        return scores

    def loss(self, inputs: FusedFeatures, batch_data_samples: SampleList,
             train_cfg: ConfigType) -> Dict[str, Tensor]:
        """Compute the losses.

        Args:
            inputs (FusedFeatures): Features of the neck.
            batch_data_samples (list[SegDataSample]): With ``gt_sem_seg``.
            train_cfg (dict): Not used.

        Returns:
            dict[str, Tensor]: See :class:`EBSegLoss`.
        """
        text, scale = self.text(), inputs.clip.logit_scale
        decoded = self.decoder(inputs.levels, inputs.pixels)
        embeddings = [
            self.embedder.supervised(d, inputs.pixels) for d in decoded
        ]
        attention = self.embedder.attention(decoded[-1].masks, inputs.clip)
        layers = [
            LayerPrediction(self.classify(e, text, scale), d.masks)
            for e, d in zip(embeddings, decoded)
        ]
        labels = torch.cat([s.gt_sem_seg.data for s in batch_data_samples])
        return self.criterion(
            layers,
            embeddings[-1],
            self.classify(attention, text, scale),
            text,
            labels,
            ignore_index=self.ignore_index)

    def predict(self, inputs: FusedFeatures, batch_img_metas: List[dict],
                test_cfg: ConfigType) -> Tensor:
        """Score the classes at each pixel of the image.

        Args:
            inputs (FusedFeatures): Features of the neck.
            batch_img_metas (list[dict]): With ``img_shape`` or
                ``pad_shape``.
            test_cfg (dict): Not used.

        Returns:
            Tensor: Scores with shape (N, K', H, W), see :meth:`forward`.
        """
        return self.predict_by_feat(self.forward(inputs), batch_img_metas)

    def predict_by_feat(self, scores: Tensor,
                        batch_img_metas: List[dict]) -> Tensor:
        """Resize scores to the image.

        Args:
            scores (Tensor): Shape (N, K', h, w).
            batch_img_metas (list[dict]): See :meth:`predict`.

        Returns:
            Tensor: Scores with shape (N, K', H, W).
        """
        meta = batch_img_metas[0]
        size = meta['img_shape']
        if not isinstance(size, torch.Size):  # set by sliding windows
            size = meta.get('pad_shape', size)
        return resize(
            scores,
            size=tuple(size[:2]),
            mode='bilinear',
            align_corners=self.align_corners)
