# Copyright (c) mmseg_textkd contributors. All rights reserved.
from typing import Tuple

__version__ = '0.1.0'


def parse_version_info(version: str) -> Tuple[int, ...]:
    """Parse a version string.

    Args:
        version (str): A plain release, such as ``'0.1.0'``.

    Returns:
        tuple[int, ...]: Such as ``(0, 1, 0)``.
    """
    return tuple(int(part) for part in version.split('.'))


version_info = parse_version_info(__version__)
