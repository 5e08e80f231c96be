# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
import os
from typing import Any, List, Mapping, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmseg_textkd.deploy import L2ConvSeg
from mmseg_textkd.deploy.balanced_conv_seg import fold_balanced
from mmseg_textkd.deploy.l2_conv_seg import fuse_l2
from mmseg_textkd.models import (BalancedTextClassifier, TextClassifier,
                                 TextHeadMixin)
from mmseg_textkd.models.layers import pixel_text_similarity
from mmseg_textkd.models.text_providers import ClassEmbeddings
from .label_maps import select_classes
from .open_classifier import NewClasses, OpenClassifier
from .word_encoder import WordEncoder


class TextHeadClassifier(OpenClassifier):
    """A trained text classifier into which any class vectors can be folded.

    In the role 'auxiliary' the head's own classifier knows no text. It stays
    until there are other classes. Then that of the text branch, which the
    alignment loss has trained, is taken: the cosine, which is kept as
    :class:`L2ConvSeg`.

    Args:
        model (nn.Module): The segmentor, whose head is a
            :class:`TextHeadMixin`.
        text (Mapping): The config of its text provider.
        names (Sequence[str]): The classes that it was trained with.
        cache_dir (str or PathLike, optional): Folder of the cache of vectors.
            Defaults to None, see :func:`.text_cache.default_cache_dir`.
    """

    def __init__(self,
                 model: nn.Module,
                 text: Mapping[str, Any],
                 names: Sequence[str],
                 cache_dir: Optional[Union[str, os.PathLike]] = None) -> None:
        super().__init__(model, names)
        head = model.decode_head
        branch = head.text
        self.words = WordEncoder(branch.text, text, names, cache_dir)
        self.vectors = branch.text.class_embeddings.detach().clone()
        self.projection = branch.projection
        if head.role == 'classifier':
            self.classifier = branch
        else:
            self.classifier = _of_branch(head)
        bias = self.classifier.logit_bias
        if bias is None:
            bias = self.projection.conv.weight.new_zeros(
                self.classifier.text.num_classes)
        self.bias = bias.detach().clone()
        if head.role == 'classifier':
            head.conv_seg = self.fold(self.vectors)

    def encode(self, classes: Any, **how: Any) -> NewClasses:
        """Find vectors, see :meth:`WordEncoder.encode`."""
        return self.words.encode(classes, **how)

    def take(self, found: NewClasses, new_bias: float = 0.) -> None:
        """Fold the vectors in."""
        conv = self.fold(found.vectors, found.trained, new_bias)
        self.install(conv, len(found.names))
        self.vectors = found.vectors

    def select(self, rows: Tensor) -> nn.Module:
        """Take some rows of the present classifier."""
        return select_classes(self.model.decode_head.conv_seg, rows)

    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """Compare the projection of a pixel with the vectors."""
        return PixelTextCosine(self.projection, self.vectors[rows])

    @torch.no_grad()
    def fold(self,
             vectors: Tensor,
             trained: Optional[List[Optional[int]]] = None,
             new_bias: float = 0.) -> nn.Module:
        """Make the classifier of a stock head.

        A trained class keeps its bias. A new one gets the mean of all biases,
        so that a bias that is common to all, which no softmax sees, favours
        neither. (Cross entropy leaves that mean where it began, at 0: the
        gradients of the biases sum to 0.) ``new_bias`` is added to it, as in
        `calibrated stacking <https://arxiv.org/abs/1605.04253>`_: the
        training has taught the network to prefer the trained classes.

        Args:
            vectors (Tensor): Class vectors, shape (K, D).
            trained (list[int | None], optional): For each class the number
                that it had in the training, None for a new one. None: the
                trained classes. Defaults to None.
            new_bias (float): What is added to the logits of new classes.
                Defaults to 0.

        Returns:
            nn.Module: A convolution or, with an L2 norm, a
            :class:`L2ConvSeg`; of a :class:`BalancedTextClassifier` and
            classes that had no labels, a :class:`BalancedConvSeg` of either.
        """
        classifier, (number, dim) = self.classifier, vectors.shape
        text = ClassEmbeddings(file='', num_classes=number, dim=dim)
        text.load_state_dict(dict(class_embeddings=vectors))
        classifier.text = text.to(vectors).eval()
        bias = self.bias
        if trained is not None:
            bias = (self.bias.mean() + new_bias).repeat(number)
            for k, own in enumerate(trained):
                if own is not None:
                    bias[k] = self.bias[own]
        classifier.logit_bias = nn.Parameter(bias)
        if classifier.projection.norm != 'l2':
            folded = classifier.as_conv()
        else:
            conv = classifier.projection.conv
            folded = L2ConvSeg(conv.in_channels, number, dim).to(conv.weight)
            if classifier.regularization is not None:
                # The same for any number of classes.
                folded.regularization = copy.deepcopy(
                    classifier.regularization)
            folded.load_state_dict(fuse_l2(classifier))
        if not isinstance(classifier, BalancedTextClassifier):
            return folded
        seen = [
            own is not None and own not in classifier.unseen
            for own in (range(number) if trained is None else trained)
        ]
        return fold_balanced(classifier, folded, seen)


class PixelTextCosine(nn.Module):
    """Cosine of every pixel embedding with some class vectors.

    Args:
        projection (nn.Module): Projection into the space of text.
        vectors (Tensor): Unit rows with shape (n, D).
    """

    def __init__(self, projection: nn.Module, vectors: Tensor) -> None:
        super().__init__()
        self.projection = projection
        self.vectors = vectors

    def forward(self, feat: Tensor) -> Tensor:
        """Compute cosines of shape (N, n, H, W) from features."""
        embeddings = F.normalize(self.projection(feat).float(), dim=1)
        return pixel_text_similarity(embeddings, self.vectors.float())


@torch.no_grad()
def _of_branch(head: TextHeadMixin) -> TextClassifier:
    """The cosine classifier that the losses of a text branch have trained."""
    branch = head.text
    scales = [
        loss.scale().item() for loss in head.text_losses
        if hasattr(loss, 'scale')
    ]
    conv = branch.projection.conv
    classifier = TextClassifier(
        conv.in_channels,
        branch.text.num_classes,
        dict(type='ClassEmbeddings', file='', dim=branch.text.dim),
        norm='l2',
        scale=dict(init=scales[0]) if scales else None,
        bias=False).to(conv.weight).eval()
    linear = TextClassifier(
        conv.in_channels,
        branch.text.dim,
        dict(type='ControlEmbeddings', kind='onehot', dim=branch.text.dim),
        norm='none',
        scale=dict(init=1.),
        bias=False).to(conv.weight).eval()
    linear.projection = branch.projection
    if branch.projection.norm == 'l2':
        classifier.projection.load_state_dict(branch.projection.state_dict())
    else:
        # With one-hot text the fold is the projection with its norm.
        classifier.projection.conv.load_state_dict(
            linear.as_conv().state_dict())
    return classifier
