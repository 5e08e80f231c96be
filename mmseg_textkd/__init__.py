# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""CLIP-text knowledge for small segmentation networks.

Importing the package applies the version patches of :mod:`.compat` and
registers every module with MMSegmentation's registries, so one line in a
config, ``custom_imports = dict(imports=['mmseg_textkd'])``, is all that a
project needs.
"""
from . import compat

# Before anything that imports mmseg.models: the patches must be applied.
compat.apply()

from . import datasets, engine, evaluation, models, text
from .compat import stock_config
from .config_functions import (add_region_embeddings, insert_transform,
                               open_vocabulary_test, stock_network,
                               wide_label_test, zero_shot)
from .version import __version__

__all__ = [
    '__version__', 'add_region_embeddings', 'compat', 'datasets', 'engine',
    'evaluation', 'insert_transform', 'models', 'open_vocabulary_test',
    'stock_config', 'stock_network', 'text', 'wide_label_test', 'zero_shot'
]
