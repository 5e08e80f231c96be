# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Weights of classes, taken over from a checkpoint by the classes' names."""
from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

from ...models.layers import TextClassifier
from ...models.text_parameters import text_providers
from ...utils.checkpoint import class_names

SHOWN = 10


def match_classes(model: nn.Module, checkpoint: dict,
                  names: Optional[Sequence[str]]) -> str:
    """Reorder the weights of a checkpoint to the classes of a data set.

    Without this a run that starts from a checkpoint of as many other classes
    takes their prompts, biases and classifiers for those of its own. Rows of
    classes that both have are found by name; those of the others begin as in
    a run without a checkpoint.

    Args:
        model (nn.Module): The model as it is before loading, not wrapped.
        checkpoint (dict): The checkpoint, whose ``state_dict`` is changed.
        names (Sequence[str], optional): The classes of the data set, in their
            order.

    Returns:
        str: What was done; '' if the classes are the same, or are not known
        on both sides.

    Raises:
        ValueError: If a class has no vector: neither the checkpoint nor the
            embeddings file of the config has one.
    """
    theirs = class_names(checkpoint.get('meta') or {})
    state = checkpoint.get('state_dict', checkpoint)
    if theirs is None or names is None or tuple(names) == theirs:
        return ''
    # Of names that occur twice the first, as everywhere.
    place = {name: k for k, name in reversed(list(enumerate(theirs)))}
    found = {k: place[name] for k, name in enumerate(names) if name in place}
    ours, source = list(found), list(found.values())
    for key, own in class_weights(model, len(names)).items():
        value = state.get(key)
        if value is None or len(value) != len(theirs) or (value.shape[1:]
                                                          != own.shape[1:]):
            continue  # MMEngine says so
        rows = own.detach().to(value, copy=True)
        rows[ours] = value[source]
        if key.endswith('.class_embeddings') and rows.isnan().any():
            raise ValueError(
                f'{key}: there are no vectors of the classes '
                f'{[n for n in names if n not in place][:SHOWN]}, which the '
                'checkpoint does not have. Make the embeddings file of the '
                'config (tools/encode_text.py).')
        state[key] = rows
    new = [name for name in names if name not in place]
    return ('The checkpoint is for other classes, or in another order. Rows '
            f'of prompts, biases and classifiers of {len(found)} classes were '
            'found by name and are kept; ' +
            (f'these {len(new)} begin anew: {new[:SHOWN]}'
             f'{" ..." if len(new) > SHOWN else ""}.'
             if new else 'there are no others.'))


def class_weights(model: nn.Module, number: int) -> Dict[str, Tensor]:
    """Find the weights that have a row for each class.

    Args:
        model (nn.Module): The model, not wrapped.
        number (int): Number of classes K of the data set.

    Returns:
        dict[str, Tensor]: By name: prompts and vectors of text providers,
        biases of text classifiers, and ``conv_seg`` of stock heads, or
        ``cls_seg`` of their further outputs, for that many classes.
    """
    keys: List[str] = []
    for name, provider in text_providers(model).items():
        keys += [f'{name}.{key}' for key in provider.class_rows()]
    for name, module in model.named_modules():
        if isinstance(module, TextClassifier):
            keys.append(f'{name}.logit_bias')
        elif (name.endswith(
            ('conv_seg', 'cls_seg')) and isinstance(module, nn.Conv2d)
              and module.out_channels == number):
            keys += [f'{name}.weight', f'{name}.bias']
    own = model.state_dict()
    return {
        key: own[key]
        for key in keys if key in own and own[key].dim()
        and len(own[key]) == number and torch.is_floating_point(own[key])
    }
