# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""Read checkpoints that others wrote, and write files whole."""
import os
from pathlib import Path
from typing import Mapping

from mmseg_textkd.checkpoint import load_strictly, read_checkpoint

__all__ = ['load_strictly', 'read_checkpoint', 'write_files']


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files so that none is there before all are whole.

    Args:
        files (Mapping[Path, bytes]): Contents by path; folders must exist.

    Raises:
        OSError: If one cannot be written; none is then.
    """
    temporary = {
        path: path.with_name(f'.{path.name}.{os.getpid()}.tmp')
        for path in files
    }
    try:
        for path, data in files.items():
            with open(temporary[path], 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
