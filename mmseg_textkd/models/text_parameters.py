# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""What in a model is text: the questions that the hooks ask."""
from typing import Dict

from torch import nn

from .layers import LogitScale, TextClassifier
from .text_providers import TextProvider


def text_providers(model: nn.Module) -> Dict[str, TextProvider]:
    """Find the text providers of a model.

    Args:
        model (nn.Module): The model, not wrapped.

    Returns:
        dict[str, TextProvider]: Providers by their module name.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TextProvider)
    }


def prompt_parameters(model: nn.Module) -> Dict[str, nn.Parameter]:
    """Find the parameters that only stage 2 learns.

    Args:
        model (nn.Module): The model, not wrapped.

    Returns:
        dict[str, nn.Parameter]: Parameters by their full name.
    """
    return {
        f'{name}.{key}': param
        for name, provider in text_providers(model).items()
        for key, param in provider.learnable().items()
    }


def text_parameters(model: nn.Module) -> Dict[str, nn.Parameter]:
    """Find everything that stage 2 learns by default.

    Args:
        model (nn.Module): The model, not wrapped.

    Returns:
        dict[str, nn.Parameter]: The prompts, the scales of similarities and
        the biases of text classifiers, by their full name.
    """
    params = prompt_parameters(model)
    for name, module in model.named_modules():
        if isinstance(module, LogitScale) and module.learnable:
            params[f'{name}.log_scale'] = module.log_scale
        if isinstance(module,
                      TextClassifier) and module.logit_bias is not None:
            params[f'{name}.logit_bias'] = module.logit_bias
    return params


def text_scales(model: nn.Module) -> Dict[str, float]:
    """Read the scales of similarities.

    Args:
        model (nn.Module): The model, not wrapped.

    Returns:
        dict[str, float]: Scales by their module name.
    """
    return {
        name: module().item()
        for name, module in model.named_modules()
        if isinstance(module, LogitScale)
    }
