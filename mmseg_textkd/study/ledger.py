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
# What must be the same where a run is there twice: not when and where.
RESULT = ('config_hash', 'iterations', 'classes', 'val', 'test', 'curve')
REGISTRATION = {'study', 'registered', 'baseline', 'arms', 'planned'}


class LedgerError(ValueError):
    """A ledger with a line that cannot be used."""


class Ledger:
    """What has been measured, by run.

    Several processes may read and write it at once.

    Args:
        path (str or Path): The file. It need not exist.

    Raises:
        LedgerError: If a line is damaged, or there are two results of a run,
            with the numbers of the lines. A run that is there twice with the
            same result counts once.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        self._entries: Dict[Tuple[str, Run], Dict[str, Any]] = {}
        self._registered: Dict[str, List[Dict[str, Any]]] = {}
        self._lines: Dict[Tuple[str, Run], int] = {}
        self.reload()

    def reload(self) -> None:
        """Read what is in the file now.

        Raises:
            LedgerError: As of the class.
        """
        if self.path.exists():
            try:
                with open(self.path, 'rb') as file:
                    # Else the last line may be one that is being written.
                    fcntl.flock(file, fcntl.LOCK_SH)
                    self._read(file.read())
            except (OSError, UnicodeDecodeError) as error:
                raise LedgerError(
                    f'{self.path} cannot be read as a ledger: {error}. It is '
                    'a file of JSON lines in UTF-8 (*.jsonl): give another '
                    'one, or restore it.') from error

    def _read(self, data: bytes, strict: bool = True) -> None:
        """Take all lines; without ``strict`` those that are whole."""
        for kept in (self._entries, self._registered, self._lines):
            kept.clear()
        for number, line in enumerate(data.decode('utf-8').split('\n'), 1):
            if line.strip():
                try:
                    self._take(self._parse(line, number), number)
                except LedgerError:
                    if strict:
                        raise

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
        """Get the registrations of a study.

        Args:
            study (str): Name of the study.

        Returns:
            list[dict]: The registration and, where the study was changed
            later, its amendments.
        """
        return self._registered.get(study, [])

    def register(self, entry: Dict[str, Any], registered: str) -> bool:
        """Register a study, unless it is registered unchanged.

        Args:
            entry (dict): Its name, plan, question and analysis.
            registered (str): Time of the registration.

        Returns:
            bool: Whether a line was added.

        Raises:
            OSError: If nothing can be added, also later.
        """
        self.reload()
        # Opens the file in any case: hours of training come before the next
        # line.
        return self.append(dict(entry, registered=registered))

    def append(self, entry: Dict[str, Any]) -> bool:
        """Append a line atomically.

        Args:
            entry (dict): What JSON can hold.

        Returns:
            bool: Whether a line was added; not if the ledger has this result
            of the run, as of another process.

        Raises:
            LedgerError: If the ledger has another result of the run.
        """
        text = json.dumps(entry)
        # As it will be read: a tuple as a list.
        entry, data = json.loads(text), f'{text}\n'.encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, 'a+b', buffering=0) as file:
            # Until the file is closed nobody else appends or reads.
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            before = file.read()
            # Others have added to it. What is damaged stops who begins.
            self._read(before, strict=False)
            if not self._is_new(entry, 'the new line'):
                return False
            if before and not before.endswith(b'\n'):
                data = b'\n' + data
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, 'no space for the whole line',
                                  str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self._take(entry, (before + data).count(b'\n'))
        return True

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

    def _take(self, entry: Dict[str, Any], number: int) -> None:
        if not self._is_new(entry, f'line {number}'):
            return
        if 'registered' in entry:
            self._registered.setdefault(entry['study'], []).append(entry)
        else:
            key = _key(entry)
            self._entries[key], self._lines[key] = entry, number

    def _is_new(self, entry: Dict[str, Any], where: str) -> bool:
        """Whether there is no such registration, or result of the run, yet."""
        if 'registered' in entry:
            known = self.registrations(entry['study'])[-1:]
            return [dict(k, registered=entry['registered'])
                    for k in known] != [entry]
        key = _key(entry)
        known = self._entries.get(key)
        if known is None:
            return True
        other = [k for k in RESULT if entry.get(k) != known.get(k)]
        if other:
            raise LedgerError(
                f'{self.path}, {where}: {key[1].name} of {key[0]} is there '
                f'already, in line {self._lines[key]}, with other {other}. '
                'Remove one of the two lines.')
        return False


def _key(entry: Dict[str, Any]) -> Tuple[str, Run]:
    """Study and run of an entry."""
    return entry['study'], Run(entry['network'], entry['arm'], entry['seed'],
                               entry['train_fraction'])
