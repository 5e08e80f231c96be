# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Adapters that let each kind of trained network predict new classes."""
import copy
from abc import ABCMeta, abstractmethod
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Sequence

import torch
import torch.nn.functional as F
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_textkd.clip.weights import PathLike
from mmseg_textkd.deploy import L2ConvSeg
from mmseg_textkd.deploy.balanced_conv_seg import fold_balanced
from mmseg_textkd.deploy.l2_conv_seg import fuse_cosine
from mmseg_textkd.models import BalancedTextClassifier, EBSeg, TextHeadMixin
from mmseg_textkd.models.ebseg.mask_embedder import MaskEmbeddings
from mmseg_textkd.models.ebseg.mask_scores import MaskScores, pixel_embeddings
from mmseg_textkd.models.layers import PixelProjection, pixel_text_similarity
from mmseg_textkd.models.layers.text_fusion import CANNOT_FOLD
from mmseg_textkd.models.losses import TextAlignmentLoss
from mmseg_textkd.text import TextEmbeddings, Vocabulary
from .class_encoder import ClassEncoder, EncodedClasses
from .label_maps import select_classes


def build_adapter(model: nn.Module,
                  names: Sequence[str],
                  cache_dir: Optional[PathLike] = None) -> 'NetworkAdapter':
    """Build the adapter of a network.

    Args:
        model (nn.Module): The segmentor, with its weights and its config as
            ``cfg``, in evaluation mode.
        names (Sequence[str]): The classes that it was trained with.
        cache_dir (str or PathLike, optional): See :class:`ClassEncoder`.

    Returns:
        NetworkAdapter: The adapter.

    Raises:
        ValueError: If the classifier does not fold.
    """
    if isinstance(model, EBSeg):
        return EBSegAdapter(model, names, cache_dir)
    if isinstance(model.decode_head, TextHeadMixin):
        return TextHeadAdapter(model, names, cache_dir)
    return FoldedAdapter(model, names)


class NetworkAdapter(metaclass=ABCMeta):
    """Base of the adapters, one for each kind of network.

    Args:
        model (nn.Module): The segmentor.
        names (Sequence[str]): The classes that it was trained with.

    Attributes:
        layer (str): Name of the layer of the head that gives a map for each
            class.
        logits (bool): Whether these are logits, whose softmax are
            probabilities, or scores in [0, 1].
        vectors (Tensor, optional): Vectors of the present classes, shape
            (K, D); None where there is no text.
        binary (bool): Whether the network has, of its present classes, one
            logit, whose sigmoid is compared with the head's threshold.
    """

    layer = 'conv_seg'
    logits = True
    encoder: ClassEncoder

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model, self.names = model, tuple(names)
        self.vectors: Optional[Tensor] = None
        self.binary = self._has_one_logit = model.out_channels == 1

    def encode(self, classes: Any, **options: Any) -> EncodedClasses:
        """Encode classes without changing the network.

        See :meth:`ClassEncoder.encode`.
        """
        return self.encoder.encode(classes, **options)

    @abstractmethod
    def set_classes(self,
                    found: EncodedClasses,
                    new_bias: float = 0,
                    new_words: Optional[str] = None) -> None:
        """Let the network predict encoded classes.

        Args:
            found (EncodedClasses): What :meth:`encode` has returned.
            new_bias (float): Added to the logits of new classes. Defaults
                to 0.
            new_words (str, optional): How the vectors of new classes are
                used, see :func:`.place_new_words`. Defaults to None: what
                fits the kind of the network.

        Raises:
            ValueError: If there is no such bias or way; nothing has changed
                then.
        """

    def stays_binary(self, found: EncodedClasses) -> bool:
        """Whether these classes are those of one logit, in their order.

        Args:
            found (EncodedClasses): What :meth:`encode` has returned.

        Returns:
            bool: True if a threshold decides between them.
        """
        own = list(range(len(self.names)))
        return self._has_one_logit and list(found.trained) == own

    def select(self, rows: Tensor) -> nn.Module:
        """Build the layer of n classes, whose indices may repeat."""
        return select_classes(self.model.decode_head.conv_seg, rows)

    @abstractmethod
    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """Build a layer of the cosines between pixels and n classes.

        Raises:
            ValueError: If the network has no embeddings of pixels.
        """

    def _install(self, layer: nn.Module, number: int) -> None:
        """Set the classification layer of the network."""
        setattr(self.model.decode_head, self.layer, layer)
        for module in (self.model.decode_head, self.model):
            module.num_classes = module.out_channels = number

    @contextmanager
    def replaced(self, layer: nn.Module, number: int) -> Iterator[nn.Module]:
        """Temporarily replace the classification layer; yields the head."""
        head, model = self.model.decode_head, self.model
        before = getattr(head, self.layer), model.out_channels
        setattr(head, self.layer, layer)
        model.out_channels = number
        try:
            yield head
        finally:
            setattr(head, self.layer, before[0])
            model.out_channels = before[1]

    @torch.no_grad()
    def similarities(self, images: Tensor, samples: List[SegDataSample],
                     rows: List[int]) -> List[Tensor]:
        """Compute the cosines between pixels and the text of classes.

        Args:
            images (Tensor): Preprocessed images with shape (N, 3, H, W).
            samples (list[SegDataSample]): Their N samples.
            rows (list[int]): n class indices.

        Returns:
            list[Tensor]: For each image cosines at its own size, shape
            (n, H, W).
        """
        # One map alone would be taken for a binary problem.
        padded = rows if len(rows) > 1 else rows * 2
        copies = [SegDataSample(metainfo=s.metainfo) for s in samples]
        with self.replaced(self.cosine(padded), len(padded)):
            maps = self.model.inference(images, [s.metainfo for s in copies])
            done = self.model.postprocess_result(maps, copies)
        return [s.seg_logits.data[:len(rows)] for s in done]


