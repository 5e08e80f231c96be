# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class ImageEmbeddingDistillationLoss(nn.Module):
    r"""Squared distance between pixel embeddings and those of frozen CLIP.

    .. math::
        L = \frac{1}{|P|} \sum_{p \in P} \lVert u_p - v_p \rVert^2

    over **all** pixels P, also unlabeled ones, such as those of unseen
    classes. It does not depend on class names. The unit vector :math:`v_p` is
    the teacher's, resized to the student's resolution and normalized;
    :math:`u_p` is the student's, of any length. Computed in float32 whatever
    the mode of training; the teacher gets no gradient.

    The squared distance and not a cosine, since the student must stay an
    affine map to fold: u is not normalized at inference, so that its length
    must be learned. The minimum is the conditional mean of the teacher's
    vectors, which is the shorter the less certain they are, and then the
    softmax over the classes is the flatter.

    It is the first term of `GKC's <https://arxiv.org/abs/2303.09181>`_
    distillation, there for regions, at pixels.

    Args:
        loss_weight (float): Weight of the loss. Defaults to 10.0, as in GKC.
        loss_name (str): Name in the log; a loss is optimized only if the name
            starts with 'loss'. Defaults to 'loss_image_embedding'.
    """

    # The head gives the embeddings of its image projection.
    of_image_projection = True
    trains_text = False

    def __init__(self,
                 loss_weight: float = 10.,
                 loss_name: str = 'loss_image_embedding') -> None:
        super().__init__()
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
            embeddings (Tensor): Image embeddings u, shape (N, D, h, w).
            text (Tensor): Not used.
            labels (Tensor): Not used.
            ignore_index (int): Not used.
            batch_data_samples (Sequence[:obj:`SegDataSample`]): N samples,
                with ``teacher.embeddings``.

        Returns:
            Tensor: Scalar.

        Raises:
            ValueError: If the data samples have no embeddings of a teacher,
                or of another width.
        """
        if not batch_data_samples or not all(
                'embeddings' in sample.get('teacher', ())
                for sample in batch_data_samples):
            raise ValueError(
                'the data samples have no image embeddings of a teacher. Set '
                "model=dict(type='DistilledEncoderDecoder', teacher=dict("
                "type='FrozenCLIPTeacher', ...)) in the config.")
        teacher = torch.stack(
            [s.teacher.embeddings for s in batch_data_samples])
        if teacher.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f'the teacher gives embeddings of width {teacher.shape[1]}, '
                f'but the text has width {embeddings.shape[1]}. Image tower '
                'and text must be of one CLIP model.')
        with torch.autocast(embeddings.device.type, enabled=False):
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            teacher = resize(
                F.normalize(teacher.detach().to(dtype), dim=1),
                size=embeddings.shape[2:],
                mode='bilinear',
                align_corners=False)
            gap = embeddings.to(dtype) - F.normalize(teacher, dim=1)
            return self.loss_weight * gap.square().sum(dim=1).mean()
