# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Queries on the text providers and the text parameters of a model."""
import os
from typing import Any, Collection, Dict, Optional

from mmengine.model import is_model_wrapper
from torch import nn
from torch.utils.data import Dataset

from mmseg_textkd.text.embedding_statistics import geometry
from .layers import LogitScale, TextClassifier
from .text_providers import TextProvider


def unwrap(model: nn.Module) -> nn.Module:
    """Get the model out of a wrapper for distributed training.

    Args:
        model (nn.Module): The runner's model.

    Returns:
        nn.Module: The model itself.
    """
    wrapper: Any = model
    return wrapper.module if is_model_wrapper(model) else model


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
    """Find the parameters that stage 2 learns by default.

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


def text_statistics(model: nn.Module) -> Dict[str, float]:
    """Compute the statistics of the text for the log.

    Args:
        model (nn.Module): The model, not wrapped.

    Returns:
        dict[str, float]: 'text_scale' of each scale of similarities, and
        'text_cos_mean', 'text_cos_closest' and 'text_distance' of each
        provider that is filled, as :func:`.geometry` and
        :meth:`TextProvider.distance_from_start` define them; the
        second of a kind ends in 1, and so on.
    """
    scales = [m for m in model.modules() if isinstance(m, LogitScale)]
    found = {
        f'text_scale{i or ""}': scale().item()
        for i, scale in enumerate(scales)
    }
    for i, provider in enumerate(text_providers(model).values()):
        if not provider.filled or provider.num_classes < 2:
            continue
        facts = geometry(provider.class_embeddings.cpu())
        found[f'text_cos_mean{i or ""}'] = facts['mean']
        found[f'text_cos_closest{i or ""}'] = facts['closest']
        found[f'text_distance{i or ""}'] = provider.distance_from_start()
    return found


def tower_checksums(model: nn.Module) -> Dict[str, str]:
    """Hash the text towers that are loaded.

    Args:
        model (nn.Module): The model, not wrapped.

    Returns:
        dict[str, str]: SHA-256 by the name of the provider.
    """
    return {
        name: provider.tower.checksum()
        for name, provider in text_providers(model).items()
        if getattr(provider, 'tower', None) is not None
    }


def check_text_losses(model: nn.Module) -> None:
    """Require that heads with text losses have computed them.

    They are computed in ``head.loss``. A segmentor that calls the head's
    ``forward`` and ``loss_by_feat`` itself leaves them out, and in the role
    'auxiliary' no text would be learned.

    Args:
        model (nn.Module): The model after an iteration, not wrapped.

    Raises:
        RuntimeError: If a head has not computed them.
    """
    for name, head in model.named_modules():
        if getattr(head, 'text_losses_computed', None) is False:
            raise RuntimeError(
                f'{name} has text losses that {type(model).__name__} does not '
                f'compute: it does not call `{name}.loss`, but its '
                'parts. Let its own `loss` call `self.decode_head.loss(inputs,'
                ' data_samples, self.train_cfg)`, as EncoderDecoder does, or '
                "use role='classifier' without `text_losses`.")


def check_prompts_learn(model: nn.Module,
                        learned: Collection[str]) -> Optional[str]:
    """Look for prompts to which no loss of their head gives a gradient.

    Args:
        model (nn.Module): The model, not wrapped.
        learned (Collection[str]): Names of the parameters of stage 2.

    Returns:
        str, optional: What is wrong, if other parameters learn.

    Raises:
        ValueError: If nothing else learns.
    """
    idle = {
        prompt: [type(loss).__name__ for loss in head.text_losses]
        for name, head in model.named_modules()
        if getattr(head, 'role', None) == 'auxiliary'
        and head.text_branch.fusion is None and not any(
            getattr(loss, 'trains_text', True) for loss in head.text_losses)
        for prompt in prompt_parameters(model)
        if prompt in learned and prompt.startswith(f'{name}.text_branch.')
    }
    if not idle:
        return None
    message = (
        f'the prompts {[*idle]} will learn nothing in stage 2: no gradient '
        f'goes to the text from {[*idle.values()][0]}, and '
        "role='auxiliary' has no other losses. Add TextAlignmentLoss to "
        "`text_losses`, use role='classifier', or set switch_at=None.")
    if idle.keys() >= set(learned):
        raise ValueError(message)
    return message


def check_classes(model: nn.Module, dataset: Dataset) -> None:
    """Require the text to be for the classes of a dataset, in its order.

    Of text without class names, such as controls, the number is compared.

    Args:
        model (nn.Module): The model, not wrapped.
        dataset (Dataset): A dataset; one without ``metainfo`` is skipped.

    Raises:
        EmbeddingFileError: If the classes differ, with the differences.
        ValueError: If their number differs, or a file of names is missing.
    """
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes is None:
        return
    if isinstance(classes, str):  # MMEngine keeps the path of no file
        raise ValueError(
            f'The classes of {type(dataset).__name__} are to be read from '
            f'{classes!r}, and there is no such file (working directory '
            f'{os.getcwd()}).')
    for name, provider in text_providers(model).items():
        record = getattr(provider, 'record', None)
        where = f'{type(dataset).__name__} ({name})'
        if record is not None:
            record.check_names(classes, where=where)
        elif provider.num_classes != len(classes):
            raise ValueError(
                f'The text is for {provider.num_classes} classes, but there '
                f'are {len(classes)} in {where}: {list(classes)}. Set '
                '`num_classes` of all heads to that number.')
