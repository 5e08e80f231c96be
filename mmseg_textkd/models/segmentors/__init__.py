# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .distilled_encoder_decoder import DistilledEncoderDecoder
from .frozen_clip_teacher import FrozenCLIPTeacher
from .frozen_teacher import FrozenTeacher
from .multi_dataset_encoder_decoder import MultiDatasetEncoderDecoder
from .text_kd import TextKD

__all__ = [
    'DistilledEncoderDecoder', 'FrozenCLIPTeacher', 'FrozenTeacher',
    'MultiDatasetEncoderDecoder', 'TextKD'
]
