# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Dict

import torch.distributed as dist
from mmengine.config import Config


def join_cpu_ranks(cfg: Config) -> Dict[str, Any]:
    """Let the processes that torchrun started work together on CPUs.

    MMEngine would ask for a CUDA device for each of them. It does not where
    the process group exists, so this one, over gloo, is made before.

    Args:
        cfg (Config): The config of the run.

    Returns:
        dict: Options to merge into the config: how to wrap the model. Empty
        if the config says that itself in ``model_wrapper_cfg``.
    """
    if not dist.is_initialized():
        dist.init_process_group('gloo')
    if cfg.get('model_wrapper_cfg'):
        return {}
    return dict(
        model_wrapper_cfg=dict(
            type='CPUDistributedDataParallel',
            find_unused_parameters=cfg.get('find_unused_parameters', False)))
