# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Weights of classes, taken over from a checkpoint by the classes' names."""
from typing import Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ...models.fusion import ContextAwareText
from ...models.layers import TextClassifier
from ...models.layers.score_map import ScoreMap
from ...models.losses import SemanticStructureLoss
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
    if theirs is None or names is None:
        return ''
    for key in [key for key in state if key.startswith('module.')]:
        # As MMEngine does when it loads them.
        state[key.removeprefix('module.')] = state.pop(key)
    # Stock data sets have names such as 'bed '.
    theirs, names = ([name.strip() for name in n] for n in (theirs, names))
    if theirs == names:
        return ''
    # Of names that occur twice the first, as everywhere.
    place = {name: k for k, name in reversed(list(enumerate(theirs)))}
    found = {k: place[name] for k, name in enumerate(names) if name in place}
    ours, source = (
        torch.tensor(list(rows), dtype=torch.long)
        for rows in (found, found.values()))
    for key, (own, axes) in class_weights(model, len(names)).items():
        value = state.get(key)
        shape = list(own.shape)
        for axis in axes:
            shape[axis] = len(theirs)
        if value is None or list(value.shape) != shape:
            continue  # MMEngine says so
        rows = own.detach().to(value, copy=True)
        for axis in axes:
            value = value.index_select(axis, source.to(value.device))
        if axes == (0, ):
            rows[ours] = value
        else:
            rows[ours[:, None] if 0 in axes else slice(None), ours] = value
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


def class_weights(model: nn.Module,
                  number: int) -> Dict[str, Tuple[Tensor, Tuple[int, ...]]]:
    """Find the weights that have a row or a column for each class.

    Args:
        model (nn.Module): The model, not wrapped.
        number (int): Number of classes K of the data set.

    Returns:
        dict[str, tuple]: By name the weight and which of its axes are the
        classes: prompts and vectors of text providers, prototypes that a
        structure loss remembers,
        biases of text classifiers, and ``conv_seg`` of stock heads, or
        ``cls_seg`` of their further outputs, for that many classes.
    """
    keys: Dict[str, Tuple[int, ...]] = {}
    for name, provider in text_providers(model).items():
        keys.update({f'{name}.{key}': (0, ) for key in provider.class_rows()})
    for name, module in model.named_modules():
        if isinstance(module, TextClassifier):
            keys[f'{name}.logit_bias'] = (0, )
        elif isinstance(module, ScoreMap):
            for conv in module.convs:
                keys[f'{name}.convs.{conv}.weight'] = (1, )
        elif isinstance(module, SemanticStructureLoss):
            keys[f'{name}.memory'] = (0, )
        elif isinstance(module, ContextAwareText):
            keys[f'{name}.score_weight'] = (0, 1)
        elif (name.endswith(
            ('conv_seg', 'cls_seg')) and isinstance(module, nn.Conv2d)
              and module.out_channels == number):
            keys.update({f'{name}.weight': (0, ), f'{name}.bias': (0, )})
    own = model.state_dict()
    return {
        key: (own[key], axes)
        for key, axes in keys.items()
        if key in own and own[key].dim() and own[key].shape[axes[0]] == number
        and torch.is_floating_point(own[key])
    }
