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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LocalError, OutputExists

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MARKER = ".lorazip"


def canonical_json(value: Any) -> bytes:
    """The one byte string that stands for ``value``: sorted keys, no blanks, UTF-8, no NaN, a newline at the end."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8") + b"\n"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    try:
        os.link(source, target)
        sync(target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        copy(source, target)


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

    It is built beside its target as ``.NAME.partial``. A process that is killed leaves that folder, which the next run
    clears; the kernel's lock on it tells a dead builder from one at work, a marker in it whose it is. With ``force`` an
    old ``target`` is exchanged for the new one in one step, so that at any moment one of the two is there, whole.

    Raises OutputExists when there is a ``target`` and not ``force``, or when what would have to go is not lorazip's
    (``replaceable`` is false); LocalError when another process builds the same target.
    """
    target = Path(os.path.realpath(target))
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _make_locked(partial, target, replaceable)
    try:
        _recover(target, partial, old, replaceable)
        check_output(target, force=force, replaceable=replaceable)
        yield partial
        (partial / _MARKER).unlink()
        sync_tree(partial)
        check_output(target, force=force, replaceable=replaceable)
        if target.exists():
            _replace(target, partial, old)
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _make_locked(partial: Path, target: Path, replaceable: Callable[[Path], bool]) -> int:
    """Make ``partial``, or take it over from a dead builder and clear it; a descriptor that locks it."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # its builder has just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(partial) and os.path.samestat(os.fstat(lock), os.stat(partial)):
                if any(partial.iterdir()) and not ((partial / _MARKER).exists() or replaceable(partial)):
                    raise OutputExists(f"{partial} exists and was not written by lorazip", "move it away")
                (partial / _MARKER).touch()
                _clear(partial)
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
        _clear(partial)
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


def _clear(folder: Path) -> None:
    """Remove all but the marker."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != _MARKER:
            entry.unlink()


def sync_tree(root: Path) -> None:
    """Have the directories at and below ``root`` on the disk; their files are written with `write_file` or `settle`."""
    for folder, _, _ in os.walk(root):
        sync(Path(folder))


def sync(path: Path) -> None:
    """Have a file, or the entries of a directory, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
