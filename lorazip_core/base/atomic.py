"""Files and directories that appear whole or not at all, and the lock on a directory that one process works in."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import Interrupted, LocalError, OutputExists
from .filesystem import check_parent, fsync, fsync_directories, fsync_files, naming, raise_error, write_file

NotOurs = Callable[[Path], str | None]
"""Why a directory may not be replaced, in words that name what lorazip did not write in it; None if it may be."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
MARKER = ".lorazip"
"""The file by which lorazip knows its own unfinished directories."""

_WORK = ".work-"  # and the key of the work


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file beside ``path``, fsync it, and rename it to ``path``.

    A process that is killed leaves ``.NAME.*.partial``.
    """
    partial = path.with_name(f".{path.name[:100]}.{os.urandom(4).hex()}.partial")
    try:
        write_file(partial, data)
        fsync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def lock_directory(folder: Path, busy: LocalError) -> int:
    """Make ``folder`` if need be, and lock it until the descriptor that is returned is closed or the process ends.

    Raises ``busy`` if another process has the lock, and OSError if ``folder`` is a file or a link.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # who had it locked has just removed or renamed it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(lock), folder.stat()):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise busy from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def atomic_directory(target: Path, *, force: bool, not_ours: NotOurs) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    It is built beside its target as ``.NAME.partial``, and its files are fsynced when the block ends. A process that is
    killed leaves that folder, which the next run clears: a lock on it shows whether a process still works on it, and a
    marker in it that lorazip made it. With ``force`` an old ``target`` is exchanged for the new one in one step, so
    that at any moment one of the two is there, whole.

    Raises OutputExists when there is a ``target`` and not ``force``, or when what would have to go is ``not_ours``;
    LocalError when another process builds the same target, or when what would have to go cannot be removed.
    """
    with resumable_directory(target, force=force, not_ours=not_ours, resumable=False) as building:
        yield building.path


class Building:
    """A directory that is being built, and a folder in it for what a later run can go on from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_work = False
        """Whether this run has asked for its folder for work; what is there before is of earlier runs."""

    def work(self, key: str) -> Path:
        """The folder for finished pieces of the work called ``key``: with what an interrupted run of that key left.

        What other keys left is removed. Files whose names start with a point are not finished, and count as nothing.
        """
        mine = self.path / f"{_WORK}{key}"
        for folder in self.path.glob(f"{_WORK}*"):
            if folder != mine:
                shutil.rmtree(folder)
        mine.mkdir(exist_ok=True)
        self.has_work = True
        return mine


@contextmanager
def resumable_directory(target: Path, *, force: bool, not_ours: NotOurs, resumable: bool = True) -> Iterator[Building]:
    """As `atomic_directory`, but what is finished in the folder of `Building.work` outlives an interruption.

    It stays in ``.NAME.partial`` when the process is killed, or when KeyboardInterrupt ends the block, which is then
    raised as Interrupted. Any other failure removes it.
    """
    target = Path(os.path.realpath(target))
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    check_parent(target)
    lock = _take_over(partial, target, not_ours, resumable)
    building = Building(partial)
    try:
        with naming(target, errno.ENOSPC, errno.EDQUOT):
            _recover(target, partial, old, not_ours)
            check_output(target, force=force, not_ours=not_ours)
            yield building
            work = list(partial.glob(f"{_WORK}*"))
            fsync_files(partial, without=[folder.name for folder in work])
            for folder in work:
                shutil.rmtree(folder)
            (partial / MARKER).unlink()
            fsync_directories(partial)
            check_output(target, force=force, not_ours=not_ours)
            if target.exists():
                _exchange_or_rename(target, partial, old)
                with suppress(OSError):  # the new one is in its place: what is left of the old is waste
                    _remove(partial)
            else:
                partial.rename(target)
            fsync(target.parent)
    except KeyboardInterrupt as interruption:
        if resumable and _finished_work(partial):
            _clear(partial, keep_work=True)
            what, command = "what was finished", "the same command"
            if not building.has_work:
                what, command = "what an earlier run has finished", "the command of that run"
            raise Interrupted(
                f"interrupted; {what} is kept in {partial}",
                f"{command} goes on from there; remove that folder if you do not want it",
            ) from interruption
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _take_over(partial: Path, target: Path, not_ours: NotOurs, keep_work: bool) -> int:
    """Lock ``partial``, made or left by a run that has ended, and clear it; the descriptor that holds the lock."""
    busy = LocalError(f"{target}: another lorazip is writing it", "wait for it, or choose another «output»")
    try:
        lock = lock_directory(partial, busy)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):  # a file or a link
            raise _not_written_by_us(partial, None) from None
        raise
    try:
        if not (partial / MARKER).exists() and (why := _objection(partial, not_ours)):
            raise _not_written_by_us(partial, why)
        _unlock(partial)
        (partial / MARKER).touch()
        _clear(partial, keep_work=keep_work)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _recover(target: Path, partial: Path, old: Path, not_ours: NotOurs) -> None:
    """Finish what a process that was killed between the renames of `_exchange_or_rename` left."""
    if not os.path.lexists(old):
        return
    if old.is_symlink() or not old.is_dir():
        raise _not_written_by_us(old, None)
    if why := _objection(old, not_ours):
        raise _not_written_by_us(old, why)
    if target.exists():
        _unlock(old)
        old.rename(partial / "old")
        shutil.rmtree(partial / "old")
    else:
        old.rename(target)


