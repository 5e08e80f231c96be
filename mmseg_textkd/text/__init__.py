# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .embedding_file import TextEmbeddings
from .templates import get_templates
from .vocabulary import Vocabulary

__all__ = ['TextEmbeddings', 'Vocabulary', 'get_templates']
