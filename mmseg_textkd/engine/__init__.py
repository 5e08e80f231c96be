# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .hooks import PromptLearnerHook

__all__ = ['PromptLearnerHook']
