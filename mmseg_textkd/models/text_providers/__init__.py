# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .class_embeddings import ClassEmbeddings
from .context_prompt_learner import ContextPromptLearner
from .control_embeddings import ControlEmbeddings
from .learned_embeddings import LearnedEmbeddings
from .mixture_prompt_learner import MixturePromptLearner
from .prompt_learner import PromptLearner
from .residual_prompt_learner import ResidualPromptLearner
from .synonym_sampler import SynonymSampler
from .text_provider import TextProvider, build_text

__all__ = [
    'ClassEmbeddings', 'ContextPromptLearner', 'ControlEmbeddings',
    'LearnedEmbeddings', 'MixturePromptLearner', 'PromptLearner',
    'ResidualPromptLearner', 'SynonymSampler', 'TextProvider', 'build_text'
]
