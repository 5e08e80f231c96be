# Copyright (c) mmseg_textkd contributors. All rights reserved.
import warnings
from contextlib import ExitStack
from typing import (TYPE_CHECKING, Any, Dict, Iterator, Optional, Sequence,
                    Tuple, Union)

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers import BalancedTextClassifier, TextBranch, TextClassifier
from ..record_calls import record_calls
from .branch_type import branch_type
from .stock_head import (check_stock_head, foldable_norm_cfg,
                         init_without_conv_seg, is_binary)
from .unseen_classes import check_unseen_labels, check_unseen_teacher

if TYPE_CHECKING:
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead as Base
else:
    Base = object

ROLES = ('classifier', 'auxiliary')
# What is needed of `BaseDecodeHead`; projects have copies of their own.
INTERFACE = ('forward', 'loss', 'predict_by_feat', '_stack_batch_gt')


class TextHeadMixin(Base):
    """Mix-in that adds a text branch to a stock decode head.

    Put before the stock head among the bases::

        @MODELS.register_module()
        class TextFCNHead(TextHeadMixin, FCNHead):
            ...

    In the role 'classifier' a :class:`TextClassifier` takes the place of
    ``conv_seg``, learns by the head's own losses, and folds back into an
    ordinary ``conv_seg`` for release. In the role 'auxiliary' the stock
    classifier stays, a :class:`TextBranch` on the same features learns by
    ``text_losses``, and is dropped for release. Every name outside the text
    branch stays that of the stock head.

    Binary heads have one logit: with ``num_classes=2, out_channels=1`` that
    of the second class minus that of the first, with ``num_classes=1`` that
    of the class alone, against its bias.

    Args:
        text (dict): Config of the text provider, such as
            ``dict(type='ClassEmbeddings', file=...)``.
        role (str): 'classifier' or 'auxiliary'. Defaults to 'classifier'.
        text_branch (dict, optional): Further arguments of
            :class:`TextClassifier` (``norm``, ``norm_cfg``, ``scale``,
            ``bias``, ``regularization``, ``unseen``, ``project``) or of
            another classifier that is its ``type``, such as
            :class:`BalancedTextClassifier`; in the role 'auxiliary' of
            :class:`TextBranch` (``norm``, ``norm_cfg``, ``project``).
            ``norm_cfg`` defaults to the head's own where that is a batch
            norm, else to BN. Defaults to None.
        text_losses (Sequence[dict], optional): Losses on pixel and class
            embeddings, called with both, the labels at the resolution of the
            pixel embeddings, ``ignore_index`` and ``batch_data_samples``
            (which hold the outputs of a teacher), or, in stage 2,
            on learned and fixed class embeddings. Defaults to
            None: none for 'classifier', or that of the image projection for
            a ``BalancedTextClassifier``; one ``TextAlignmentLoss`` of weight
            0.4 (DenseCLIP's) for 'auxiliary'.
        fusion (dict, optional): Config of a :class:`TextFusion`, such as
            ``dict(type='TwoWayBridge')``, which fuses image and text: for
            training only, in either role, or, with ``use='inference'``, for
            good, in the role 'classifier'. Defaults to None.

    Raises:
        TypeError: If the stock head has not the methods of
            ``BaseDecodeHead``, be it a copy of that, or no 1x1 ``conv_seg``.
        ValueError: If the arguments do not fit each other or the head.
    """

    conv_seg: Any
    init_cfg: Any

    def __init__(self,
                 *args,
                 text: dict,
                 role: str = 'classifier',
                 text_branch: Optional[dict] = None,
                 text_losses: Optional[Sequence[dict]] = None,
                 fusion: Optional[dict] = None,
                 **kwargs) -> None:
        lacks = [name for name in INTERFACE if not hasattr(self, name)]
        if lacks:
            raise TypeError(
                f'{type(self).__name__} cannot take text: it is no '
                'BaseDecodeHead, which classifies pixels by `conv_seg`, and '
                f'has not its {", ".join(lacks)}.')
        super().__init__(*args, **kwargs)
        if role not in ROLES:
            raise ValueError(
                f'`role` must be one of {ROLES}, but got {role!r}.')
        check_stock_head(self)
        self.role = role
        options = dict(text_branch or {})
        options.setdefault('norm_cfg', foldable_norm_cfg(self.norm_cfg))
        kind = branch_type(options.pop('type', None), role, fusion)
        if role == 'classifier' and is_binary(self):
            if kind is not TextClassifier:
                raise ValueError(
                    f'a {kind.__name__} has no form with one logit for two '
                    'classes; leave `out_channels` of the head unset.')
            options['binary'] = True
        if self.num_classes == 1 and (text_losses or fusion
                                      or role == 'auxiliary'):
            raise ValueError(
                'the text losses and a fusion need the text of both classes: '
                'give the background a name too and set num_classes=2, '
                'out_channels=1.')
        branch = kind(
            self.conv_seg.in_channels,
            self.num_classes,
            text,
            fusion=fusion,
            **options)
        if role == 'classifier':
            self.conv_seg = branch
            self.init_cfg = init_without_conv_seg(self.init_cfg)
        else:
            if branch.fusion is not None and branch.fusion.used_at_inference:
                raise ValueError(
                    "a fusion with use='inference' needs role='classifier': "
                    "in the role 'auxiliary' no text is deployed.")
            setattr(self, 'text_branch', branch)  # no property to nn.Module
            if text_losses is None:
                text_losses = [
                    dict(type='mmseg.TextAlignmentLoss', loss_weight=0.4)
                ]
            if not text_losses and fusion is None:
                raise ValueError(
                    "role='auxiliary' with no `text_losses` would leave the "
                    'text branch unused; give at least one loss, or '
                    '`fusion`.')
        balanced = isinstance(branch, BalancedTextClassifier)
        if balanced and text_losses is None:
            text_losses = [dict(type='mmseg.ImageEmbeddingDistillationLoss')]
        self.text_losses = nn.ModuleList(
            MODELS.build(loss) for loss in text_losses or [])
        self._drop_unseen_weights()
        if balanced != any(map(_of_image_projection, self.text_losses)):
            raise ValueError(
                "text_branch=dict(type='BalancedTextClassifier') and an "
                'ImageEmbeddingDistillationLoss in `text_losses` belong '
                'together: one has the image projection, the other trains '
                'it.')
        self._classifier_called = False

    def init_weights(self) -> None:
        """Initialize the weights.

        Some stock heads do so by a loop over all layers, which would be the
        last.
        """
        super().init_weights()
        if not self.text_branch.is_init:
            self.text_branch.init_weights()

    def _drop_unseen_weights(self) -> None:
        """Keep the class weights of the classes whose text losses learn."""
        unseen = getattr(self.text_branch, 'unseen', ())
        losses: Sequence[Any] = list(self.text_losses)
        for loss in losses:
            weights = getattr(loss, 'class_weight', None)
            if unseen and weights and len(weights) == self.num_classes:
                loss.class_weight = [
                    w for k, w in enumerate(weights) if k not in unseen
                ]

    @property
    def text_branch(self) -> TextBranch:
        """TextBranch: The text branch; in the role 'classifier' that is
        ``conv_seg`` itself, so that checkpoint keys stay those of the role.
        """
        return self._modules.get('text_branch', self.conv_seg)

    @property
    def text(self) -> TextBranch:
        """TextBranch: Deprecated name of :attr:`text_branch`."""
        warnings.warn('`head.text` is deprecated: use `head.text_branch`.',
                      DeprecationWarning)
        return self.text_branch

    def loss(self, inputs: Union[Tensor, Sequence[Tensor]],
             *args) -> Dict[str, Tensor]:
        """Compute the head's own losses and the text losses.

        Args:
            inputs (Tensor | Sequence[Tensor]): Features of the backbone.
            *args: As of the stock head: in a cascade the output of the head
                before; the data samples, a list of :obj:`SegDataSample` with
                ``gt_sem_seg``; the training config.

        Returns:
            dict[str, Tensor]: Losses by name, and the head's accuracy.

        Raises:
            RuntimeError: If the stock head does not call its classifier, or
                with text losses if it calls it more than once.
            ValueError: If there are labels of unseen classes, or a teacher
                that depends on them.
        """
        unseen = getattr(self.text_branch, 'unseen', ())
        if unseen:
            check_unseen_labels(self._labels(args[-2]), unseen)
            check_unseen_teacher(args[-2])
        return self._with_graph(self._loss(inputs, *args))

    def _loss(self, inputs: Union[Tensor, Sequence[Tensor]],
              *args) -> Dict[str, Tensor]:
        """Compute the losses; see :meth:`loss`."""
        extra = self._has_extra
        if self._classifier_called and not extra:
            return super().loss(inputs, *args)
        # Forward hooks, removed after this call, record the tensors of the
        # stock forward, so that it need not be copied.
        with ExitStack() as stack:
            branch = self.text_branch
            modules = self.conv_seg, branch.projection, branch.text
            records = [stack.enter_context(record_calls(m)) for m in modules]
            losses = super().loss(inputs, *args)
        self._check_calls(len(records[0]), extra)
        if not extra:
            return losses
        (feat, logits), pixels, texts = records[0][0], *records[1:]
        # Neither is called in the role 'auxiliary', nor the projection by all
        # fusions in evaluation mode.
        embeddings = pixels[0][1] if pixels else branch.projection(feat)
        text = texts[0][1] if texts else branch.text(feat.shape[0])
        for name, value in self._text_losses(feat, logits, embeddings, text,
                                             args[-2]):
            # Losses of one name add up, as those of `loss_decode` do.
            losses[name] = losses[name] + value if name in losses else value
        return losses

    @property
    def _has_extra(self) -> bool:
        """Whether there are losses besides those of the stock head."""
        return bool(self.text_losses) or self.text_branch.fusion is not None

    @property
    def text_losses_computed(self) -> bool:
        """bool: Whether :meth:`loss` has been called, if it has a part of
        its own.
        """
        return self._classifier_called or not self._has_extra

    def _with_graph(self, losses: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Attach losses to what learns, where they are not.

        Of a batch without any labeled pixel some stock losses return a plain
        zero, and in stage 2, where nothing else learns, there would be
        nothing to go back from.
        """
        learns = [p for p in self.conv_seg.parameters() if p.requires_grad]
        found = [k for k in losses if 'loss' in k]
        if learns and found and torch.is_grad_enabled() and not any(
                losses[k].requires_grad for k in found):
            losses[found[0]] = losses[found[0]] + sum(0. * p.sum()
                                                      for p in learns)
        return losses

    def _labels(self, batch_data_samples: list) -> Tensor:
        labels = self._stack_batch_gt(batch_data_samples)
        if isinstance(labels, tuple):  # PIDHead: labels and edges
            labels = labels[0]
        return labels

    def _text_losses(self, feat: Tensor, logits: Tensor, embeddings: Tensor,
                     text: Tensor,
                     batch_data_samples: list) -> Iterator[Tuple[str, Tensor]]:
        """Compute the text losses and those of the fusion, with names."""
        labels, ignored = self._labels(batch_data_samples), self.ignore_index
        if getattr(self.text_branch, 'unseen', ()):
            # Losses over the seen classes only.
            text = self.text_branch.seen_text(text)
            own = torch.searchsorted(self.text_branch.seen, labels)
            # None of theirs.
            ignored = max(ignored, len(self.text_branch.seen))
            labels = own.masked_fill(labels == self.ignore_index, ignored)
        small = F.interpolate(
            labels.float(), size=embeddings.shape[2:], mode='nearest')
        small, labels = small.squeeze(1).long(), labels.squeeze(1)
        for module in self.text_losses:
            if getattr(module, 'of_text', False):
                fixed = self._fixed_text()
                if not self.text_branch.text.learning:
                    continue
                value = module(text, fixed)
            else:
                full = getattr(module, 'full_resolution', False)
                pixels = embeddings
                if _of_image_projection(module):
                    pixels = self.text_branch.image_projection(feat)
                value = module(
                    pixels,
                    text,
                    labels if full else small,
                    ignore_index=ignored,
                    batch_data_samples=batch_data_samples)
            yield str(module.loss_name), value
        if self.text_branch.fusion is not None:
            self.text_branch.fusion.check_text(text)
            yield from self.text_branch.fusion.loss(self.text_branch, feat,
                                                    embeddings, text, logits,
                                                    small, ignored).items()

    def _fixed_text(self) -> Tensor:
        """Get the class embeddings that the learned ones start from."""
        provider = self.text_branch.text
        fixed = getattr(provider, 'base', None)
        if fixed is None:
            raise ValueError(
                'a loss between learned and fixed text needs prompts that '
                f'learn, but `text` is a {type(provider).__name__}.')
        if getattr(self.text_branch, 'unseen', ()):
            fixed = self.text_branch.seen_text(fixed)
        return fixed

    def _check_calls(self, number: int, extra: bool) -> None:
        name = type(self).__name__
        if number == 0:
            raise RuntimeError(
                f'{name} cannot take text: its stock forward does not call '
                'its classifier `conv_seg`, which would learn nothing.')
        if number > 1 and extra:
            raise RuntimeError(
                f'{name} called its main classifier {number} times in one '
                'forward; text losses need exactly one call.')
        self._classifier_called = True


def _of_image_projection(loss: nn.Module) -> bool:
    """Whether a text loss takes the embeddings of the image projection."""
    return getattr(loss, 'of_image_projection', False)
