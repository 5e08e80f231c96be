# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Loading of CLIP models with open_clip, from local weights."""
import logging
from pathlib import Path
from typing import Any, Optional, Tuple

from mmengine.logging import print_log
from torch import nn

from .weights import (BPE_NAME, LOCAL, PathLike, TextTowerError,
                      WeightsLocation, expand, find_weights, import_open_clip,
                      warn_of_activation)


def load_clip(
        model: str,
        pretrained: Optional[str] = None,
        cache_dir: Optional[PathLike] = None) -> Tuple[nn.Module, Any, str]:
    """Load the text encoder of a CLIP model and its tokenizer.

    Args:
        model (str): See :class:`TextTower`.
        pretrained (str, optional): Tag or weights file. Defaults to None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None.

    Returns:
        tuple: The open_clip model without its image encoder (float32, on the
        CPU), the tokenizer, and the name and version of the library.

    Raises:
        TextTowerError: If open_clip or the weights are missing or damaged.
    """
    open_clip = import_open_clip()
    location = find_weights(model, pretrained, cache_dir)
    clip = _load_model(open_clip, model, location)
    warn_of_activation(model, pretrained, location)
    for name in ('visual', 'text_decoder'):
        if hasattr(clip, name):
            delattr(clip, name)
    return (clip, _load_tokenizer(open_clip, model, location, cache_dir),
            f'open_clip_torch {open_clip.__version__}')


def load_visual(
        model: str,
        pretrained: Optional[str] = None,
        cache_dir: Optional[PathLike] = None) -> Tuple[nn.Module, float]:
    """Load the image encoder of a CLIP model.

    Args:
        model (str): See :class:`TextTower`.
        pretrained (str, optional): Tag or weights file. Defaults to None.
        cache_dir (str or PathLike, optional): Download cache. Defaults to
            None.

    Returns:
        tuple: The image encoder of the open_clip model (float32, on the CPU,
        with ``preprocess_cfg``), and the model's factor on cosines.

    Raises:
        TextTowerError: If open_clip or the weights are missing or damaged.
    """
    open_clip = import_open_clip()
    location = find_weights(model, pretrained, cache_dir)
    if location.pretrained and location.preprocess is None:
        print_log(
            f'{location.pretrained}: how images were normalized in its '
            f'training is not known, the tags of {model} differ. They are as '
            'for OpenAI\'s weights; if that is wrong, name the tag, or use a '
            f'{LOCAL} folder.', 'current', logging.WARNING)
    clip = _load_model(open_clip, model, location)
    return clip.visual, clip.logit_scale.exp().item()


def _load_model(open_clip: Any, model: str,
                location: WeightsLocation) -> nn.Module:
    """Load a model in float32."""
    try:
        clip = open_clip.create_model(
            location.name,
            pretrained=location.pretrained,
            precision='fp32',
            device='cpu',
            # With a file in place of the tag, open_clip cannot infer these.
            force_quick_gelu=location.quick_gelu,
            force_preprocess_cfg=location.preprocess,
            require_pretrained=True)
    except Exception as error:
        raise TextTowerError(
            f'The tower {model!r} was found at '
            f'{location.pretrained or location.name}, but cannot be loaded: '
            f'{error}\nThe file may be damaged, of another architecture, or a '
            'TorchScript archive such as OpenAI\'s original .pt files (use '
            'the tag `openai`, or the same weights as safetensors).'
        ) from error
    return clip.float()


def _load_tokenizer(open_clip: Any, model: str, location: WeightsLocation,
                    cache_dir: Optional[PathLike]) -> Any:
    """Get the tokenizer that belongs to a model."""
    kwargs = {}
    if location.name.startswith(LOCAL):
        vocabulary = Path(location.name[len(LOCAL):]) / BPE_NAME
        if vocabulary.is_file():
            kwargs['bpe_path'] = str(vocabulary)
    try:
        return open_clip.get_tokenizer(
            location.name, cache_dir=expand(cache_dir), **kwargs)
    except Exception as error:
        raise TextTowerError(
            f'The tokenizer of the text tower {model!r} cannot be had: '
            f'{error}') from error
