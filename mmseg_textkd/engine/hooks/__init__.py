# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .prompt_learner_hook import PromptLearnerHook
from .teacher_hook import TeacherHook

__all__ = ['PromptLearnerHook', 'TeacherHook']
