# Copyright (c) mmseg_textkd contributors. All rights reserved.
import copy
from abc import ABCMeta, abstractmethod
from typing import Any, Dict, Optional, Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmseg_textkd.utils.checkpoint import checksum


class _Unregistered:
    """Holder of a network outside the module tree; copies share it."""

    def __init__(self) -> None:
        self.network: Optional[nn.Module] = None
        # Of other dtypes: those that share it may be of several.
        self.copies: Dict[torch.dtype, nn.Module] = {}

    def __deepcopy__(self, memo: Dict[int, Any]) -> '_Unregistered':
        return self


class FrozenTower(BaseModule, metaclass=ABCMeta):
    """Base of frozen image encoders with a learnable positional embedding.

    The positional embedding is a parameter, initialized from that of the
    network. The network is no part of the module tree: it is in no
    optimizer, no checkpoint and no broadcast of distributed training, and an
    averaged model shares it. It is loaded by :meth:`init_weights`, or on first
    use in inference, so that building needs neither its library nor its
    weights.

    Args:
        mean (Sequence[float]): Mean of each channel that the network was
            trained with, RGB, in [0, 255].
        std (Sequence[float]): Standard deviation of each channel, likewise.
        position (Sequence[int]): Shape of the positional embedding. It must
            be known before the network is loaded, because the embedding is in
            the optimizer by then.
    """

    # Name of the positional embedding in the network.
    position_name = 'positional_embedding'

    def __init__(self, mean: Sequence[float], std: Sequence[float],
                 position: Sequence[int]) -> None:
        super().__init__()
        for name, value in (('mean', mean), ('std', std)):
            self.register_buffer(
                name,
                torch.tensor(value, dtype=torch.float).view(-1, 1, 1),
                persistent=False)
        self._holder = _Unregistered()
        self.positional_embedding = nn.Parameter(torch.zeros(*position))
        self._filled = False

    @abstractmethod
    def load_network(self) -> nn.Module:
        """Load the network with its weights.

        Returns:
            nn.Module: The network.
        """

    @property
    def network(self) -> nn.Module:
        """nn.Module: The frozen network, loaded on first use."""
        if self._holder.network is None:
            network = self.load_network()
            self._holder.network = network.requires_grad_(False).eval()
        if not self._filled:
            with torch.no_grad():
                self.positional_embedding.copy_(
                    getattr(self._holder.network, self.position_name))
            self._filled = True
        return self._holder.network

    def _load_from_state_dict(self, state_dict, prefix, *args,
                              **kwargs) -> None:
        """Load the positional embedding in place of the network's."""
        value = state_dict.get(prefix + 'positional_embedding')
        if value is not None and (value.shape
                                  == self.positional_embedding.shape):
            self._filled = True
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def init_weights(self) -> None:
        """Load the network, so that missing weights are reported at once."""
        super().init_weights()
        self.network

    def network_for(self, pixels: Tensor) -> nn.Module:
        """Get the network on the device and of the dtype of the images.

        Args:
            pixels (Tensor): Images with shape (N, 3, H, W).

        Returns:
            nn.Module: The network, on their device and of their dtype.
        """
        network, dtype = self.network, pixels.dtype
        if next(network.parameters()).dtype != dtype:
            copies = self._holder.copies
            if dtype not in copies:
                copies[dtype] = copy.deepcopy(network).to(dtype)
            network = copies[dtype]
        if next(network.parameters()).device != pixels.device:
            network.to(pixels.device)
        return network

    def normalize(self, pixels: Tensor) -> Tensor:
        """Normalize images for the network.

        Args:
            pixels (Tensor): RGB in [0, 255], shape (N, 3, H, W).

        Returns:
            Tensor: Images of the same shape.
        """
        return (pixels - self.mean) / self.std

    def checksum(self) -> str:
        """Hash the weights of the frozen network.

        Returns:
            str: SHA-256 of all of them.
        """
        return checksum(self.network)
