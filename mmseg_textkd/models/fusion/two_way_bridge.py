# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, Optional, Tuple

import torch
from mmcv.cnn import DepthwiseSeparableConvModule
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers import (TextBranch, TextClassifier, TextFusion,
                      pixel_text_similarity, text_of_batch)
from ..losses.logit_distillation_loss import pixel_divergence
from .two_way_block import TwoWayBlock


@MODELS.register_module()
class TwoWayBridge(TextFusion):
    r"""Fusion by convolutions and a text transformer with two-way bridges.

    A narrow copy v of the head's features and a token for each class go
    through ``num_blocks`` :class:`TwoWayBlock`. What comes out is added to
    both sides of the similarity, by gates that start at zero:

    .. math::
        t'_k = t_k + g_t \odot A \tau_k, \quad
        e'_p = e_p + g_e \odot U v_p, \quad
        z_{pk} = s \langle e'_p, t'_k \rangle + b_k

    U only ever meets :math:`t'_k`, so that :math:`\langle g_e \odot U v_p,
    t'_k \rangle` is computed as a product of width d: no further map of
    width D is made. In evaluation mode :math:`\langle e_p, t'_k \rangle` is
    taken to the width of the features likewise.

    With ``use='training'`` the fused logits learn by cross entropy
    (``loss_bridge_ce``) and teach the head's classifier, which is what is
    deployed (``loss_bridge_kl``). With ``use='inference'`` they are the
    head's logits.

    Source: `CLIP for Lightweight Semantic Segmentation
    <https://arxiv.org/abs/2310.07394>`_, which gives the idea of parallel
    branches and the two-way bridge but neither sizes nor code; those here
    are ours.

    Args:
        in_channels (int): Channels C of the head's features.
        dim (int): Width D of the text embeddings.
        use (str): 'training' or 'inference'. Defaults to 'training'.
        width (int): Width d of the branches. Defaults to 128.
        num_blocks (int): Number of blocks. Defaults to 2.
        num_heads (int): Heads of the attentions. Defaults to 4.
        ffn_ratio (int): Hidden width of the FFN over d. Defaults to 2.
        stride (int): 1, or 2 to work at half the resolution of the features.
            Defaults to 2.
        norm_cfg (dict, optional): Norm of the convolutions. Defaults to
            None: BN.
        ce_weight (float): Weight of the cross entropy. Defaults to 0.4.
        kl_weight (float): Weight of the distillation. Defaults to 1.0.
        temperature (float): Temperature of the distillation. Defaults to 1.0.
        detach_teacher (bool): Whether the distillation leaves the fused
            logits alone. Defaults to True.
        num_classes (int, optional): Not used: it takes any number. The head
            passes its own.

    Raises:
        ValueError: If the arguments do not fit each other.
    """

    needs_classifier = True

    def __init__(self,
                 in_channels: int,
                 dim: int,
                 use: str = 'training',
                 width: int = 128,
                 num_blocks: int = 2,
                 num_heads: int = 4,
                 ffn_ratio: int = 2,
                 stride: int = 2,
                 norm_cfg: Optional[dict] = None,
                 ce_weight: float = 0.4,
                 kl_weight: float = 1.0,
                 temperature: float = 1.0,
                 detach_teacher: bool = True,
                 num_classes: Optional[int] = None) -> None:
        super().__init__(use)
        if width % num_heads or stride not in (1, 2) or num_blocks < 1:
            raise ValueError(
                'TwoWayBridge needs num_heads that divide width, stride 1 or '
                f'2 and at least one block, but got width={width}, '
                f'num_heads={num_heads}, stride={stride}, '
                f'num_blocks={num_blocks}.')
        if min(ce_weight, kl_weight) < 0 or temperature <= 0:
            raise ValueError(
                'loss weights must not be negative and the temperature must '
                f'be positive, but got ce_weight={ce_weight}, '
                f'kl_weight={kl_weight}, temperature={temperature}.')
        if not self.used_at_inference and not ce_weight:
            raise ValueError(
                "TwoWayBridge with use='training' and ce_weight=0 would never "
                'learn what it is to teach; give a positive `ce_weight`.')
        self.ce_weight = ce_weight
        self.kl_weight = kl_weight
        self.temperature = temperature
        self.detach_teacher = detach_teacher
        self.pixels_in = DepthwiseSeparableConvModule(
            in_channels,
            width,
            3,
            stride=stride,
            padding=1,
            norm_cfg=norm_cfg or dict(type='BN'))
        self.text_in = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            TwoWayBlock(width, num_heads, ffn_ratio, norm_cfg)
            for _ in range(num_blocks))
        self.text_out = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, dim))
        self.pixels_out = nn.Linear(width, dim, bias=False)
        # Not convolutions, which some stock heads initialize wherever they
        # find them.
        self.text_gate = nn.Parameter(torch.zeros(dim))
        self.pixel_gate = nn.Parameter(torch.zeros(dim))

    def forward(self, feat: Tensor, text: Tensor) -> Tuple[Tensor, Tensor]:
        """Fuse features and text.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D). Of
                several phrases a class (4 axes) their mean is taken.

        Returns:
            tuple[Tensor, Tensor]: Class embeddings of each image, shape
            (N, K, D), and their inner products with what the pixel
            embeddings gain, shape (N, K, H, W); float32 or wider.
        """
        if text.dim() == 4:
            text = text_of_batch(text)
        pixels = self.pixels_in(feat)
        tokens = self.text_in(text).expand(len(feat), -1, -1)
        for block in self.blocks:
            pixels, tokens = block(pixels, tokens)
        gain = self.text_out(tokens)
        with torch.autocast(feat.device.type, enabled=False):
            dtype = torch.promote_types(feat.dtype, torch.float32)
            text = text.to(dtype) + self.text_gate.to(dtype) * gain.to(dtype)
            narrow = (text * self.pixel_gate.to(dtype)
                      ) @ self.pixels_out.weight.to(dtype)
            products = pixel_text_similarity(pixels.to(dtype), narrow)
            if products.shape[2:] != feat.shape[2:]:
                # Resizing is linear: better K maps than d.
                products = resize(
                    products,
                    size=feat.shape[2:],
                    mode='bilinear',
                    align_corners=False,
                    warning=False)
        return text, products

    def classify(self, classifier: TextClassifier, feat: Tensor,
                 text: Tensor) -> Tensor:
        """Classify each pixel with the fusion.

        Args:
            classifier (TextClassifier): The classifier that has it.
            feat (Tensor): Features with shape (N, C, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).

        Returns:
            Tensor: Logits, float32 or wider, with shape (N, K, H, W).
        """
        text, products = self(feat, text)
        projection = classifier.projection
        if self.training or projection.norm == 'l2':
            return classifier.classify(projection(feat), text, products)
        # Affine now: K vectors go back to C channels rather than all pixels
        # on to D.
        weight, shift = projection.affine(text.dtype)
        products = products + (text @ shift)[..., None, None]
        return classifier.classify(feat, text @ weight, products)

    def loss(self, branch: TextBranch, feat: Tensor, embeddings: Tensor,
             text: Tensor, logits: Tensor, labels: Tensor,
             ignore_index: int) -> Dict[str, Tensor]:
        """Compute the losses of ``use='training'``.

        Args:
            branch (TextClassifier): The classifier that has it.
            feat (Tensor): Features with shape (N, C, H, W).
            embeddings (Tensor): Pixel embeddings, shape (N, D, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).
            logits (Tensor): Logits of the head's own classifier, shape
                (N, K, H, W).
            labels (Tensor): Long tensor with shape (N, H, W).
            ignore_index (int): Label of the pixels that are left out.

        Returns:
            dict[str, Tensor]: Scalars by their name in the log; none with
            ``use='inference'``, where the head's losses suffice.
        """
        if self.used_at_inference:
            return {}
        fused = branch.classify(embeddings, *self(feat, text))
        ce = self.cross_entropy(fused, labels, ignore_index)
        losses = dict(loss_bridge_ce=self.ce_weight * ce)
        if self.kl_weight:
            teacher = fused.detach() if self.detach_teacher else fused
            with torch.autocast(teacher.device.type, enabled=False):
                kl = pixel_divergence(
                    logits.to(teacher.dtype), teacher, labels != ignore_index,
                    self.temperature)
            losses['loss_bridge_kl'] = self.kl_weight * kl
        return losses
