# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional

from mmengine.logging import print_log
from torch import Tensor, nn

from mmseg_textkd.utils.checkpoint import checksum
from .weights import TextTowerError


class FrozenCLIP(nn.Module):
    """Base of the frozen encoders of a CLIP model.

    The weights get no gradient, and the module always stays in evaluation
    mode.

    Args:
        model (str): See :func:`.weights.find_weights`.
        pretrained (str, optional): See :func:`.weights.find_weights`.
            Defaults to None.
    """

    def __init__(self, model: str, pretrained: Optional[str] = None) -> None:
        super().__init__()
        self.model, self.pretrained = model, pretrained
        if model == 'toyclip':
            print_log(
                f'The {type(self).__name__} is ToyCLIP, a tiny model trained '
                'on generated street scenes for tests and the quickstart. It '
                'is not CLIP and of no use for real images.', 'current')

    def _freeze(self, sample: Tensor) -> int:
        """Freeze the weights and get the width of the embeddings.

        Args:
            sample (Tensor): Embeddings of any input, shape (N, D).

        Returns:
            int: D.

        Raises:
            TextTowerError: If the embeddings are not finite.
        """
        if not sample.isfinite().all():
            raise TextTowerError(
                f'The weights of {self.model!r} are damaged: its vectors are '
                'not finite.')
        self.requires_grad_(False)
        self.eval()
        return sample.shape[1]

    def train(self, mode: bool = True) -> 'FrozenCLIP':
        """Stay in evaluation mode."""
        return super().train(False)

    def checksum(self) -> str:
        """Hash all weights, to prove that training has not changed them.

        Returns:
            str: See :func:`.checkpoint.checksum`.
        """
        return checksum(self)
