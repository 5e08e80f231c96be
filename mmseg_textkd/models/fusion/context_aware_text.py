# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, Optional

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers import (TextBranch, TextClassifier, TextFusion,
                      pixel_text_similarity, text_of_batch)


@MODELS.register_module()
class ContextAwareText(TextFusion):
    r"""Context-aware prompting of DenseCLIP, with its score map.

    A decoder lets the class embeddings attend to the features; what it finds
    is added with a small learned factor, and the pixels are compared with
    the result, without a temperature:

    .. math::
        t'_k = t_k + \gamma \odot \mathrm{decoder}(t, F)_k, \quad
        m_{pk} = \cos(e_p, t'_k)

    The score map m learns by the cross entropy of m / 0.07
    (``loss_context_ce``), its only use with ``use='training'``.
    With ``use='inference'`` it is also an input of the classifier. The
    classifier is linear, so that to concatenate m to the features is to add
    a linear map of m to the logits:

    .. math:: z_{pk} = s (\langle e_p, t_k \rangle + (V m_p)_k) + b_k

    V, of K x K weights, starts at zero. It is the only part that is tied to
    the number of classes.

    Source: `DenseCLIP <https://arxiv.org/abs/2112.01518>`_, sections 3.2 and
    3.3 (post-model prompting); widths, layers, heads, dropout, gamma,
    temperature and loss weight are those of its released code. The text
    itself comes from the head's provider: its tower is frozen, and in stage
    2 its prompts get their gradient through the decoder too.

    Args:
        in_channels (int): Channels C of the head's features.
        dim (int): Width D of the text embeddings.
        num_classes (int): Number of classes K.
        use (str): 'training' or 'inference'. Defaults to 'training'.
        width (int): Width of the decoder. Defaults to 256.
        num_layers (int): Layers of the decoder. Defaults to 3.
        num_heads (int): Heads of the decoder. Defaults to 4.
        dropout (float): Dropout in the decoder. Defaults to 0.1.
        stride (int): Features are averaged over squares of this size before
            the text attends to them: 4 brings maps of 1/8 to DenseCLIP's
            1/32. Defaults to 4.
        gamma (float): Start value of the factor. Defaults to 1e-4.
        temperature (float): Temperature in the loss. Defaults to 0.07.
        loss_weight (float): Weight of the loss. Defaults to 0.4.
        norm_cfg (dict, optional): Not used: the decoder has layer norms. The
            head passes its own.

    Raises:
        ValueError: If the arguments do not fit each other.
    """

    def __init__(self,
                 in_channels: int,
                 dim: int,
                 num_classes: int,
                 use: str = 'training',
                 width: int = 256,
                 num_layers: int = 3,
                 num_heads: int = 4,
                 dropout: float = 0.1,
                 stride: int = 4,
                 gamma: float = 1e-4,
                 temperature: float = 0.07,
                 loss_weight: float = 0.4,
                 norm_cfg: Optional[dict] = None) -> None:
        super().__init__(use)
        if width % num_heads or stride < 1 or num_layers < 1:
            raise ValueError(
                'ContextAwareText needs num_heads that divide width, a '
                'positive stride and at least one layer, but got '
                f'width={width}, num_heads={num_heads}, stride={stride}, '
                f'num_layers={num_layers}.')
        if temperature <= 0 or loss_weight <= 0:
            raise ValueError(
                'temperature and loss_weight must be positive, but got '
                f'temperature={temperature}, loss_weight={loss_weight}.')
        self.stride = stride
        self.temperature = temperature
        self.loss_weight = loss_weight
        self.memory_in = nn.Sequential(
            nn.LayerNorm(in_channels), nn.Linear(in_channels, width),
            nn.LayerNorm(width))
        self.text_in = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        # Not nn.TransformerDecoder, whose layers all start as one.
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                num_heads,
                4 * width,
                dropout,
                activation='gelu',
                batch_first=True,
                norm_first=True) for _ in range(num_layers))
        self.text_out = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, dim))
        self.gamma = nn.Parameter(torch.full((dim, ), gamma))
        self.score_weight = None
        if self.used_at_inference:
            self.score_weight = nn.Parameter(
                torch.zeros(num_classes, num_classes))

    def forward(self, feat: Tensor, text: Tensor) -> Tensor:
        """Update the text by cross-attention to the image.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D). Of
                several phrases a class (4 axes) their mean is taken.

        Returns:
            Tensor: Class embeddings of each image, shape (N, K, D), float32
            or wider.
        """
        if text.dim() == 4:
            text = text_of_batch(text)
        pooled = F.avg_pool2d(feat, self.stride, ceil_mode=True)
        memory = torch.cat(
            [feat.mean(dim=(2, 3))[..., None],
             pooled.flatten(2)], dim=2)
        memory = self.memory_in(memory.transpose(1, 2))
        tokens = self.text_in(text).expand(len(feat), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, memory)
        dtype = torch.promote_types(feat.dtype, torch.float32)
        gain = self.text_out(tokens).to(dtype)
        return text.to(dtype) + self.gamma.to(dtype) * gain

    def score(self, embeddings: Tensor, feat: Tensor, text: Tensor) -> Tensor:
        """Compute the score map of pixels and updated text.

        Args:
            embeddings (Tensor): Pixel embeddings, shape (N, D, H, W).
            feat (Tensor): Features with shape (N, C, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).

        Returns:
            Tensor: Cosines, float32 or wider, with shape (N, K, H, W).
        """
        text = self(feat, text)
        with torch.autocast(feat.device.type, enabled=False):
            return pixel_text_similarity(
                F.normalize(embeddings.to(text.dtype), dim=1),
                F.normalize(text, dim=2))

    def classify(self, classifier: TextClassifier, feat: Tensor,
                 text: Tensor) -> Tensor:
        """Classify each pixel with the score map as a further input.

        Args:
            classifier (TextClassifier): The classifier that has it.
            feat (Tensor): Features with shape (N, C, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).

        Returns:
            Tensor: Logits, float32 or wider, with shape (N, K, H, W).
        """
        embeddings = classifier.projection(feat)
        score = self.score(embeddings, feat, text)
        assert self.score_weight is not None
        with torch.autocast(feat.device.type, enabled=False):
            added = pixel_text_similarity(score,
                                          self.score_weight.to(score.dtype))
        return classifier.classify(embeddings, text, added)

    def loss(self, branch: TextBranch, feat: Tensor, embeddings: Tensor,
             text: Tensor, logits: Tensor, labels: Tensor,
             ignore_index: int) -> Dict[str, Tensor]:
        """Compute the cross entropy of the score map.

        Args:
            branch (TextBranch): The branch that has it.
            feat (Tensor): Features with shape (N, C, H, W).
            embeddings (Tensor): Pixel embeddings, shape (N, D, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).
            logits (Tensor): Not used.
            labels (Tensor): Long tensor with shape (N, H, W).
            ignore_index (int): Label of the pixels that are left out.

        Returns:
            dict[str, Tensor]: ``loss_context_ce``.
        """
        score = self.score(embeddings, feat, text) / self.temperature
        ce = self.cross_entropy(score, labels, ignore_index)
        return dict(loss_context_ce=self.loss_weight * ce)
