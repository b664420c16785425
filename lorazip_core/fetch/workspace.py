"""The directory that `fetch` fills: every adapter appears whole, and a run that was killed can be continued.

While a run lasts there is ``DIR/.lorazip-fetch`` with

    work/NAME/          an adapter whose files are arriving
    held/NAME/          a whole one that is to take the place of an older one, once everything has arrived
    old/NAME/           that older one, from then until the new lock is there
    journal.jsonl       the entry of the lock for every adapter that has arrived, written before it is put in its place
    lorazip.lock        the new lock, when everything has arrived: from then on the run is finished, not undone

A new adapter goes into place at once, so that what arrives is there whatever becomes of the rest. An update waits, so
that the old lock and the old adapters hold until the new ones do.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from pathlib import Path
from typing import Self

import msgspec

from ..errors import LocalError, UsageError
from ..files import canonical_json, safe_name, sync, sync_tree, write_file
from ..lock import LOCK_NAME, Lock, LockedAdapter, encode_lock, is_inner_path, read_lock

FOLDER = ".lorazip-fetch"
_JOURNAL = "journal.jsonl"


class Workspace:
    """The exclusive use of ``DIR`` for one run. Raises LocalError when another run has it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._folder = directory / FOLDER
        self._writing = threading.Lock()

    def __enter__(self) -> Self:
        self._made = not self.directory.exists()
        self._handle = self._locked()
        try:
            self._recover()
        except BaseException:
            os.close(self._handle)
            raise
        return self

    def _locked(self) -> int:
        """A descriptor of the folder, which the kernel's lock on it goes with; it ends with the process."""
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(self._folder, os.O_RDONLY)
            except FileNotFoundError:  # another run has just finished
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._folder.exists() and os.path.samestat(os.fstat(handle), self._folder.stat()):
                    return handle
            except BlockingIOError:
                os.close(handle)
                raise LocalError(
                    f"{self.directory}: another lorazip is fetching into it", "wait for it, or choose another -o"
                ) from None
            os.close(handle)

    def __exit__(self, *failure: object) -> None:
        """Leave the journal and what it holds if the run is not finished, and nothing if there is nothing."""
        shutil.rmtree(self._folder / "work", ignore_errors=True)
        for empty in (self._folder / "held", self._folder, *([self.directory] if self._made else [])):
            with contextlib.suppress(OSError):
                empty.rmdir()
        os.close(self._handle)

    def place(self, name: str) -> Path:
        """Where an adapter goes. Raises UsageError when a link on the way leads out of the directory."""
        path = self.directory / name
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.directory)):
            raise UsageError(f"{path} leads out of {self.directory}", "remove the link")
        return path

    def held(self, name: str) -> Path:
        """Where it waits."""
        return self._folder / "held" / safe_name(name)

    def work(self, name: str) -> Path:
        """An empty folder for its files."""
        folder = self._folder / "work" / safe_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def arrived(self, entry: LockedAdapter, folder: Path) -> None:
        """``folder``, from `work`, is whole: put it into its place if that is free, or hold it."""
        sync_tree(folder)
        place, held = self.place(entry.name), self.held(entry.name)
        with self._writing:
            with (self._folder / _JOURNAL).open("ab") as file:
                file.write(b"\n" + canonical_json(msgspec.to_builtins(entry)))  # apart from a line that was cut off
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(held, ignore_errors=True)
            if os.path.lexists(place):
                held.parent.mkdir(exist_ok=True)
                folder.rename(held)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(place)
                sync(place.parent)

    def finish(self, lock: Lock) -> None:
        """Put what is held into its place if ``lock`` has it, and take away what the old lock has and this one not.

        A lock that would not change stays as it is, its time of change too, which make goes by.
        """
        arrived = read_journal(self.directory)
        if not arrived and lock == read_lock(self.directory):
            return
        for entry in lock.adapters:
            if arrived.get(entry.name) != entry:  # held for an update that was given up
                shutil.rmtree(self.held(entry.name), ignore_errors=True)
        _replace(self._folder / LOCK_NAME, encode_lock(lock))  # half a lock would be in the way of every later run
        self._recover()

    def _recover(self) -> None:
        """Finish what `finish` began, from whatever point; a run that was killed before is left to be continued."""
        lock = read_lock(self._folder)
        if lock is None:
            for folder in ("work", "old"):
                shutil.rmtree(self._folder / folder, ignore_errors=True)
            for partial in self._folder.glob("*.partial"):
                partial.unlink()
            return
        for adapter in lock.adapters:
            held, place = self.held(adapter.name), self.place(adapter.name)
            if held.exists():
                self._take_away(adapter.name)
                place.parent.mkdir(parents=True, exist_ok=True)
                held.rename(place)
        old = read_lock(self.directory)
        dropped = {adapter.name for adapter in old.adapters} if old else set()
        for name in sorted(dropped - {adapter.name for adapter in lock.adapters}):
            self._take_away(name)
            with contextlib.suppress(OSError):  # it has others
                self.place(name).parent.rmdir()
        if lock == old:
            (self._folder / LOCK_NAME).unlink()
        else:
            (self._folder / LOCK_NAME).rename(self.directory / LOCK_NAME)
        sync(self.directory)
        for done in ("held", "old"):
            shutil.rmtree(self._folder / done, ignore_errors=True)
        self._forget({adapter.name for adapter in lock.adapters})

    def _forget(self, names: set[str]) -> None:
        """Strike out of the journal what the lock has; adapters of a source that has not all arrived stay in it."""
        left = [entry for name, entry in read_journal(self.directory).items() if name not in names]
        left = [entry for entry in left if self.place(entry.name).exists()]
        if left:
            lines = b"".join(canonical_json(msgspec.to_builtins(entry)) for entry in left)
            _replace(self._folder / _JOURNAL, lines)
        else:
            (self._folder / _JOURNAL).unlink(missing_ok=True)

    def _take_away(self, name: str) -> None:
        """Move the adapter that is in place aside, in one step; it goes when the new lock is there."""
        place, old = self.place(name), self._folder / "old" / safe_name(name)
        if os.path.lexists(place):
            shutil.rmtree(old, ignore_errors=True)
            old.parent.mkdir(exist_ok=True)
            place.rename(old)


def _replace(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    write_file(partial, data)
    partial.rename(path)
    sync(path.parent)


def read_journal(directory: Path) -> dict[str, LockedAdapter]:
    """The adapters that an unfinished run has brought into ``directory``, by name; the last entry of each counts."""
    try:
        lines = (directory / FOLDER / _JOURNAL).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    entries: dict[str, LockedAdapter] = {}
    for line in lines:
        try:
            entry = msgspec.json.decode(line, type=LockedAdapter)
        except msgspec.DecodeError:  # empty, or cut off by the end of the run
            continue
        if is_inner_path(entry.name):
            entries[entry.name] = entry
    return entries
