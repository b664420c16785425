"""Files as lorazip wants them: canonical JSON, digests, safe names, and directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import RawIOBase
from pathlib import Path
from typing import Any

from .errors import Interrupted, LocalError, OutputExists, UsageError
from .stopping import check_stop
from .text import megabytes

NotOurs = Callable[[Path], str | None]
"""Why a directory may not be replaced, in words that name what lorazip did not write in it; None if it may be."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MARKER = ".lorazip"
_WORK = ".work-"  # and the key of the work
_SYSTEM_ERROR = re.compile(r"(?:os error|Os \{ code:) (\d+)")
_READ_AT_ONCE = 2**18  # bytes, of a file whose digest is wanted
_SYNCS = 16  # at a time: a file system brings many small files to the disk in one go


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for ``value``: sorted keys, no blanks, UTF-8, no NaN, a newline at the end."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8") + b"\n"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with naming(path), path.open("rb", buffering=0) as file:
        return sha256_stream(file)


def sha256_stream(file: RawIOBase) -> str:
    """The digest of what is left in an unbuffered file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_AT_ONCE))
    while count := file.readinto(buffer):
        check_stop()
        digest.update(buffer[:count])
    return digest.hexdigest()


def safe_name(name: str) -> str:
    """A file name for any adapter name: readable, portable, and distinct for distinct names.

    Names that differ only in case, Unicode form or characters that had to go get distinct digests.
    """
    readable = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    readable = re.sub(r"[^a-z0-9._-]+", "-", readable)[:80].strip("._-") or "adapter"
    return f"{readable}-{sha256_bytes(name.encode('utf-8', 'surrogatepass'))[:10]}"


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` with normal permissions and have it on the disk before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def naming(path: Path, *numbers: int) -> Iterator[None]:
    """Have a failure of the system in the block, of these ``numbers`` or any, be about ``path`` if it names no file.

    That of write() on a full disk does not. One that safetensors tells in words only becomes the OSError that it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None and (not numbers or error.errno in numbers):
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        number = system_error(error)
        if number is not None and (not numbers or number in numbers):
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        raise


def system_error(error: Exception) -> int | None:
    """The errno in the text of an exception of safetensors, or None."""
    if type(error).__name__ != "SafetensorError":  # by its name: nothing here loads safetensors
        return None
    found = _SYSTEM_ERROR.search(str(error))
    return int(found[1]) if found else None


def settle(path: Path) -> None:
    """Give a file that a library wrote the permissions of the umask, and have it on the disk."""
    path.chmod(0o666 & ~_umask())
    sync(path)


def _umask() -> int:
    """Without setting it, where the kernel tells: other threads are making files meanwhile."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if told := re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE):
        return int(told[1], 8)
    umask = os.umask(0)
    os.umask(umask)
    return umask


def link_or_copy(source: Path, target: Path) -> None:
    """``target`` as a hard link to ``source``, or as a copy where the file system does not link; on the disk."""
    place(source, target)
    sync(target)


def place(source: Path, target: Path) -> None:
    """As `link_or_copy`, but not yet on the disk."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


def copy(source: Path, target: Path) -> None:
    """A copy with normal permissions, on the disk."""
    shutil.copyfile(source, target)
    settle(target)


def tree(root: Path, without: Collection[str] = ()) -> Iterator[str]:
    """Every file, link and empty directory below ``root``, as sorted POSIX paths relative to it.

    Entries of ``root`` itself that are named in ``without`` are left out, with all that is below them. Raises OSError
    for a directory that cannot be read.
    """
    for folder, names, files in os.walk(root, onerror=_raise):
        here = Path(folder)
        if here == root:
            names[:] = [name for name in names if name not in without]
            files = [name for name in files if name not in without]
        names.sort()
        linked = [name for name in names if (here / name).is_symlink()]
        for name in sorted(files + linked):
            yield (here / name).relative_to(root).as_posix()
        if not names and not files and here != root:
            yield here.relative_to(root).as_posix() + "/"


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def atomic_directory(target: Path, *, force: bool, not_ours: NotOurs) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    It is built beside its target as ``.NAME.partial``, and brought to the disk when the block ends. A process that is
    killed leaves that folder, which the next run clears; the kernel's lock on it tells a dead builder from one at work,
    a marker in it whose it is. With ``force`` an old ``target`` is exchanged for the new one in one step, so that at
    any moment one of the two is there, whole.

    Raises OutputExists when there is a ``target`` and not ``force``, or when what would have to go is ``not_ours``;
    LocalError when another process builds the same target, or when what would have to go cannot be removed.
    """
    with _built(target, force=force, not_ours=not_ours, resumable=False) as building:
        yield building.path


class Building:
    """A directory that is being built, and a folder in it for what a later run can go on from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_work = False
        """Whether the folder for work is that of this run; until then it is what earlier runs left."""

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
def resumable_directory(target: Path, *, force: bool, not_ours: NotOurs) -> Iterator[Building]:
    """As `atomic_directory`, but what is finished in the folder of `Building.work` outlives an interruption.

    It stays in ``.NAME.partial`` when the process is killed, or when KeyboardInterrupt ends the block, which is then
    raised as Interrupted. Any other failure removes it.
    """
    with _built(target, force=force, not_ours=not_ours, resumable=True) as building:
        yield building


