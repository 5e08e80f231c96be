# Copyright (c) mmseg_textkd contributors. All rights reserved.
from contextlib import contextmanager
from typing import Iterator

import torch
from mmengine.optim import OptimWrapper
from mmseg.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Optimizer wrapper of mixed precision (bfloat16) on CPUs.

    MMEngine's ``AmpOptimWrapper`` insists on a GPU. bfloat16 has the range
    of float32, so the loss is not scaled and the state of the optimizer is
    that of an ``OptimWrapper``.

    Args:
        **kwargs: Arguments of :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass of training under autocast.

        Args:
            model (nn.Module): The model in training.
        """
        with super().optim_context(model), torch.autocast(
                'cpu', dtype=torch.bfloat16):
            yield
