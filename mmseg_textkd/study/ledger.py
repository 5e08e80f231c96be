# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The ledger of a study: one JSON line for each finished run."""
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from .plan import Run

NEEDED = {
    'study', 'network', 'arm', 'seed', 'train_fraction', 'config_hash',
    'iterations', 'classes', 'val', 'curve'
}


class LedgerError(ValueError):
    """A ledger with a line that cannot be used."""


class Ledger:
    """What has been measured, by run.

    Args:
        path (str or Path): The file. It need not exist.

    Raises:
        LedgerError: If a line is damaged or repeated, with its number.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        self._entries: Dict[Tuple[str, Run], Dict[str, Any]] = {}
        if self.path.exists():
            lines = self.path.read_text(encoding='utf-8').split('\n')
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._take(self._parse(line, number), number)

    @property
    def entries(self) -> List[Dict[str, Any]]:
        """list[dict]: All entries, in the order of the file."""
        return list(self._entries.values())

    def find(self, study: str, run: Run) -> Optional[Dict[str, Any]]:
        """Get the entry of a run.

        Args:
            study (str): Name of the study.
            run (Run): The run.

        Returns:
            dict, optional: Its entry; None if it has not been finished.
        """
        return self._entries.get((study, run))

    def append(self, entry: Dict[str, Any]) -> None:
        """Add the entry of a finished run: its line is there or it is not.

        Args:
            entry (dict): What JSON can hold.

        Raises:
            LedgerError: If the ledger has an entry of this run.
        """
        self._take(entry, 'the new line')
        data = (json.dumps(entry) + '\n').encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'ab', buffering=0) as file:
            # Other processes append, too. What they write at the end in one
            # call does not mix.
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell() and not _ends_with_newline(self.path):
                data = b'\n' + data
            size = file.tell()
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, 'no space for the whole line',
                                  str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def _parse(self, line: str, number: int) -> Dict[str, Any]:
        where = f'{self.path}, line {number}'
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise LedgerError(
                f'{where} is damaged ({error}). Restore it, or remove the '
                'line: its run will then be made again.') from error
        missing = NEEDED - set(entry) if isinstance(entry, dict) else NEEDED
        if missing:
            raise LedgerError(f'{where} is no entry of a run: it has no '
                              f'{sorted(missing)}.')
        return entry

    def _take(self, entry: Dict[str, Any], where: Union[int, str]) -> None:
        run = Run(entry['network'], entry['arm'], entry['seed'],
                  entry['train_fraction'])
        key = (entry['study'], run)
        if key in self._entries:
            raise LedgerError(f'{self.path}, line {where}: {run.name} of '
                              f'{entry["study"]} is there already. Remove one '
                              'of the two lines.')
        self._entries[key] = entry


def _ends_with_newline(path: Path) -> bool:
    with open(path, 'rb') as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b'\n'
