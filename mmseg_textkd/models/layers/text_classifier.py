# Copyright (c) mmseg_textkd contributors. All rights reserved.
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Sequence, Set

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..new_words import NEW_WORDS
from .logit_scale import LogitScale
from .similarity import pixel_text_similarity
from .spatial_regularization import SpatialRegularization
from .text_branch import TextBranch
from .text_fusion import CANNOT_FOLD

# Softmax gives exactly 0 in float32, and resizing no NaN as of infinity.
UNSEEN_LOGIT = -1e4


@MODELS.register_module()
class TextClassifier(TextBranch):
    r"""Classifier of pixels by their similarity to the text of the classes.

    It takes the place of a head's ``conv_seg`` and is called as that is:

    .. math::
        z_k = s \langle \mathrm{norm}(P f), t_k \rangle + b_k

    With ``norm='bn'`` this is affine in the features in evaluation mode, and
    :meth:`as_conv` gives the one 1x1 convolution that computes the same.
    With ``norm='l2'`` it is the cosine classifier of `LSeg
    <https://arxiv.org/abs/2201.03546>`_, equation 1, which does not fold.
    With ``norm='l2'`` and ``regularization`` it is LSeg's whole head.

    Classes that are ``unseen`` take no part in training: neither their text
    nor their logits are computed, so that the softmax is one over the seen
    classes, the regularization mixes none but these, and no gradient depends
    on what is unseen. In evaluation mode all classes are equal.

    Args:
        in_channels (int): Channels C of the head's features.
        num_classes (int): Number of classes K.
        text (dict): Config of the :class:`TextProvider`.
        norm (str): Norm of the pixel embeddings: 'bn', 'l2' or 'none'.
            Defaults to 'bn'.
        norm_cfg (dict, optional): Config of the batch norm. Defaults to
            None: BN.
        scale (dict, optional): Arguments of :class:`LogitScale`. Defaults to
            None: learned, from 1 with a batch norm (whose embeddings have a
            length of about ``D ** 0.5``) and from 1 / 0.07 without.
        bias (bool): Whether each class has a bias. Defaults to True.
        fusion (dict, optional): Config of a :class:`TextFusion`. Defaults to
            None.
        regularization (dict, optional): Arguments of
            :class:`SpatialRegularization`, whose blocks then follow the
            logits. They keep the classifier from folding. Defaults to None:
            no blocks.
        unseen (Sequence[int], optional): Indices of the classes without
            labels in training (``HideClasses``), for zero-shot protocols.
            Defaults to None: none.
        project (bool): Whether features are projected before the norm; if
            not, they must have the width of the class embeddings. Defaults
            to True.
        binary (bool): Whether two classes have one logit, that of the second
            minus that of the first, whose sigmoid is the softmax of both.
            Defaults to False.

    Raises:
        ValueError: If ``binary`` does not fit the rest, or ``unseen`` does
            not fit, or comes with a bias, which nothing would learn for these
            classes, or with a fusion, whose tokens include their names.
    """

    def __init__(self,
                 in_channels: int,
                 num_classes: int,
                 text: dict,
                 norm: str = 'bn',
                 norm_cfg: Optional[dict] = None,
                 scale: Optional[dict] = None,
                 bias: bool = True,
                 fusion: Optional[dict] = None,
                 regularization: Optional[dict] = None,
                 unseen: Optional[Sequence[int]] = None,
                 project: bool = True,
                 binary: bool = False) -> None:
        super().__init__(in_channels, num_classes, text, norm, norm_cfg,
                         fusion, project)
        if scale is None:
            scale = dict(init=1. if norm == 'bn' else 1 / 0.07)
        self.scale = LogitScale(**scale)
        # Not called `bias`: a stock checkpoint has a `conv_seg.bias` of this
        # shape, which must not slip in beside an untrained projection.
        self.logit_bias = None
        if bias:
            self.logit_bias = nn.Parameter(torch.zeros(num_classes))
        self.regularization = None
        if regularization is not None:
            self.regularization = SpatialRegularization(**regularization)
        self.num_classes = num_classes
        self.binary = binary
        if binary and (num_classes != 2 or norm == 'l2' or fusion is not None
                       or regularization is not None or unseen):
            raise ValueError(
                'one logit for two classes (out_channels=1) goes neither with '
                "another number of classes nor with norm='l2', `fusion`, "
                '`regularization` or `unseen`; leave `out_channels` of the '
                'head unset to have a logit for each.')
        self.unseen = tuple(unseen or ())
        if self.unseen:
            self._set_unseen(bias)

    def _set_unseen(self, bias: bool) -> None:
        seen = [k for k in range(self.num_classes) if k not in self.unseen]
        if not seen or len(seen) + len(set(self.unseen)) != self.num_classes:
            raise ValueError('`unseen` must be some of the classes 0 to '
                             f'{self.num_classes - 1}, and not all, but got '
                             f'{list(self.unseen)}.')
        if bias:
            raise ValueError(
                'a bias of an unseen class would stay 0 while those of the '
                'seen ones are learned; set bias=False beside `unseen`.')
        if self.fusion is not None:
            raise ValueError(
                f'{type(self.fusion).__name__} lets all class names take part '
                'in training, also those of `unseen` classes; leave one of '
                'them out.')
        # It follows from the config and is not in checkpoints.
        self.register_buffer('seen', torch.tensor(seen), persistent=False)

    def forward(self, feat: Tensor) -> Tensor:
        """Classify each pixel.

        Args:
            feat (Tensor): Features with shape (N, C, H, W).

        Returns:
            Tensor: Logits, float32 or wider, with shape (N, K, H, W), or
            (N, 1, H, W) if binary.
        """
        text = self.text(feat.shape[0])
        if self.fusion is not None and self.fuses_at_inference:
            self.fusion.check_text(text)
            return self.fusion.classify(self, feat, text)
        return self.classify(self.projection(feat), text)

    @property
    def default_new_words(self) -> str:
        """str: 'unit', which is measured, where logits are linear in the
        pixel embeddings, else that of cosines.
        """
        linear = self.projection.norm != 'l2'
        return NEW_WORDS[0] if linear else super().default_new_words

    @property
    def left_out(self) -> Dict[str, Any]:
        """dict: Attributes, with their values in the folded network, of what
        a fold leaves out.
        """
        return {}

    @property
    def fuses_at_inference(self) -> bool:
        """bool: Whether the logits depend on a fusion."""
        return self.fusion is not None and self.fusion.used_at_inference

    def classify(self,
                 embeddings: Tensor,
                 text: Tensor,
                 products: Optional[Tensor] = None) -> Tensor:
        """Compare pixel embeddings with class embeddings.

        Args:
            embeddings (Tensor): Pixel embeddings, shape (N, D, H, W).
            text (Tensor): Class embeddings with unit rows, shape (K, D) or,
                for each image its own, (N, K, D).
            products (Tensor, optional): Added to the similarities before the
                scale, shape (N, K, H, W). Defaults to None.

        Returns:
            Tensor: Logits, float32 or wider, with shape (N, K, H, W).
        """
        seen_only = self.training and self.unseen
        if seen_only:
            text = self.seen_text(text)
        # Under AMP too: half precision does not resolve class names whose
        # cosines differ in the third digit.
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            scale = self.scale()
            weight = (scale * text).to(dtype)
            logits = pixel_text_similarity(embeddings.to(dtype), weight)
            if products is not None:
                logits = logits + (scale * products).to(dtype)
            if self.logit_bias is not None:
                logits = logits + self.logit_bias.to(dtype)[:, None, None]
            if self.regularization is not None:
                logits = self.regularization(logits)
        if self.binary:
            logits = logits[:, 1:] - logits[:, :1]
        if seen_only:
            shape = (len(logits), self.num_classes, *logits.shape[2:])
            logits = logits.new_full(shape, UNSEEN_LOGIT).index_copy(
                1, self.seen, logits)
        return logits

    def seen_text(self, text: Tensor) -> Tensor:
        """Select the class embeddings of the seen classes.

        Args:
            text (Tensor): Class embeddings, of a shape that :meth:`classify`
                takes.

        Returns:
            Tensor: Those of the other classes, in their order.
        """
        return text.index_select(-2, self.seen)

    @torch.no_grad()
    def as_conv(self,
                text: Optional[Tensor] = None,
                bias: Optional[Tensor] = None) -> nn.Conv2d:
        r"""Fold the classifier into one stock 1x1 convolution.

        See :meth:`PixelProjection.fold`; the vectors are :math:`s\, T`.

        Args:
            text (Tensor, optional): Embeddings of K' other classes, unit
                rows with shape (K', D). Defaults to None: those of the
                training, with their bias.
            bias (Tensor, optional): Bias of the other classes, shape (K', ).
                Defaults to None: none.

        Returns:
            nn.Conv2d: C -> K (1 if binary) or K', with the dtype of the
            projection.

        Raises:
            RuntimeError: In training mode, in which the batch norm is not
                yet an affine map.
            ValueError: With an L2 norm, which is not affine, with
                regularization blocks, which use more than one pixel, or
                with a fusion that is used at inference.
        """
        if self.training:
            raise RuntimeError('TextClassifier.as_conv() needs evaluation '
                               'mode; call `.eval()` first.')
        if self.fuses_at_inference:
            raise ValueError(f'{type(self.fusion).__name__} {CANNOT_FOLD}')
        if self.projection.norm == 'l2':
            raise ValueError(
                "norm='l2' divides each pixel by its own length and cannot "
                "be folded into a convolution; train with norm='bn', or "
                'deploy unfolded.')
        if self.regularization is not None and self.regularization.depth:
            raise ValueError(
                'spatial regularization blocks use neighboring pixels '
                'and other labels and cannot be folded into a 1x1 '
                'convolution; train without `regularization`, or deploy '
                'unfolded.')
        if text is None:
            text, bias = self.text(), self.logit_bias
            if self.binary:
                text = (text[1:].double() - text[:1])
                bias = None if bias is None else bias[1:] - bias[:1]
        return self.projection.fold(self.scale().double() * text.double(),
                                    bias)


@contextmanager
def as_folded(model: nn.Module) -> Iterator[Set[str]]:
    """Disable what a fold leaves out of the text classifiers of a model.

    Args:
        model (nn.Module): The model.

    Yields:
        set[str]: The attributes of which it is.
    """
    before = {
        m: {
            key: (getattr(m, key), value)
            for key, value in m.left_out.items()
        }
        for m in model.modules() if isinstance(m, TextClassifier)
    }
    for module, values in before.items():
        for key, (_, value) in values.items():
            setattr(module, key, value)
    try:
        yield {key for values in before.values() for key in values}
    finally:
        for module, values in before.items():
            for key, (own, _) in values.items():
                setattr(module, key, own)
