# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict, Optional

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from .balance import balance_log_probabilities, check_exponents
from .pixel_projection import PixelProjection
from .similarity import pixel_text_similarity
from .text_classifier import TextClassifier


@MODELS.register_module()
class BalancedTextClassifier(TextClassifier):
    r"""Text classifier balanced with distilled CLIP image embeddings.

    Beside the supervised projection P there is an image projection R of the
    same features. Its output learns to be the image embedding that frozen
    CLIP has at that pixel (:class:`ImageEmbeddingDistillationLoss`), with
    labels or without. With the probabilities

    .. math::
        a = \mathrm{softmax}(z), \quad
        d = \mathrm{softmax}(s_{CLIP} \langle R f, t_k \rangle), \quad
        p_k = a_k^{1 - \lambda_k} d_k^{\lambda_k}

    and :math:`\lambda_k = \alpha` for a class seen in training, else
    :math:`\beta`, the scores :math:`\log p_k` take the place of the logits z.
    Both projections are affine in evaluation mode: it is one 1x1 convolution
    more (:class:`BalancedConvSeg`).

    Training is that of :class:`TextClassifier`. So is evaluation where no
    class is ``unseen``, or with both exponents 0; and :meth:`as_conv`, what a
    release is made of, is the supervised part alone. Classes that are named
    after the training come by :class:`TextSegInferencer`.

    Source: `EBSeg <https://arxiv.org/abs/2406.09829>`_, there for masks and
    with a third embedding. The defaults are the exponents of its ViT-B/16
    without the 0.7 of that one, brought back to a sum of 1: 0.09 / 0.3 and
    0.3 / 0.3.

    Args:
        in_channels (int): Channels C of the head's features.
        num_classes (int): Number of classes K.
        text (dict): Config of the :class:`TextProvider`, of CLIP's text.
        norm (str): Norm of the supervised projection: 'bn', 'l2' or 'none'.
            Defaults to 'bn'.
        norm_cfg (dict, optional): Config of the batch norms. Defaults to
            None: BN.
        balance (dict, optional): Exponents ``alpha`` and ``beta``. Defaults
            to None: 0.3 and 1.0.
        clip_scale (float): CLIP's own factor :math:`s_{CLIP}` on cosines.
            Defaults to 100.0, that of all of OpenAI's models.
        **kwargs: As of :class:`TextClassifier`.

    Raises:
        ValueError: If the exponents are no weights of a mean, the scale is
            not positive, or a fusion is used at inference.
    """

    def __init__(self,
                 in_channels: int,
                 num_classes: int,
                 text: dict,
                 norm: str = 'bn',
                 norm_cfg: Optional[dict] = None,
                 balance: Optional[Dict[str, float]] = None,
                 clip_scale: float = 100.,
                 **kwargs) -> None:
        super().__init__(in_channels, num_classes, text, norm, norm_cfg,
                         **kwargs)
        self.balance = dict(dict(alpha=0.3, beta=1.), **(balance or {}))
        check_exponents(**self.balance, gamma=0.)
        if not clip_scale > 0:
            raise ValueError(
                f'`clip_scale` must be positive, but got {clip_scale}.')
        if self.fuses_at_inference:
            raise ValueError(
                f'a {type(self.fusion).__name__} that is used at inference '
                'and a balance exclude each other: its logits are of other '
                'text for each image. Leave one of them out.')
        self.clip_scale = clip_scale
        # A batch norm whatever that of P is: least squares by SGD on features
        # of any length would diverge without.
        self.image_projection = PixelProjection(in_channels, self.text.dim,
                                                'bn', norm_cfg)
        self._set_start()

    def _set_start(self) -> None:
        """Set the gain to unit length, which CLIP's embeddings have."""
        nn.init.constant_(self.image_projection.bn.weight, self.text.dim**-.5)

    def init_weights(self) -> None:
        """Initialize the weights, after those of all layers of the head."""
        super().init_weights()
        self._set_start()

    @property
    def default_new_words(self) -> str:
        """str: Raw, as with the cosines of its image projection."""
        return 'raw'

    @property
    def left_out(self) -> Dict[str, Any]:
        """dict: No balance, which needs the plugin."""
        return dict(balance=dict(alpha=0., beta=0.)) if self.balanced else {}

    @property
    def balanced(self) -> bool:
        """bool: Whether evaluation differs from :class:`TextClassifier`."""
        return bool(self.unseen) and any(self.balance.values())

    def forward(self, feat: Tensor) -> Tensor:
        """Classify each pixel.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).

        Returns:
            Tensor: Logits or, in evaluation mode and with classes that are
            unseen, balanced scores, float32 or wider, shape (N, K, H, W).
        """
        logits = super().forward(feat)
        if self.training or not self.balanced:
            return logits
        images = self.image_projection(feat)
        with torch.autocast(feat.device.type, enabled=False):
            text = (self.clip_scale * self.text()).to(logits)
            return balance_log_probabilities(
                logits.log_softmax(dim=1),
                pixel_text_similarity(images.to(logits),
                                      text).log_softmax(dim=1),
                self.seen_in_training(), **self.balance)

    def seen_in_training(self) -> Tensor:
        """Get the mask of the classes with labels in training.

        Returns:
            Tensor: Bool with shape (K, ).
        """
        return torch.tensor(
            [k not in self.unseen for k in range(self.num_classes)],
            device=self.text.class_embeddings.device)

    def image_conv(self, text: Optional[Tensor] = None) -> nn.Conv2d:
        """Fold image projection, text and CLIP's scale into a 1x1 convolution.

        Args:
            text (Tensor, optional): Embeddings of K' other classes, unit
                rows with shape (K', D). Defaults to None: those of the
                training.

        Returns:
            nn.Conv2d: C -> K or K': CLIP's logits, as far as distilled.

        Raises:
            RuntimeError: In training mode.
        """
        if self.training:
            raise RuntimeError('BalancedTextClassifier.image_conv() needs '
                               'evaluation mode; call `.eval()` first.')
        text = self.text() if text is None else text
        return self.image_projection.fold(self.clip_scale * text.double())
