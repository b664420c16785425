"""The directory that `fetch` fills: every adapter appears whole, and a run that was killed can be continued.

While a run lasts there is ``DIR/.lorazip-fetch`` with

    work/NAME/          an adapter whose files are arriving
    held/NAME/          a whole one that is to replace an older one, once everything has arrived
    old/NAME/           that older one, from then until the new lock is there
    journal.jsonl       the entry of the lock for every adapter that has arrived, written before its folder is renamed
    lorazip.lock        the new lock, when everything has arrived: from then on the run is finished, not undone

The folder of a new adapter is renamed to DIR/NAME at once, so that it stays whatever becomes of the rest. Updates wait
in ``held``, so that the old lock describes the old adapters until the new lock replaces it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from pathlib import Path
from typing import Self

import msgspec

from ..adapter.lock import LOCK_NAME, Lock, LockedAdapter, encode_lock, problem, read_lock, read_strictly
from ..base.atomic import atomic_write, lock_directory
from ..base.digests import canonical_json, safe_name
from ..base.errors import LocalError, OutputExists, UsageError
from ..base.filesystem import fsync, fsync_directories

FOLDER = ".lorazip-fetch"
_JOURNAL = "journal.jsonl"


class Workspace:
    """The exclusive use of ``DIR`` for one run. Raises LocalError when another run has it.

    A run that was killed after it had written its new lock is finished first; without ``recover`` that lock is dropped,
    and the one in ``DIR`` stays. Raises UsageError for links where its own files should be: they would lead elsewhere.
    """

    def __init__(self, directory: Path, *, recover: bool = True) -> None:
        self.directory = directory
        self._folder = directory / FOLDER
        self._writing = threading.Lock()
        self._finish_first = recover

    def __enter__(self) -> Self:
        self._made = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
        _refuse_link(self._folder)
        what = f"{self.directory}: another lorazip is fetching into it"
        busy = LocalError(what, "wait for it, or choose another «output»")
        self._lock = lock_directory(self._folder, busy)
        try:
            for path in self._folder.iterdir():
                _refuse_link(path)
            if not self._finish_first:
                (self._folder / LOCK_NAME).unlink(missing_ok=True)
            self._recover()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *failure: object) -> None:
        """Leave the journal and ``held`` of a run that is not finished; remove what is empty."""
        shutil.rmtree(self._folder / "work", ignore_errors=True)
        for empty in (self._folder / "held", self._folder, *self._made):
            with contextlib.suppress(OSError):
                empty.rmdir()
        os.close(self._lock)

    def held(self, name: str) -> Path:
        """The folder in which an update waits."""
        return self._folder / "held" / safe_name(name)

    def work(self, name: str) -> Path:
        """An empty folder for the files of an adapter."""
        folder = self._folder / "work" / safe_name(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def arrived(self, entry: LockedAdapter, folder: Path) -> None:
        """Move ``folder``, which `work` made and which is whole, to its place in ``DIR``, or hold it as an update."""
        fsync_directories(folder)
        target, held = adapter_folder(self.directory, entry.name), self.held(entry.name)
        with self._writing:
            with (self._folder / _JOURNAL).open("ab") as file:
                file.write(b"\n" + canonical_json(msgspec.to_builtins(entry)))  # apart from a line that was cut off
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(held, ignore_errors=True)
            if os.path.lexists(target):
                held.parent.mkdir(exist_ok=True)
                folder.rename(held)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                folder.rename(target)
                fsync(target.parent)

    def finish(self, lock: Lock) -> None:
        """Replace adapters by the updates that ``lock`` has, and remove those that only the old lock has.

        A lock that would not change is not written again: make goes by its modification time.
        """
        arrived = read_journal(self.directory)
        if not arrived and lock == read_lock(self.directory):
            return
        for entry in lock.adapters:
            if arrived.get(entry.name) != entry:  # held for an update that was given up
                shutil.rmtree(self.held(entry.name), ignore_errors=True)
        atomic_write(self._folder / LOCK_NAME, encode_lock(lock))  # half a lock would stop every later run
        fsync(self._folder)
        self._recover()

    def _recover(self) -> None:
        """Complete what `finish` began, wherever it was stopped. A run that did not get there can be continued."""
        try:
            lock = read_strictly(self._folder)
        except UsageError:  # no run has left this; the lock in the directory holds
            (self._folder / LOCK_NAME).unlink()
            lock = None
        if lock is None:
            for folder in ("work", "old"):
                shutil.rmtree(self._folder / folder, ignore_errors=True)
            for partial in self._folder.glob("*.partial"):
                partial.unlink()
            return
        for adapter in lock.adapters:
            held, target = self.held(adapter.name), adapter_folder(self.directory, adapter.name)
            if held.exists():
                self._take_away(adapter.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                held.rename(target)
        old = read_lock(self.directory)
        dropped = {adapter.name for adapter in old.adapters} if old else set()
        for name in sorted(dropped - {adapter.name for adapter in lock.adapters}):
            self._take_away(name)
            with contextlib.suppress(OSError):  # it has others
                adapter_folder(self.directory, name).parent.rmdir()
        if lock == old:
            (self._folder / LOCK_NAME).unlink()
        else:
            (self._folder / LOCK_NAME).rename(self.directory / LOCK_NAME)
        fsync(self.directory)
        for done in ("held", "old"):
            shutil.rmtree(self._folder / done, ignore_errors=True)
        self._forget({adapter.name for adapter in lock.adapters})

    def _forget(self, names: set[str]) -> None:
        """Remove from the journal what the lock has; adapters of a source that is not complete stay in it."""
        left = [entry for name, entry in read_journal(self.directory).items() if name not in names]
        left = [entry for entry in left if adapter_folder(self.directory, entry.name).exists()]
        if left:
            lines = b"".join(canonical_json(msgspec.to_builtins(entry)) for entry in left)
            atomic_write(self._folder / _JOURNAL, lines)
            fsync(self._folder)
        else:
            (self._folder / _JOURNAL).unlink(missing_ok=True)

    def _take_away(self, name: str) -> None:
        """Rename the present adapter into ``old``, from which it is removed when the new lock is there."""
        target, old = adapter_folder(self.directory, name), self._folder / "old" / safe_name(name)
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
            old.parent.mkdir(exist_ok=True)
            target.rename(old)


def adapter_folder(directory: Path, name: str) -> Path:
    """The folder of the adapter ``name``.

    Raises UsageError for a link on the way, which would lead elsewhere or make one folder of two, and OutputExists for
    a file.
    """
    target = directory
    for part in Path(name).parts[:-1]:
        target = target / part
        if target.is_symlink():
            raise UsageError(f"{target} is a link, and adapters would go where it leads", "remove it")
        if target.exists() and not target.is_dir():
            raise OutputExists(f"{target} is a file, and adapters are to go there", "move it away")
    return target / Path(name).name


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UsageError(f"{path} is a link, and lorazip keeps its own files there", "remove it")


def read_journal(directory: Path) -> dict[str, LockedAdapter]:
    """The adapters that an unfinished run has fetched into ``directory``, by name; the last entry of each counts."""
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
        if problem(entry) is None:
            entries[entry.name] = entry
    return entries
