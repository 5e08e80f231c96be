# Copyright (c) mmseg_textkd contributors. All rights reserved.
import atexit
import logging
from typing import Any, Dict

import torch.distributed as dist
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
# MMEngine's runner looks up the class in its own registry only.
from mmengine.registry import MODEL_WRAPPERS
from torch import nn


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """Distributed training of a model on CPUs.

    Synchronized batch norm, which torch has on GPUs only, becomes plain batch
    norm: each rank then normalizes by its own part of the batch.

    Args:
        module (nn.Module): The model.
        broadcast_buffers (bool): Whether rank 0's buffers replace those of
            the others before each step. Defaults to False, as in MMEngine's
            runner.
        **kwargs: Arguments of :class:`MMDistributedDataParallel`.
            ``device_ids`` is ignored: the runner names a CUDA device.
    """

    def __init__(self,
                 module: nn.Module,
                 broadcast_buffers: bool = False,
                 **kwargs: Any) -> None:
        # By name: there are torch's and mmcv's, and mmcv-lite has none.
        synchronized = sum(
            type(m).__name__ == 'SyncBatchNorm' for m in module.modules())
        if synchronized:
            module = revert_sync_batchnorm(module)
            print_log(
                f'{synchronized} SyncBN layers became plain batch norm, as '
                'SyncBN needs a GPU: each rank has statistics of its own, and '
                'rank 0 saves its own.', 'current', logging.WARNING)
        kwargs['device_ids'] = None
        super().__init__(
            module=module, broadcast_buffers=broadcast_buffers, **kwargs)


def join_cpu_ranks(cfg: Config) -> Dict[str, Any]:
    """Initialize the process group of distributed training on CPUs.

    MMEngine would require a CUDA device for each process that torchrun has
    started, unless the process group, here over gloo, exists before.

    Args:
        cfg (Config): The config of the run.

    Returns:
        dict: Options to merge into the config: how to wrap the model. Empty
        if the config has its own ``model_wrapper_cfg``.
    """
    if not dist.is_initialized():
        dist.init_process_group('gloo')
        # Its threads would end the process with an error now and then.
        atexit.register(dist.destroy_process_group)
    if cfg.get('model_wrapper_cfg'):
        return {}
    return dict(
        model_wrapper_cfg=dict(
            type='CPUDistributedDataParallel',
            find_unused_parameters=cfg.get('find_unused_parameters', False)))
