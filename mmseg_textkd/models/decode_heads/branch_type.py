# Copyright (c) mmseg_textkd contributors. All rights reserved.
from inspect import isclass
from typing import Optional

from mmseg.registry import MODELS

from ..layers import TextBranch, TextClassifier


def branch_type(name: Optional[str], role: str,
                fusion: Optional[dict]) -> type:
    """Get the class of a head's text branch.

    Args:
        name (str, optional): The ``type`` that ``text_branch`` names.
        role (str): 'classifier' or 'auxiliary'.
        fusion (dict, optional): Config of the fusion. One whose losses
            compare logits needs a classifier in either role.

    Returns:
        type: A :class:`TextClassifier`, or a :class:`TextBranch` where
        nothing is classified by text.

    Raises:
        ValueError: If the type is no text classifier or not for the role.
    """
    if name is None:
        if role == 'classifier' or _needs_classifier(fusion):
            return TextClassifier
        return TextBranch
    if role != 'classifier':
        raise ValueError(
            f"`text_branch` of the type {name!r} needs role='classifier': in "
            "the role 'auxiliary' the stock classifier decides.")
    kind = MODELS.get(name) if isinstance(name, str) else name
    if not (isclass(kind) and issubclass(kind, TextClassifier)):
        raise ValueError(f'`type` of `text_branch` must be a TextClassifier, '
                         f'but got {name!r}.')
    return kind


def _needs_classifier(fusion: Optional[dict]) -> bool:
    kind = (fusion or {}).get('type')
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    return getattr(kind, 'needs_classifier', False)
