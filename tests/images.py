# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Images and label maps of tests."""
import numpy as np
from PIL import Image


def write(path, values, palette=None):
    """Write an image or a label map and its folder; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if palette is not None:
        image.putpalette(palette.tobytes())
    image.save(path)
    return str(path)


def noise(height, width, seed=0):
    """A random image."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8)