class TextHeadAdapter(NetworkAdapter):
    """Adapter of a text head, which folds its projection with new vectors.

    In the role 'auxiliary' the head's own classifier does not depend on text.
    Where one of the classes is new, it is replaced by the cosine classifier
    of the text branch, which the alignment loss has trained.
    """

    def __init__(self,
                 model: nn.Module,
                 names: Sequence[str],
                 cache_dir: Optional[PathLike] = None) -> None:
        super().__init__(model, names)
        head = model.decode_head
        self.branch = branch = head.text_branch
        self.encoder = ClassEncoder(branch.text,
                                    model.cfg.model.decode_head.text, names,
                                    cache_dir)
        self.vectors = branch.text.class_embeddings.detach().clone()
        self.bias = self.vectors.new_zeros(len(names))
        self.regularization = None
        self.trained_layer = head.conv_seg
        if head.role == 'auxiliary':
            self.uses_cosine = True
            scales = [
                loss.scale for loss in head.text_losses
                if isinstance(loss, TextAlignmentLoss)
            ]
            scale = scales[0]() if scales else torch.tensor(1 / 0.07)
            self.scale = scale.detach()
            return
        if branch.fuses_at_inference:
            raise ValueError(f'{type(branch.fusion).__name__} {CANNOT_FOLD}')
        self.uses_cosine = branch.projection.norm == 'l2'
        self.scale = branch.scale().detach()
        self.regularization = branch.regularization
        if branch.logit_bias is not None:
            self.bias = branch.logit_bias.detach().clone()
        if self.binary:
            self.trained_layer = branch.as_conv()
            head.conv_seg = self.trained_layer
        else:
            head.conv_seg = self.fold(self.vectors, range(len(names)))

    def set_classes(self,
                    found: EncodedClasses,
                    new_bias: float = 0,
                    new_words: Optional[str] = None) -> None:
        """Fold the projection with the vectors.

        The default for new ones is that of the classifier.
        """
        if self.stays_binary(found):
            self._install(self.trained_layer, 1)
            self.vectors, self.binary = found.vectors, True
            return
        if (self.model.decode_head.role == 'auxiliary'
                and not self._has_one_logit and None not in found.trained):
            rows = torch.tensor(found.trained, device=self.bias.device)
            self._install(select_classes(self.trained_layer, rows), len(rows))
            self.vectors = found.vectors
            return
        vectors = self.branch.place_words(found.vectors, found.trained,
                                          new_words)
        layer = self.fold(vectors, found.trained, new_bias)
        self._install(layer, len(found.names))
        self.vectors, self.binary = found.vectors, False

    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """Build a layer of the cosines of projected pixels and vectors."""
        return _PixelTextCosine(self.branch.projection, self.vectors[rows])

    @torch.no_grad()
    def fold(self,
             vectors: Tensor,
             trained: Sequence[Optional[int]],
             new_bias: float = 0) -> nn.Module:
        """Fold the projection with class vectors into a stock classifier.

        A trained class keeps its bias. A new one gets the mean of all biases,
        so that a bias that is common to all, which the softmax cancels, favors
        neither. (Cross entropy leaves that mean where it began, at 0: the
        gradients of the biases sum to 0.) ``new_bias`` is added to it, as in
        `calibrated stacking <https://arxiv.org/abs/1605.04253>`_: the training
        has taught the network to prefer the trained classes.

        Args:
            vectors (Tensor): Class vectors, shape (K, D).
            trained (Sequence[int | None]): For each class the index that it
                had in the training, None for a new one.
            new_bias (float): What is added to the logits of new classes.
                Defaults to 0.

        Returns:
            nn.Module: A convolution or, with cosines, a :class:`L2ConvSeg`;
            of a :class:`BalancedTextClassifier` and classes that had no
            labels, a :class:`BalancedConvSeg` of either.
        """
        new = self.bias.mean() + new_bias
        bias = torch.stack(
            [new if own is None else self.bias[own] for own in trained])
        if self.uses_cosine:
            conv, (number, dim) = self.branch.projection.conv, vectors.shape
            folded: nn.Module = L2ConvSeg(conv.in_channels, number,
                                          dim).to(conv.weight)
            folded.load_state_dict(
                fuse_cosine(self.branch.projection,
                            self.scale.double() * vectors.double(), bias))
            if self.regularization is not None:
                # The same for any number of classes.
                folded.regularization = copy.deepcopy(self.regularization)
        else:
            folded = self.branch.as_conv(vectors, bias)
        if not isinstance(self.branch, BalancedTextClassifier):
            return folded
        seen = [
            own is not None and own not in self.branch.unseen
            for own in trained
        ]
        return fold_balanced(self.branch, folded, seen, vectors)


