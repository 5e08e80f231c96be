# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Any, Iterable, Optional

from tqdm import tqdm


def track(items: Optional[Iterable],
          task: str,
          unit: str = 'image',
          total: Optional[int] = None,
          show: bool = True) -> Any:
    """Iterate with a progress bar on the standard error stream.

    It is drawn in a terminal only: in a log every step would be a line.

    Args:
        items (Iterable, optional): What is gone through. None: ``update()``
            of the result is called instead.
        task (str): What is done, such as 'Encoding text'.
        unit (str): What each item is. Defaults to 'image'.
        total (int, optional): Number of the items, where they have no
            ``len``. Defaults to None.
        show (bool): Whether to show it at all. Defaults to True.

    Returns:
        tqdm: The items, one after the other.
    """
    return tqdm(items, task, total, unit=unit, disable=None if show else True)
