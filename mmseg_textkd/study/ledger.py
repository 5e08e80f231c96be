# Copyright (c) mmseg_textkd contributors. All rights reserved.
"""The ledger of a study: JSON lines, one when it is registered and one for
each finished run.
"""
import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

from .run import Run

NEEDED = {
    'study', 'network', 'arm', 'seed', 'train_fraction', 'config_hash',
    'iterations', 'classes', 'val', 'curve'
}
REGISTRATION = {'study', 'registered', 'baseline', 'arms', 'planned'}


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
        self._registered: Dict[str, List[Dict[str, Any]]] = {}
        if self.path.exists():
            try:
                lines = self.path.read_text(encoding='utf-8').split('\n')
            except (OSError, UnicodeDecodeError) as error:
                raise LedgerError(
                    f'{self.path} cannot be read as a ledger: {error}. It is '
                    'a file of JSON lines in UTF-8 (*.jsonl): give another '
                    'one, or restore it.') from error
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._take(self._parse(line, number), number)

    @property
    def entries(self) -> List[Dict[str, Any]]:
        """list[dict]: All entries, in the order of the file."""
        return list(self._entries.values())

    @property
    def studies(self) -> List[str]:
        """list[str]: Names of the registered studies."""
        return list(self._registered)

    def find(self, study: str, run: Run) -> Optional[Dict[str, Any]]:
        """Get the entry of a run.

        Args:
            study (str): Name of the study.
            run (Run): The run.

        Returns:
            dict, optional: Its entry; None if it has not been finished.
        """
        return self._entries.get((study, run))

    def registrations(self, study: str) -> List[Dict[str, Any]]:
        """Get what was written down of a study before its runs.

        Args:
            study (str): Name of the study.

        Returns:
            list[dict]: The registration and, where the study was changed
            later, its amendments.
        """
        return self._registered.get(study, [])

    def register(self, entry: Dict[str, Any], registered: str) -> bool:
        """Write down a study, unless it is there as it is.

        Args:
            entry (dict): Its name, plan, question and analysis.
            registered (str): Time of the registration.

        Returns:
            bool: Whether a line was added.
        """
        known = self.registrations(entry['study'])
        if known and {
                **known[-1], 'registered': None
        } == {
                **entry, 'registered': None
        }:
            return False
        self.append(dict(entry, registered=registered))
        return True

    def append(self, entry: Dict[str, Any]) -> None:
        """Add a line: it is there or it is not.

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
                'line: its run is then taken from its folder, or made anew.'
            ) from error
        if not isinstance(entry, dict):
            raise LedgerError(f'{where} is no JSON object.')
        needed = REGISTRATION if 'registered' in entry else NEEDED
        missing = needed - set(entry)
        if missing:
            raise LedgerError(f'{where} is neither a registration nor a run: '
                              f'it has no {sorted(missing)}.')
        return entry

    def _take(self, entry: Dict[str, Any], where: Union[int, str]) -> None:
        if 'registered' in entry:
            self._registered.setdefault(entry['study'], []).append(entry)
            return
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