class _PixelTextCosine(nn.Module):
    """Cosine of every pixel embedding with n class vectors (n, D)."""

    def __init__(self, projection: PixelProjection, vectors: Tensor) -> None:
        super().__init__()
        self.projection, self.vectors = projection, vectors

    def forward(self, feat: Tensor) -> Tensor:
        """Compute cosines of shape (N, n, H, W) from features."""
        embeddings = F.normalize(self.projection(feat).float(), dim=1)
        return pixel_text_similarity(embeddings, self.vectors.float())


class EBSegAdapter(NetworkAdapter):
    """Adapter of an EBSeg, which compares its masks with new vectors.

    Names are encoded by the text tower that belongs to its image tower.
    """

    layer = 'mask_scores'
    logits = False

    def __init__(self,
                 model: EBSeg,
                 names: Sequence[str],
                 cache_dir: Optional[PathLike] = None) -> None:
        super().__init__(model, names)
        encoder, text = model.image_encoder, model.decode_head.text.trained
        self.encoder = ClassEncoder(
            text, model.cfg.model.decode_head.text, names, cache_dir,
            dict(
                model=encoder.model,
                pretrained=encoder.pretrained,
                cache_dir=encoder.cache_dir))
        self.vectors = text.class_embeddings.detach().clone()

    def set_classes(self,
                    found: EncodedClasses,
                    new_bias: float = 0,
                    new_words: Optional[str] = None) -> None:
        """Set the vectors by :meth:`EBSeg.set_classes`."""
        if new_words not in (None, 'raw'):
            raise ValueError('EBSeg compares masks with the vectors as they '
                             f'are, new_words="raw", but got {new_words!r}.')
        if new_bias:
            raise ValueError(
                '`new_bias` is for classifiers that are trained on the seen '
                'classes alone. EBSeg balances seen and new classes by its '
                '`balance`: change decode_head.balance.beta by `cfg_options`.')
        self.model.set_classes(
            TextEmbeddings(found.vectors.cpu(), found.names, found.phrases))
        self.vectors = found.vectors

    def select(self, rows: Tensor) -> nn.Module:
        """Build the layer that scores some of the classes."""
        return MaskScores(rows)

    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """Build a layer of the cosines between a pixel's masks and vectors."""
        return _MaskTextCosine(self.vectors[rows])


class _MaskTextCosine(nn.Module):
    """Cosine of the mean embedding of a pixel's masks with n class vectors.
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, found: MaskEmbeddings, classes: Tensor) -> Tensor:
        """Compute cosines of shape (N, n, H, W)."""
        return pixel_text_similarity(pixel_embeddings(found), self.vectors)


class FoldedAdapter(NetworkAdapter):
    """Adapter of a folded or stock network, for its trained classes only."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__(model, names)
        if not hasattr(model.decode_head, 'conv_seg'):
            raise ValueError(
                f'the head {type(model.decode_head).__name__} has no '
                '`conv_seg`: use MMSegmentation\'s MMSegInferencer.')
        self.conv_seg = model.decode_head.conv_seg

    def encode(self, classes: Any, **options: Any) -> EncodedClasses:
        """Look up the classes among the trained ones."""
        words = Vocabulary.from_spec(classes)
        # Stock data sets have names such as 'bed '.
        own = [name.strip() for name in self.names]
        names = [name.strip() for name in words.names]
        new = [name for name in names if name not in own]
        if new:
            raise ValueError(
                f'this checkpoint is folded, or stock: without the projection '
                f'into the space of text it cannot predict {new[:10]}. It '
                f'has the classes {list(self.names)}. Take the checkpoint of '
                'the training, not the one of textkd2mmseg.py, with its '
                'config.')
        return EncodedClasses(words.names, words.phrases, None,
                              [own.index(name) for name in names],
                              'as trained')

    def set_classes(self,
                    found: EncodedClasses,
                    new_bias: float = 0,
                    new_words: Optional[str] = None) -> None:
        """Select the rows of the classifier."""
        device = next(self.conv_seg.parameters()).device
        rows = torch.tensor(found.trained, device=device)
        if self.binary:
            if not self.stays_binary(found):
                raise ValueError(
                    'this network has one logit for its classes '
                    f'{list(self.names)}: none of them can be left out.')
            return
        self._install(select_classes(self.conv_seg, rows), len(rows))

    def cosine(self, rows: Sequence[int]) -> nn.Module:
        """Not available without text."""
        raise ValueError('this checkpoint is folded, or stock: it has no '
                         'pixel embeddings and no similarities. Take the '
                         'checkpoint of the training.')