def _not_written_by_us(path: Path, why: str | None) -> OutputExists:
    """That ``path``, which lorazip would make for itself, is there and is somebody else's."""
    return OutputExists(f"{path} exists and was not written by lorazip{f': {why}' if why else ''}", "move it away")


def check_output(target: Path, *, force: bool, not_ours: NotOurs) -> None:
    """Raise OutputExists if the directory ``target`` may not be written, LocalError or OSError if it cannot be.

    Called early too, so that no work is done in vain.
    """
    if not os.path.lexists(target):
        check_parent(target)
        return
    if not force:
        raise OutputExists(f"{target} exists", "choose another «output», or «force» to replace it")
    why = _objection(target, not_ours) if target.is_dir() else "it is not a directory"
    if why is not None:
        raise OutputExists(
            f"{target} exists and was not written by lorazip: {why}", "remove it yourself if you are sure"
        )
    check_parent(target)
    for folder, _, _ in os.walk(target, onerror=raise_error):
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            hint = "chmod -R u+w, or choose another «output»"
            raise LocalError(f"{folder} is read-only and cannot be replaced", hint)


def _objection(folder: Path, not_ours: NotOurs) -> str | None:
    """Why a folder may not be replaced; an empty one always may."""
    return not_ours(folder) if any(folder.iterdir()) else None


def _exchange_or_rename(target: Path, new: Path, old: Path) -> None:
    """Put ``new`` in the place of ``target``; what was there ends as ``new``, marked as waste."""
    if not _exchange(new, target):
        try:
            target.rename(old)
            new.rename(target)
            old.rename(new)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    with suppress(OSError):  # not marked, it is known by what it holds
        (new / MARKER).touch()


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step where the kernel can (Linux: renameat2 with RENAME_EXCHANGE)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


def _remove(folder: Path) -> None:
    """Remove a folder of lorazip's own, read-only folders in it too."""
    _unlock(folder)
    shutil.rmtree(folder)


def _unlock(folder: Path) -> None:
    """Make a folder and those below it writable, so that what is in them can be removed."""
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        folder.chmod(0o700)
    with os.scandir(folder) as entries:
        below = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    for each in below:
        _unlock(each)


def _clear(folder: Path, *, keep_work: bool) -> None:
    """Remove all but the marker, and folders of work if they are to be kept."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            if not (keep_work and entry.name.startswith(_WORK)):
                shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()


def _finished_work(partial: Path) -> bool:
    """Whether a run that was interrupted before the commit has left anything to go on from."""
    if not (partial / MARKER).exists():
        return False
    return any(not piece.name.startswith(".") for folder in partial.glob(f"{_WORK}*") for piece in folder.iterdir())
