# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Dict, Optional, Sequence

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from mmseg.utils import SampleList, add_prefix
from torch import Tensor, nn

from ..label_spaces import refuse_label_spaces
from ..record_calls import record_calls


@MODELS.register_module()
class DistilledEncoderDecoder(EncoderDecoder):
    """``EncoderDecoder`` with knowledge distillation from a frozen teacher.

    In training the teacher runs on the same images. Its outputs are added to
    the data samples as ``teacher``, a :obj:`PixelData` with ``logits`` and
    ``features`` of a segmentation network, or with ``embeddings`` in the
    space of text, for the text losses of the heads; ``distill_losses``
    compare them with the logits or features of the decode head, recorded by
    forward hooks. Heads are stock or of this package.
    Evaluation, and every name in the state dict but ``distill_losses.*``, are
    those of ``EncoderDecoder``, which is what is deployed.

    Args:
        teacher (dict): Config of the teacher. Without a ``type`` it is a
            :class:`FrozenTeacher`; :class:`FrozenCLIPTeacher` is another.
        distill_losses (Sequence[dict], optional): Losses such as
            ``LogitDistillationLoss``, called with student, teacher, labels
            and ``ignore_index``, at the resolution of the student's logits.
            Defaults to None.
        **kwargs: As of ``EncoderDecoder``.
    """

    def __init__(self,
                 teacher: dict,
                 distill_losses: Optional[Sequence[dict]] = None,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        self.teacher = MODELS.build(
            dict(dict(type='mmseg.FrozenTeacher'), **teacher))
        # With the same seed the network is initialized as without them.
        with torch.random.fork_rng(devices=[]):
            self.distill_losses = nn.ModuleList(
                MODELS.build(loss) for loss in distill_losses or [])

    def loss(self, inputs: Tensor,
             data_samples: SampleList) -> Dict[str, Tensor]:
        """Compute all losses; see ``EncoderDecoder``.

        Args:
            inputs (Tensor): Images with shape (N, 3, H, W).
            data_samples (list[:obj:`SegDataSample`]): Their labels. They get
                the field ``teacher``.

        Returns:
            dict[str, Tensor]: Losses by name, those of ``distill_losses``
            under 'distill.'.

        Raises:
            ValueError: If the teacher has another number of classes, or the
                images are of a :class:`MultiDataset`.
            RuntimeError: If the decode head does not call ``conv_seg`` once.
        """
        refuse_label_spaces(self, data_samples)
        number = self.teacher.num_classes
        if number not in (None, self.decode_head.out_channels):
            raise ValueError(
                f'the teacher {self.teacher.name} has {number} classes, but '
                f'the student {self.decode_head.out_channels}.')
        teacher = self.teacher(inputs, self.data_preprocessor)
        for i, sample in enumerate(data_samples):
            sample.teacher = PixelData(**{k: v[i] for k, v in teacher.items()})
        if not self.distill_losses:
            return super().loss(inputs, data_samples)
        with record_calls(getattr(self.decode_head, 'conv_seg',
                                  None)) as calls:
            losses = super().loss(inputs, data_samples)
        if len(calls) != 1:
            raise RuntimeError(
                f'{type(self.decode_head).__name__} called its classifier '
                f'`conv_seg` {len(calls)} times in one forward; '
                '`distill_losses` need exactly one call.')
        student = dict(zip(('features', 'logits'), calls[0]))
        losses.update(
            add_prefix(
                self._distill(student, teacher, data_samples), 'distill'))
        return losses

    def _distill(self, student: Dict[str, Tensor], teacher: Dict[str, Tensor],
                 data_samples: SampleList) -> Dict[str, Tensor]:
        size = student['logits'].shape[2:]
        labels = self.decode_head._stack_batch_gt(data_samples)
        if isinstance(labels, tuple):  # PIDHead: labels and edges
            labels = labels[0]
        labels = F.interpolate(labels.float(), size=size, mode='nearest')
        losses: Dict[str, Tensor] = {}
        for module in self.distill_losses:
            on = getattr(module, 'on', 'logits')
            if on not in teacher:
                raise ValueError(
                    f'the teacher {self.teacher.name} has no classifier '
                    f'`conv_seg` whose {on} {type(module).__name__} could '
                    'take.')
            value = module(
                student[on],
                resize(
                    teacher[on].float(),
                    size=size,
                    mode='bilinear',
                    align_corners=False),
                labels.squeeze(1).long(),
                ignore_index=self.decode_head.ignore_index)
            name = str(module.loss_name)
            losses[name] = losses[name] + value if name in losses else value
        return losses
