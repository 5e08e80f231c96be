# Copyright (c) mmseg_textkd contributors. All rights reserved.
from abc import ABCMeta, abstractmethod
from typing import TYPE_CHECKING, Dict, Union

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

if TYPE_CHECKING:
    from .text_branch import TextBranch
    from .text_classifier import TextClassifier

USES = ('training', 'inference')
CANNOT_FOLD = (
    "with use='inference' depends on the image and does not fold into a "
    'convolution. Choose: deploy it unfolded, with the plugin or as a graph '
    'that needs none (tools/deployment/deploy.py), or train with '
    "use='training', which leaves it out and folds.")


class TextFusion(BaseModule, metaclass=ABCMeta):
    """Base of the modules that fuse image features and text.

    It lies in the text branch of a head, between the features and the
    similarities. With ``use='training'`` the deployed network never runs it:
    it only adds losses. With ``use='inference'`` the text classifier calls
    it in every forward.

    Args:
        use (str): 'training' or 'inference'.

    Raises:
        ValueError: If ``use`` is neither.
    """

    # Whether the losses compare logits, which takes a scale and a bias.
    needs_classifier = False

    def __init__(self, use: str) -> None:
        super().__init__()
        if use not in USES:
            raise ValueError(f'`use` must be one of {USES}, but got {use!r}.')
        self.use = use

    @property
    def used_at_inference(self) -> bool:
        """bool: Whether the deployed network runs it."""
        return self.use == 'inference'

    @staticmethod
    def check_text(text: Tensor) -> None:
        """Require text of one vector for each class.

        Args:
            text (Tensor): Output of the text provider.

        Raises:
            ValueError: If it has shape (1, R, K, D).
        """
        if text.dim() == 4:
            raise ValueError(
                'a fusion needs one vector for each class, but the text has '
                f"{text.shape[1]} phrases a class, as mode='max' of "
                'SynonymSampler gives them. Take another mode, or leave out '
                '`fusion`.')

    @abstractmethod
    def classify(self, classifier: 'TextClassifier', feat: Tensor,
                 text: Tensor) -> Tensor:
        """Classify each pixel with the fusion, as at inference.

        Args:
            classifier (TextClassifier): The classifier that has it.
            feat (Tensor): Features with shape (N, C, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).

        Returns:
            Tensor: Logits, float32 or wider, with shape (N, K, H, W).
        """

    @abstractmethod
    def loss(self, branch: Union['TextBranch', 'TextClassifier'], feat: Tensor,
             embeddings: Tensor, text: Tensor, logits: Tensor, labels: Tensor,
             ignore_index: int) -> Dict[str, Tensor]:
        """Compute the losses of the fusion.

        Args:
            branch (TextBranch | TextClassifier): The branch that has it.
            feat (Tensor): Features with shape (N, C, H, W).
            embeddings (Tensor): Pixel embeddings of the branch, shape
                (N, D, H, W).
            text (Tensor): Class embeddings, shape (K, D) or (N, K, D).
            logits (Tensor): Logits of the head's classifier,
                shape (N, K, H, W).
            labels (Tensor): Long tensor with shape (N, H, W).
            ignore_index (int): Label of the pixels that are left out.

        Returns:
            dict[str, Tensor]: Scalars by their name in the log.
        """

    @staticmethod
    def cross_entropy(logits: Tensor, labels: Tensor,
                      ignore_index: int) -> Tensor:
        """Mean cross entropy over the pixels that are not ignored.

        Args:
            logits (Tensor): Float tensor with shape (N, K, H, W).
            labels (Tensor): Long tensor with shape (N, H, W).
            ignore_index (int): Label of the pixels that are left out.

        Returns:
            Tensor: Scalar; 0 with a graph if every pixel is ignored.
        """
        with torch.autocast(logits.device.type, enabled=False):
            total = F.cross_entropy(
                logits, labels, ignore_index=ignore_index, reduction='sum')
            return total / (labels != ignore_index).sum().clamp(min=1)
