# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .cpu_ranks import join_cpu_ranks
from .hooks import ChannelsLastHook, PromptLearnerHook, TeacherHook
from .model_wrappers import CPUDistributedDataParallel
from .optim_wrappers import CPUAmpOptimWrapper

__all__ = [
    'CPUAmpOptimWrapper', 'CPUDistributedDataParallel', 'ChannelsLastHook',
    'PromptLearnerHook', 'TeacherHook', 'join_cpu_ranks'
]
