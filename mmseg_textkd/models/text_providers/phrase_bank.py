# Copyright (c) mmseg_textkd contributors. All rights reserved.
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from torch import Tensor


# Compared by identity: tensors have no truth value.
@dataclass(eq=False)
class PhraseBank:
    """Vectors of several phrases for each class, sampled in training.

    Args:
        vectors (Tensor): Unit vectors of the phrases, float32, with shape
            (K, R, D), of any value where a class has fewer than R.
        probability (Tensor): How probable each phrase is, with shape (K, R)
            and rows of sum 1; 0 for those that are not used.
        mode (str): 'draw': one phrase for each image and class, by its
            probability. 'mean': the mean of all that are used. 'max': all
            that are used, of which the best counts at each pixel.
    """

    vectors: Tensor
    probability: Tensor
    mode: str = 'draw'

    def sample(self, num_images: int, device: torch.device) -> Tensor:
        """Sample the text of one training iteration.

        Draws are made on the CPU by torch's global generator: of a given
        seed they are the same on any device. The ranks of a distributed run
        draw what one process would draw for all of their images.

        Args:
            num_images (int): Number of images N.
            device (torch.device): Where the text is needed.

        Returns:
            Tensor: Unit vectors, float32: (N, K, D) for 'draw', (K, D) for
            'mean', (1, R, K, D) for 'max'.
        """
        if self.vectors.device != device:
            # Once; only the draws travel in each iteration.
            self.vectors = self.vectors.to(device)
        vectors = self.vectors
        if self.mode == 'draw':
            # Ranks have one seed: each draws for all and takes its own part.
            drawn = torch.multinomial(
                self.probability,
                num_images * get_world_size(),
                replacement=True).T
            drawn = drawn[num_images * get_rank():][:num_images]
            rows = torch.arange(len(vectors))
            return vectors[rows.to(device), drawn.to(device)]
        used = (self.probability > 0).to(device)
        if self.mode == 'mean':
            weight = used[..., None].to(vectors)
            return F.normalize((weight * vectors).sum(dim=1), dim=1)
        # A phrase that is there twice changes no maximum.
        best = self.probability.argmax(dim=1).to(device)
        rows = torch.arange(len(vectors), device=device)
        full = vectors.where(used[..., None], vectors[rows, best][:, None])
        return full.transpose(0, 1)[None]

    def select(self, rows: Tensor) -> 'PhraseBank':
        """Select the phrases of some classes.

        Args:
            rows (Tensor): Long tensor, the classes.

        Returns:
            PhraseBank: Their phrases.
        """
        return PhraseBank(self.vectors[rows.to(self.vectors.device)],
                          self.probability[rows.cpu()], self.mode)
