# Copyright (c) mmseg_textkd contributors. All rights reserved.
from .image_tower import ImageTower
from .text_tower import TextTower, load_tower
from .weights import TextTowerError, find_weights

__all__ = [
    'ImageTower', 'TextTower', 'TextTowerError', 'find_weights', 'load_tower'
]
