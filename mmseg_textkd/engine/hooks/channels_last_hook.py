# Copyright (c) mmseg_textkd contributors. All rights reserved.
import torch
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

from mmseg_textkd.models.text_parameters import unwrap


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Train and evaluate with weights in PyTorch's channels-last layout.

    Convolutions then output features in the same layout, without a
    conversion of the images. Values stay what they are, up to the order of
    sums. On a CPU, light networks with depthwise convolutions train faster so.

    Examples:
        >>> custom_hooks = [dict(type='ChannelsLastHook')]
    """

    def before_train(self, runner) -> None:
        """Convert the weights.

        Args:
            runner (Runner): The runner.
        """
        unwrap(runner.model).to(memory_format=torch.channels_last)

    before_val = before_test = before_train

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Save contiguous weights, which safetensors and others need.

        Args:
            runner (Runner): The runner of the training process.
            checkpoint (dict): The checkpoint that is about to be written.
        """
        state = checkpoint['state_dict']
        for key, value in state.items():
            state[key] = value.contiguous()
