# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, List, Optional, Tuple

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
from .mask_scores import MaskScores, padded_size
from .switchable_text import SwitchableText


@MODELS.register_module()
class EBSegHead(BaseModule):
    r"""Mask classification head of EBSeg with three embeddings for each mask.

    A, fully supervised: pixel features pooled by the mask, plus the query,
    through a perceptron, of a learned length. B: class tokens of frozen CLIP
    that attend to the mask. D: frozen CLIP features pooled by the mask, only
    at inference. Class logits are CLIP's factor times the products with the
    text and a learned "no object" vector.

    At inference the probabilities by the three, without "no object", are
    balanced (:func:`balance_probabilities`) with regard to whether a class was
    seen in training, brought to a sum of 1 and multiplied by the probability
    by A that there is an object. :math:`\sum_q p_{qk} \sigma(m_q)` is the
    score of class k at a pixel.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_.

    Args:
        num_classes (int): Number of classes K of the training.
        text (dict): Config of the :class:`TextProvider` of the training.
        decoder (dict): Config of the :class:`MaskDecoder`.
        channels (int): Width C of its queries and of the pixel features.
            Defaults to 256.
        attention_from (int): Number of CLIP's blocks before B begins.
            Defaults to 9.
        attention_heads (int): Number of heads of CLIP's image tower.
            Defaults to 12.
        surgery_blocks (int): See :meth:`CLIPFeatures.dense`. Defaults to 10.
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
                 decoder: ConfigType = dict(type='mmseg.MaskDecoder'),
                 channels: int = 256,
                 attention_from: int = 9,
                 attention_heads: int = 12,
                 surgery_blocks: int = 10,
                 balance: Optional[Dict[str, float]] = None,
                 loss: ConfigType = dict(type='mmseg.EBSegLoss'),
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
                                     attention_heads, surgery_blocks)
        # Of a length of about 1, as text.
        self.no_object = nn.Parameter(
            torch.randn(self.text.dim) / self.text.dim**.5)
        self.mask_scores: nn.Module = MaskScores()
        self.criterion = MODELS.build(loss)

    def set_classes(self, embeddings: Optional[TextEmbeddings]) -> None:
        """Set the classes of inference.

        Args:
            embeddings (TextEmbeddings, optional): Text embeddings of the
                classes; None for the classes of the training.

        Raises:
            ValueError: If they are of another width.
        """
        self.text.set_classes(embeddings)
        self.out_channels = self.text.num_classes

    def embed_masks(self,
                    inputs: FusedFeatures,
                    size: Optional[Tuple[int, int]] = None) -> MaskEmbeddings:
        """Predict masks and their three embeddings, for inference.

        Args:
            inputs (FusedFeatures): Features of the neck.
            size (tuple[int, int], optional): Height and width at which scores
                are wanted. Defaults to None: those of the images.

        Returns:
            MaskEmbeddings: Those of the last layer.
        """
        decoded = self.decoder(inputs.levels, inputs.pixels)[-1]
        return self.embedder(decoded, inputs.pixels, inputs.clip, inputs.image,
                             size or inputs.image)

    def classify(self, embeddings: Tensor, text: Tensor,
                 scale: float) -> Tensor:
        """Compute logits of embeddings for text and "no object".

        Args:
            embeddings (Tensor): Shape (N, Q, D).
            text (Tensor): Unit rows with shape (K, D).
            scale (float): CLIP's factor.

        Returns:
            Tensor: Logits with shape (N, Q, K + 1).
        """
        text = text.to(embeddings)
        nothing = F.normalize(self.no_object.to(text), dim=0)
        with torch.autocast(embeddings.device.type, enabled=False):
            return scale * embeddings @ torch.cat([text, nothing[None]]).T

    def balanced(self, found: MaskEmbeddings, scale: float) -> Tensor:
        """Compute balanced class probabilities of masks from all embeddings.

        Args:
            found (MaskEmbeddings): The masks.
            scale (float): CLIP's factor.

        Returns:
            Tensor: Probabilities of the classes of inference with shape
            (N, Q, K'); they sum to 1 minus the probability of "no object".
        """
        text, seen = self.text.vocabulary()
        logits = [
            self.classify(embeddings, text, scale)
            for embeddings in (found.supervised, found.attention, found.frozen)
        ]
        no_object = logits[0].softmax(dim=2)[..., -1:]
        # "No object" is not learned for the frozen embedding.
        supervised, attention, frozen = (
            x[..., :-1].softmax(dim=2) for x in logits)
        probs = 1e-8 + balance_probabilities(supervised, attention, frozen,
                                             seen, **self.balance)
        return (1 - no_object) * probs / probs.sum(dim=2, keepdim=True)

    def forward(self,
                inputs: FusedFeatures,
                size: Optional[Tuple[int, int]] = None) -> Tensor:
        """Score the classes of inference at each pixel.

        Args:
            inputs (FusedFeatures): Features of the neck.
            size (tuple[int, int], optional): Height and width of the scores.
                Defaults to None: those of the images.

        Returns:
            Tensor: Scores with shape (N, K', H, W), not negative; for one
            class the logit of its score.
        """
        found = self.embed_masks(inputs, size)
        scores = self.mask_scores(
            found, self.balanced(found, inputs.clip.logit_scale))
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
        supervised = [
            self.embedder.supervised(masks, inputs.pixels) for masks in decoded
        ]
        attention = self.embedder.attention(decoded, inputs.pixels,
                                            inputs.clip)
        layers = [
            LayerPrediction(
                self.classify(by_pixels, text, scale),
                self.classify(by_clip, text, scale),
                queries.masks) for by_pixels, by_clip, queries in zip(
                    supervised, attention, decoded)
        ]
        labels = torch.cat([s.gt_sem_seg.data for s in batch_data_samples])
        height, width = (
            p - i for p, i in zip(padded_size(inputs.image), inputs.image))
        labels = F.pad(labels, (0, width, 0, height), value=self.ignore_index)
        return self.criterion(
            layers,
            supervised[-1],
            text,
            labels,
            ignore_index=self.ignore_index)

    def predict(self, inputs: FusedFeatures, batch_img_metas: List[dict],
                test_cfg: ConfigType) -> Tensor:
        """Score the classes at each pixel of the image.

        Args:
            inputs (FusedFeatures): Features of the neck.
            batch_img_metas (list[dict]): With ``ori_shape`` and
                ``img_shape``.
            test_cfg (dict): Not used.

        Returns:
            Tensor: Scores with shape (N, K', H, W), see :meth:`forward`. H
            and W are the size of the file, so that mask logits are resized
            once; that of the images where they slide over it, are padded, or
            are of files of different sizes.
        """
        scores = self.forward(inputs, _output_size(batch_img_metas))
        return self.predict_by_feat(scores, batch_img_metas)

    def predict_by_feat(self, scores: Tensor,
                        batch_img_metas: List[dict]) -> Tensor:
        """Resize scores to the output size.

        Args:
            scores (Tensor): Shape (N, K', h, w).
            batch_img_metas (list[dict]): See :meth:`predict`.

        Returns:
            Tensor: Scores with shape (N, K', H, W).
        """
        return resize(
            scores,
            size=_output_size(batch_img_metas),
            mode='bilinear',
            align_corners=self.align_corners)


def _output_size(metas: List[dict]) -> Tuple[int, int]:
    """Height and width of scores, see :meth:`EBSegHead.predict`."""
    size = metas[0]['img_shape']
    if isinstance(size, torch.Size):  # set by sliding windows
        return size[0], size[1]
    padding = metas[0].get('img_padding_size', metas[0].get('padding_size'))
    files = {tuple(meta['ori_shape'][:2]) for meta in metas}
    if any(padding or ()) or len(files) > 1:
        return tuple(metas[0].get('pad_shape', size)[:2])
    return files.pop()
