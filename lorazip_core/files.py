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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Interrupted, LocalError, OutputExists, PeerEnded
from .stopping import check_stop

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MARKER = ".lorazip"
_WORK = ".work-"  # and the key of the work
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
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_AT_ONCE))
    with path.open("rb", buffering=0) as file:
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
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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


def tree(root: Path) -> Iterator[str]:
    """Every file, link and empty directory below ``root``, as sorted POSIX paths relative to it."""
    for folder, names, files in os.walk(root):
        names.sort()
        here = Path(folder)
        linked = [name for name in names if (here / name).is_symlink()]
        for name in sorted(files + linked):
            yield (here / name).relative_to(root).as_posix()
        if not names and not files and here != root:
            yield here.relative_to(root).as_posix() + "/"


@contextmanager
def atomic_directory(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    It is built beside its target as ``.NAME.partial``, and brought to the disk when the block ends. A process that is
    killed leaves that folder, which the next run clears; the kernel's lock on it tells a dead builder from one at work,
    a marker in it whose it is. With ``force`` an old ``target`` is exchanged for the new one in one step, so that at
    any moment one of the two is there, whole.

    Raises OutputExists when there is a ``target`` and not ``force``, or when what would have to go is not lorazip's
    (``replaceable`` is false); LocalError when another process builds the same target.
    """
    with _built(target, force=force, replaceable=replaceable, resumable=False) as partial:
        yield partial


@dataclass(frozen=True)
class Building:
    """A directory that is being built, and a folder in it for what a later run can go on from."""

    path: Path

    def work(self, key: str) -> Path:
        """The folder for finished pieces of the work called ``key``: with what an interrupted run of that key left.

        What other keys left is removed. Files whose names start with a point are not finished, and count as nothing.
        """
        mine = self.path / f"{_WORK}{key}"
        for folder in self.path.glob(f"{_WORK}*"):
            if folder != mine:
                shutil.rmtree(folder)
        mine.mkdir(exist_ok=True)
        return mine


@contextmanager
def resumable_directory(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> Iterator[Building]:
    """As `atomic_directory`, but what is finished in the folder of `Building.work` outlives an interruption.

    It stays in ``.NAME.partial`` when the process is killed, or when KeyboardInterrupt ends the block, which is then
    raised as Interrupted, or PeerEnded does. Any other failure removes it.
    """
    with _built(target, force=force, replaceable=replaceable, resumable=True) as partial:
        yield Building(partial)


@contextmanager
def _built(target: Path, *, force: bool, replaceable: Callable[[Path], bool], resumable: bool) -> Iterator[Path]:
    target = Path(os.path.realpath(target))
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _make_locked(partial, target, replaceable, resumable)
    try:
        _recover(target, partial, old, replaceable)
        check_output(target, force=force, replaceable=replaceable)
        yield partial
        sync_files(partial)
        for folder in partial.glob(f"{_WORK}*"):
            shutil.rmtree(folder)
        (partial / _MARKER).unlink()
        sync_tree(partial)
        check_output(target, force=force, replaceable=replaceable)
        if target.exists():
            _replace(target, partial, old)
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.rename(target)
        sync(target.parent)
    except KeyboardInterrupt as interruption:
        if resumable and _finished_work(partial):
            _clear(partial, keep_work=True)
            raise Interrupted(
                f"interrupted; what was finished is kept in {partial}",
                "the same command goes on from there; remove that folder if you do not want it",
            ) from interruption
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except PeerEnded:
        if resumable and _finished_work(partial):
            _clear(partial, keep_work=True)
        else:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _make_locked(partial: Path, target: Path, replaceable: Callable[[Path], bool], keep_work: bool) -> int:
    """Make ``partial``, or take it over from a dead builder and clear it; a descriptor that locks it."""
    while True:
        try:
            partial.mkdir(exist_ok=True)
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its builder has just finished
            continue
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ELOOP):  # a file or a link
                raise OutputExists(f"{partial} exists and was not written by lorazip", "move it away") from None
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(partial) and os.path.samestat(os.fstat(lock), os.stat(partial)):
                if any(partial.iterdir()) and not ((partial / _MARKER).exists() or replaceable(partial)):
                    raise OutputExists(f"{partial} exists and was not written by lorazip", "move it away")
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


def _recover(target: Path, partial: Path, old: Path, replaceable: Callable[[Path], bool]) -> None:
    """Finish what a builder that was killed between the renames of `_replace` left."""
    if not old.exists():
        return
    if any(old.iterdir()) and not replaceable(old):
        raise OutputExists(f"{old} exists and was not written by lorazip", "move it away")
    if target.exists():
        old.rename(partial / "old")
        shutil.rmtree(partial / "old")
    else:
        old.rename(target)


def check_output(target: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise OutputExists if ``target`` may not be written; called early so that no work is done in vain."""
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputExists(f"{target} exists", "choose another -o, or --force to replace it")
    if not (target.is_dir() and (replaceable(target) or not any(target.iterdir()))):
        raise OutputExists(f"{target} exists and was not written by lorazip", "remove it yourself if you are sure")


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
    (new / _MARKER).touch()


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step where the kernel can (Linux: renameat2 with RENAME_EXCHANGE)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


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
