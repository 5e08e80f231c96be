# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""A running process of a study."""
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, List, Optional

import mmseg_textkd
from .run import Run

# Keep freed memory. By default glibc hands each large tensor back to the
# system, which has to clear its pages when they are asked for again: a seventh
# of the time of a CPU training that was measured. Other allocators do not
# read these.
MALLOC = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**33)}


class Job:
    """A run that is being made.

    Args:
        run (Run): The run.
        folder (Path): Its work directory.
        lock (IO): Its lock. Processes inherit it, so that one that outlives
            a killed driver still holds it.
    """

    def __init__(self, run: Run, folder: Path, lock: IO) -> None:
        self.run = run
        self.folder = folder
        self.lock = lock
        self.process: Optional[subprocess.Popen] = None

    def start(self, words: List[str]) -> None:
        """Start a process that writes to the log of the run.

        Args:
            words (list[str]): The command after the name of Python.
        """
        package = str(Path(mmseg_textkd.__file__).parents[1])
        path = [package, os.environ.get('PYTHONPATH', '')]
        env = {**MALLOC, **os.environ}
        env['PYTHONPATH'] = os.pathsep.join(filter(None, path))
        with open(self.folder / 'log.txt', 'ab') as log:
            self.process = subprocess.Popen([sys.executable, *words],
                                            stdin=subprocess.DEVNULL,
                                            stdout=log,
                                            stderr=subprocess.STDOUT,
                                            pass_fds=(self.lock.fileno(), ),
                                            env=env)

    def stop(self) -> None:
        """End the process; the last checkpoint is kept."""
        self.process.terminate()
        # A suspended process handles signals only when it continues.
        self.process.send_signal(signal.SIGCONT)
        self.process.wait()
