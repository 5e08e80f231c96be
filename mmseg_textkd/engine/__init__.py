# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .hooks import ChannelsLastHook, PromptLearnerHook, TeacherHook
from .model_wrappers import CPUDistributedDataParallel, join_cpu_ranks
from .optim_wrappers import CPUAmpOptimWrapper

__all__ = [
    'CPUAmpOptimWrapper', 'CPUDistributedDataParallel', 'ChannelsLastHook',
    'PromptLearnerHook', 'TeacherHook', 'join_cpu_ranks'
]
