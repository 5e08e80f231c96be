# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .prompt_learner_hook import PromptLearnerHook

__all__ = ['PromptLearnerHook']
