# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .channels_last_hook import ChannelsLastHook
from .prompt_learner_hook import PromptLearnerHook
from .teacher_hook import TeacherHook

__all__ = ['ChannelsLastHook', 'PromptLearnerHook', 'TeacherHook']
