# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .channels_last_hook import ChannelsLastHook
from .loaded_checkpoint_hook import LoadedCheckpointHook, check_loaded
from .prompt_learner_hook import PromptLearnerHook
from .teacher_hook import TeacherHook

__all__ = [
    'ChannelsLastHook', 'LoadedCheckpointHook', 'PromptLearnerHook',
    'TeacherHook', 'check_loaded'
]
