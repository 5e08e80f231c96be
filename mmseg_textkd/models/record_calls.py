# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Recording of the inputs and outputs of a module."""
from contextlib import contextmanager
from typing import Any, Iterator, List, Optional, Tuple

from torch import Tensor, nn


@contextmanager
def record_calls(
        module: Optional[nn.Module]) -> Iterator[List[Tuple[Any, Tensor]]]:
    """Record the calls of a module while the context lasts.

    Args:
        module (nn.Module, optional): A module of one input or none and one
            output. Of None no call is recorded.

    Yields:
        list[tuple[Tensor | None, Tensor]]: Input and output of each call.
    """
    calls: List[Tuple[Any, Tensor]] = []
    if module is None:
        yield calls
        return
    handle = module.register_forward_hook(
        lambda module, args, output: calls.append((args[0]
                                                   if args else None, output)))
    try:
        yield calls
    finally:
        handle.remove()