@contextmanager
def _built(target: Path, *, force: bool, not_ours: NotOurs, resumable: bool) -> Iterator[Building]:
    target = Path(os.path.realpath(target))
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    check_parent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _make_locked(partial, target, not_ours, resumable)
    building = Building(partial)
    try:
        with naming(target, errno.ENOSPC, errno.EDQUOT):
            _recover(target, partial, old, not_ours)
            check_output(target, force=force, not_ours=not_ours)
            yield building
            sync_files(partial)
            for folder in partial.glob(f"{_WORK}*"):
                shutil.rmtree(folder)
            (partial / _MARKER).unlink()
            sync_tree(partial)
            check_output(target, force=force, not_ours=not_ours)
            if target.exists():
                _replace(target, partial, old)
                with suppress(OSError):  # the new one is in its place: what is left of the old is waste
                    _remove(partial)
            else:
                partial.rename(target)
            sync(target.parent)
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


def _make_locked(partial: Path, target: Path, not_ours: NotOurs, keep_work: bool) -> int:
    """Make ``partial``, or take it over from a dead builder and clear it; a descriptor that locks it."""
    while True:
        try:
            partial.mkdir(exist_ok=True)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its builder has just finished
            continue
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):  # a file or a link
                raise _strange(partial, None) from None
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(partial) and os.path.samestat(os.fstat(lock), os.stat(partial)):
                if not (partial / _MARKER).exists() and (why := _objection(partial, not_ours)):
                    raise _strange(partial, why)
                _unlock(partial)
                (partial / _MARKER).touch()
                _clear(partial, keep_work=keep_work)
                return lock
        except BlockingIOError:
            os.close(lock)
            raise LocalError(f"{target}: another lorazip is writing it", "wait for it, or choose another -o") from None
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _recover(target: Path, partial: Path, old: Path, not_ours: NotOurs) -> None:
    """Finish what a builder that was killed between the renames of `_replace` left."""
    if not os.path.lexists(old):
        return
    if old.is_symlink() or not old.is_dir():
        raise _strange(old, None)
    if why := _objection(old, not_ours):
        raise _strange(old, why)
    if target.exists():
        _unlock(old)
        old.rename(partial / "old")
        shutil.rmtree(partial / "old")
    else:
        old.rename(target)


def _strange(path: Path, why: str | None) -> OutputExists:
    """What stands where lorazip would put, or has put, something of its own."""
    return OutputExists(f"{path} exists and was not written by lorazip{f': {why}' if why else ''}", "move it away")


def check_output(target: Path, *, force: bool, not_ours: NotOurs) -> None:
    """Raise OutputExists if the directory ``target`` may not be written, LocalError or OSError if it cannot be.

    Called early too, so that no work is done in vain.
    """
    if not os.path.lexists(target):
        check_parent(target)
        return
    if not force:
        raise OutputExists(f"{target} exists", "choose another -o, or --force to replace it")
    why = _objection(target, not_ours) if target.is_dir() else "it is not a directory"
    if why is not None:
        raise OutputExists(
            f"{target} exists and was not written by lorazip: {why}", "remove it yourself if you are sure"
        )
    check_parent(target)
    for folder, _, _ in os.walk(target, onerror=_raise):
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise LocalError(f"{folder} is read-only and cannot be replaced", "chmod -R u+w, or choose another -o")


def _objection(folder: Path, not_ours: NotOurs) -> str | None:
    """Why a folder may not be replaced; an empty one always may."""
    return not_ours(folder) if any(folder.iterdir()) else None


def check_parent(target: Path, option: str = "-o") -> None:
    """Raise UsageError if ``target`` would be below a file, OSError if its folder can be neither made nor written."""
    real = Path(os.path.realpath(target))
    folder = next(parent for parent in real.parents if parent.exists())
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a directory", f"choose another {option}")
    if not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def check_space(target: Path, needed: int) -> None:
    """Raise LocalError if ``needed`` bytes, about, do not fit where ``target`` is going to be built.

    What an interrupted run left there is of use, or cleared, and so counts as free.
    """
    real = Path(os.path.realpath(target))
    folder = next(parent for parent in real.parents if parent.exists())
    total, _, free = shutil.disk_usage(folder)
    if total == 0:  # a file system that does not tell
        return
    partial = folder / f".{real.name}.partial"
    if folder == real.parent and partial.is_dir():
        free += sum(os.lstat(partial / path).st_size for path in tree(partial))
    if needed > free:
        raise LocalError(
            f"{folder}: about {megabytes(needed)} are needed, {megabytes(free)} are free",
            "free some space, or choose another -o",
        )


def _replace(target: Path, new: Path, old: Path) -> None:
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
        (new / _MARKER).touch()


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
        elif entry.name != _MARKER:
            entry.unlink()


def _finished_work(partial: Path) -> bool:
    """Whether a run that was interrupted before the commit has left anything to go on from."""
    if not (partial / _MARKER).exists():
        return False
    return any(not piece.name.startswith(".") for folder in partial.glob(f"{_WORK}*") for piece in folder.iterdir())


def sync_tree(root: Path) -> None:
    """Have the directories at and below ``root`` on the disk; their files are written with `write_file` or `settle`."""
    for folder, _, _ in os.walk(root):
        sync(Path(folder))


def sync_files(root: Path) -> None:
    """Have the files below ``root`` on the disk, many at once, but for those in hidden folders."""
    paths = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        paths += [Path(folder, name) for name in files if not Path(folder, name).is_symlink()]
    with ThreadPoolExecutor(_SYNCS) as pool:
        for _ in pool.map(sync, paths):
            pass


def sync(path: Path) -> None:
    """Have a file, or the entries of a directory, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
