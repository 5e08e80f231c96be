# Copyright (c) mmseg_textkd contributors. All rights reserved.
import hashlib
from typing import List, Tuple

import torch
from torch import Tensor, nn


def checksum(module: nn.Module) -> str:
    """Hash all weights of a module, to prove that nothing has touched them.

    Args:
        module (nn.Module): The module.

    Returns:
        str: SHA-256 over names, types, shapes and bytes of all parameters and
        buffers, in hexadecimal digits.
    """
    digest = hashlib.sha256()
    tensors: List[Tuple[str, Tensor]] = [
        *module.named_parameters(), *module.named_buffers()
    ]
    for name, value in sorted(tensors, key=lambda item: item[0]):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)};'.encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
