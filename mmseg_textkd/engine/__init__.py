# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .cpu_ranks import join_cpu_ranks
from .hooks import (ChannelsLastHook, LoadedCheckpointHook, PromptLearnerHook,
                    TeacherHook, check_loaded)
from .model_wrappers import CPUDistributedDataParallel
from .optim_wrappers import CPUAmpOptimWrapper

__all__ = [
    'CPUAmpOptimWrapper', 'CPUDistributedDataParallel', 'ChannelsLastHook',
    'LoadedCheckpointHook', 'PromptLearnerHook', 'TeacherHook', 'check_loaded',
    'join_cpu_ranks'
]
