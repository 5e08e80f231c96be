# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..layers import LogitScale, class_means
from .logit_distillation_loss import teacher_logits

TEACHERS = ('regions', 'segmentor')


@MODELS.register_module()
class TextGuidedDistillationLoss(nn.Module):
    r"""Text-guided knowledge distillation of class prototypes.

    .. math::
        L_i = \frac{1}{R_i^2} \Big( \sum_a \lVert s_a - v_a \rVert^2 +
        \sum_{a \neq b} (\gamma \langle t_a, t_b \rangle -
        \langle s_a, v_b \rangle)^2 \Big)

    over the :math:`R_i` classes of image i, averaged over the images that
    have any. The student :math:`s_a` is the mean of the pixel embeddings of
    class a, brought to unit length; :math:`v_a` is the unit vector of a
    teacher, :math:`t_a` that of the name. A class is brought close to its own
    teacher, and to that of another class as close as their names are;
    :math:`\gamma` is learned. Computed in float32 whatever the mode of
    training. Text and teacher are given: they get no gradient.

    The teacher is

    - 'regions': a frozen CLIP image tower, whose input is the region of the
      class in the original image
      (:class:`LoadRegionEmbeddings`). It must be the tower that belongs to
      the text.
    - 'segmentor': a segmentation network (``DistilledEncoderDecoder``), text
      or stock, of any width. The mean of its softmax over the pixels of class
      a, :math:`q_a`, is its mean prediction for the class; in the space of
      the text that is :math:`v_a \propto \sum_k q_{ak} t_k`.

    Source: `Global Knowledge Calibration for Fast Open-Vocabulary
    Segmentation <https://arxiv.org/abs/2303.09181>`_ (text-guided knowledge
    distillation), there on the queries of a mask decoder. 'segmentor' is
    ours.

    Args:
        teacher (str): 'regions' or 'segmentor'. Defaults to 'regions'.
        gamma (dict, optional): Arguments of :class:`LogitScale`, the factor
            on the similarities of the names. Defaults to None: learned, from
            1, as in GKC.
        temperature (float): Temperature of the softmax of the teacher
            'segmentor'. Defaults to 1.0.
        min_pixels (int): Pixels, at the resolution of the embeddings, from
            which on a class is present. Defaults to 4.
        loss_weight (float): Weight of the loss. Defaults to 10.0, as in GKC.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_text_guided'.

    Raises:
        ValueError: If an argument is out of range.
    """

    # No gradient goes to the text: prompts learn nothing by it.
    trains_text = False

    def __init__(self,
                 teacher: str = 'regions',
                 gamma: Optional[dict] = None,
                 temperature: float = 1.,
                 min_pixels: int = 4,
                 loss_weight: float = 10.,
                 loss_name: str = 'loss_text_guided') -> None:
        super().__init__()
        if teacher not in TEACHERS:
            raise ValueError(
                f'`teacher` must be one of {TEACHERS}, but got {teacher!r}.')
        if not temperature > 0:
            raise ValueError(
                f'`temperature` must be positive, but got {temperature}.')
        if min_pixels < 1:
            raise ValueError(
                f'`min_pixels` must be at least 1, but got {min_pixels}.')
        self.teacher = teacher
        self.gamma = LogitScale(**(gamma or dict(init=1.)))
        self.temperature = temperature
        self.min_pixels = min_pixels
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self,
                embeddings: Tensor,
                text: Tensor,
                labels: Tensor,
                ignore_index: int = 255,
                batch_data_samples: Sequence = (),
                **kwargs) -> Tensor:
        """Compute the loss.

        Args:
            embeddings (Tensor): Pixel embeddings, shape (N, D, h, w), of any
                length.
            text (Tensor): Class embeddings, shape (K, D), (N, K, D) or, with
                R phrases a class, (1, R, K, D), whose mean counts.
            labels (Tensor): Long tensor with shape (N, h, w).
            ignore_index (int): Label of the pixels that are left out.
                Defaults to 255.
            batch_data_samples (Sequence[:obj:`SegDataSample`]): With the
                outputs of the teacher.

        Returns:
            Tensor: Scalar; 0 with a graph if no image has a class that
            student and teacher know.

        Raises:
            ValueError: If the data samples have no outputs of the teacher, or
                these do not fit the text.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            text = text.detach().to(dtype)
            text = F.normalize(
                text.mean(1) if text.dim() == 4 else text, dim=-1)
            text = text.expand(len(embeddings), -1, -1)
            means, counts = class_means(
                embeddings.to(dtype), labels, text.shape[1], ignore_index)
            if self.teacher == 'regions':
                teachers, known = self._regions(batch_data_samples, text)
            else:
                teachers, known = self._prototypes(batch_data_samples, text,
                                                   labels, ignore_index)
            known = known & (counts >= self.min_pixels)
            students = F.normalize(means, dim=2)
            return self.loss_weight * self._compare(students, teachers, text,
                                                    known)

    def _compare(self, students: Tensor, teachers: Tensor, text: Tensor,
                 known: Tensor) -> Tensor:
        """Compute the loss of unit vectors (N, K, D), known classes (N, K)."""
        own = (students - teachers).square().sum(dim=2)
        target = self.gamma().to(text) * text @ text.transpose(1, 2)
        pairs = (target - students @ teachers.transpose(1, 2)).square()
        diagonal = torch.eye(
            text.shape[1], dtype=torch.bool, device=text.device)
        terms = torch.where(diagonal, own[:, :, None], pairs)
        both = known[:, :, None] & known[:, None]
        number = both.sum(dim=(1, 2))
        losses = terms.where(both, 0).sum(dim=(1, 2)) / number.clamp(min=1)
        return losses.sum() / (number > 0).sum().clamp(min=1)

    @staticmethod
    def _regions(samples: Sequence, text: Tensor) -> Tuple[Tensor, Tensor]:
        """Get region embeddings (N, K, D) and the mask of known classes."""
        teachers = torch.zeros_like(text)
        known = torch.zeros(
            text.shape[:2], dtype=torch.bool, device=text.device)
        if len(samples) != len(text) or not all('region_embeddings' in s
                                                for s in samples):
            raise ValueError(
                'the data samples have no region embeddings. Put '
                'LoadRegionEmbeddings and PackRegionInputs into the pipeline '
                'of train_dataloader (mmseg_textkd.add_region_embeddings).')
        for i, sample in enumerate(samples):
            regions = sample.region_embeddings
            labels, vectors = regions.labels, regions.vectors
            if not len(labels):
                continue
            if labels.max(
            ) >= text.shape[1] or vectors.shape[1:] != text.shape[2:]:
                raise ValueError(
                    f'region embeddings of {vectors.shape[1]} dimensions for '
                    f'classes up to {int(labels.max())} do not fit text of '
                    f'{text.shape[2]} dimensions for {text.shape[1]} classes. '
                    'Image tower and text must be of one CLIP model.')
            teachers[i, labels] = vectors.to(text)
            known[i, labels] = True
        return teachers, known

    def _prototypes(self, samples: Sequence, text: Tensor, labels: Tensor,
                    ignore_index: int) -> Tuple[Tensor, Tensor]:
        """Compute prototypes (N, K, D) in text space from the logits."""
        logits = teacher_logits(samples, labels.shape[1:], text.shape[1])
        maps = (logits.to(text) / self.temperature).softmax(dim=1)
        shares, counts = class_means(maps, labels, text.shape[1], ignore_index)
        return F.normalize(shares @ text, dim=2), counts > 0
