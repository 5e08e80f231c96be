# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Keep the text of a running model consistent, and look at it."""
from typing import Dict, List, Optional

from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from torch import nn

from mmseg_textkd.models.text_parameters import text_providers, text_scales
from mmseg_textkd.text.embedding_statistics import geometry


def unwrap(model: nn.Module) -> nn.Module:
    """Get the model out of a wrapper for distributed training.

    Args:
        model (nn.Module): The runner's model.

    Returns:
        nn.Module: The model itself.
    """
    return model.module if is_model_wrapper(model) else model


def averaged_models(runner) -> List[nn.Module]:
    """Get the copy of the model that EMAHook keeps, if there is one.

    Args:
        runner (Runner): The runner.

    Returns:
        list[nn.Module]: One model or none.
    """
    hook = _ema_hook(runner)
    return [] if hook is None else [hook.ema_model.module]


def check_classes(runner, dataloader) -> None:
    """Require the text to be for the classes of a dataset, in its order.

    Of text that does not know its names, as controls do not, the number is
    compared.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader | dict): A data loader; one that has not been
            built is passed over.

    Raises:
        EmbeddingFileError: If the classes differ, with the differences.
        ValueError: If their number differs.
    """
    dataset = getattr(dataloader, 'dataset', None)
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes is None:
        return
    for name, provider in text_providers(unwrap(runner.model)).items():
        record = getattr(provider, 'record', None)
        where = f'{type(dataset).__name__} ({name})'
        if record is not None:
            record.check_names(classes, where=where)
        elif provider.num_classes != len(classes):
            raise ValueError(
                f'The text is for {provider.num_classes} classes, but there '
                f'are {len(classes)} in {where}: {list(classes)}. Set '
                '`num_classes` of all heads to that number.')


def start_text(runner) -> None:
    """Let the text learn, also that of averaged models.

    Args:
        runner (Runner): The runner.
    """
    copies = [text_providers(m) for m in averaged_models(runner)]
    for name, provider in text_providers(unwrap(runner.model)).items():
        fresh = not getattr(provider, 'started', True)
        provider.start_learning()
        for copy in copies:
            copy[name].start_learning()
            if fresh:
                # Averages of prompts begin where the prompts do.
                copy[name].load_state_dict(provider.state_dict())


def refresh_text(runner) -> None:
    """Bring learned embeddings up to date, also those of averaged models.

    Args:
        runner (Runner): The runner.
    """
    for model in [unwrap(runner.model), *averaged_models(runner)]:
        for provider in text_providers(model).values():
            if provider.learning:
                provider.refresh()


def swap_text_with_average(runner) -> None:
    """Let the embeddings follow the parameters that EMAHook swaps.

    EMAHook swaps buffers too only with ``update_buffers=True``.

    Args:
        runner (Runner): The runner.
    """
    hook = _ema_hook(runner)
    if hook is None or hook.ema_model.update_buffers:
        return
    averaged = text_providers(hook.ema_model.module)
    for name, provider in text_providers(unwrap(runner.model)).items():
        current = provider.class_embeddings.clone()
        provider.class_embeddings.copy_(averaged[name].class_embeddings)
        averaged[name].class_embeddings.copy_(current)


def log_text(runner, stage: int) -> None:
    """Put stage, scale, cosines and drift where loggers find them.

    Args:
        runner (Runner): The runner.
        stage (int): The stage.
    """
    model, hub = unwrap(runner.model), runner.message_hub
    hub.update_scalar('train/text_stage', stage)
    for i, scale in enumerate(text_scales(model).values()):
        hub.update_scalar(f'train/text_scale{i or ""}', scale)
    for i, provider in enumerate(text_providers(model).values()):
        if provider.learning:
            provider.refresh()
        if not provider.filled or provider.num_classes < 2:
            continue
        facts = geometry(provider.class_embeddings.cpu())
        hub.update_scalar(f'train/text_cos_mean{i or ""}', facts['mean'])
        hub.update_scalar(f'train/text_cos_closest{i or ""}', facts['closest'])
        hub.update_scalar(f'train/text_drift{i or ""}', provider.drift())


def tower_checksums(model: nn.Module) -> Dict[str, str]:
    """Hash the text towers that are loaded.

    Args:
        model (nn.Module): The model, not wrapped.

    Returns:
        dict[str, str]: SHA-256 by the name of the provider.
    """
    towers = {
        name: getattr(provider, 'tower', None)
        for name, provider in text_providers(model).items()
    }
    return {n: t.checksum() for n, t in towers.items() if t is not None}


def _ema_hook(runner) -> Optional[EMAHook]:
    for hook in runner.hooks:
        if isinstance(hook, EMAHook) and hasattr(hook, 'ema_model'):
            return hook
    return None
