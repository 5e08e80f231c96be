# Copyright (c) mmseg_textkd contributors. All rights reserved.
from torch import nn


def input_channels(model: nn.Module) -> int:
    """Tell how many channels the images of a segmentor have.

    Those that its data preprocessor normalizes: several images may go into
    one tensor, of which the backbone sees a part. Else those of the first
    convolution.

    Args:
        model (nn.Module): The segmentor.

    Returns:
        int: Number of channels; 3 if the model does not tell.
    """
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    if mean is not None:
        return mean.numel()
    for module in getattr(model, 'backbone', model).modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3
