# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .hooks import (ChannelsLastHook, LoadedCheckpointHook, PromptLearnerHook,
                    TeacherHook, check_loaded)
from .model_wrappers import CPUDistributedDataParallel, join_cpu_ranks
from .optim_wrappers import CPUAmpOptimWrapper

__all__ = [
    'CPUAmpOptimWrapper', 'CPUDistributedDataParallel', 'ChannelsLastHook',
    'LoadedCheckpointHook', 'PromptLearnerHook', 'TeacherHook', 'check_loaded',
    'join_cpu_ranks'
]
