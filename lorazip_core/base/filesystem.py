"""Files and folders: permissions, links, fsync, what is below a folder, and whether there is space for one."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LocalError, UsageError
from .text import megabytes
from .threads import thread_pool

_SYSTEM_ERROR = re.compile(r"(?:os error|Os \{ code:) (\d+)")
_FSYNCS = 16  # at a time: a file system writes many small files together


@contextmanager
def naming(path: Path, *numbers: int) -> Iterator[None]:
    """Put ``path`` into an OSError of the block that names no file, as that of write() on a full disk does not.

    An exception of safetensors that has an errno only in its text becomes that OSError. With ``numbers``, errors of
    other errnos are left as they are.
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


def write_file(path: Path, data: bytes) -> None:
    """Write ``data``, in folders that are made if need be; without an fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        path.write_bytes(data)


def chmod_to_umask(path: Path) -> None:
    """Give a file that a library made the permissions that this process gives to new files."""
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    """Read from the kernel if possible: setting it, which is the other way, would change what other threads make."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    if found := re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE):
        return int(found[1], 8)
    umask = os.umask(0)
    os.umask(umask)
    return umask


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system does not link; without an fsync."""
    try:
        with _naming_if_full(target):
            os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    """Copy the bytes of a file; without an fsync."""
    with _naming_if_full(target):
        shutil.copyfile(source, target)


@contextmanager
def _naming_if_full(target: Path) -> Iterator[None]:
    """Put ``target`` into an OSError of the block that there is no space for it: of two files the first is named."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(target)) from error
        raise


def on_one_file_system(folder: Path, target: Path) -> bool:
    """Whether ``target`` is going to be built on the file system of ``folder``: elsewhere `link_or_copy` copies."""
    return folder.stat().st_dev == nearest_existing(Path(os.path.realpath(target)).parent).stat().st_dev


def tree(root: Path, without: Collection[str] = ()) -> Iterator[str]:
    """Every file, link and empty directory below ``root``, as sorted POSIX paths relative to it.

    Entries of ``root`` itself that are named in ``without`` are left out, with all that is below them. Raises OSError
    for a directory that cannot be read.
    """
    for folder, names, files in os.walk(root, onerror=raise_error):
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


def raise_error(error: OSError) -> None:
    """For `os.walk`, which would skip folders that cannot be read."""
    raise error


def check_parent(target: Path, called: str = "«output»") -> None:
    """Raise UsageError if ``target`` would be below a file, OSError if its folder can be neither made nor written."""
    real = Path(os.path.realpath(target))
    folder = nearest_existing(real.parent)
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a directory", f"choose another {called}")
    if not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def check_space(target: Path, needed: int) -> None:
    """Raise LocalError if ``needed`` bytes, about, do not fit where ``target`` is going to be built.

    What an interrupted run left there is of use, or cleared, and so counts as free.
    """
    real = Path(os.path.realpath(target))
    folder = nearest_existing(real.parent)
    total, _, free = shutil.disk_usage(folder)
    if total == 0:  # some file systems do not say
        return
    partial = folder / f".{real.name}.partial"
    if folder == real.parent and partial.is_dir():
        free += sum(os.lstat(partial / path).st_size for path in tree(partial))
    if needed > free:
        raise LocalError(
            f"{folder}: about {megabytes(needed)} are needed, {megabytes(free)} are free",
            "free some space, or choose another «output»",
        )


def nearest_existing(path: Path) -> Path:
    """An absolute path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def fsync(path: Path) -> None:
    """Write a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_files(root: Path, without: Collection[str] = ()) -> None:
    """`fsync` of the files in `tree`, several at once."""
    paths = [root / path for path in tree(root, without) if not path.endswith("/")]
    with thread_pool(_FSYNCS) as pool:
        for _ in pool.map(fsync, [path for path in paths if not path.is_symlink()]):
            pass


def fsync_directories(root: Path) -> None:
    """`fsync` of ``root`` and the directories below it, whose files have had theirs."""
    for folder, _, _ in os.walk(root):
        fsync(Path(folder))
