"""Reports as files, each of which appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from lorazip_core.base.atomic import atomic_write
from lorazip_core.base.errors import OutputExists, UsageError
from lorazip_core.base.filesystem import check_parent, naming
from lorazip_core.bundle.output_path import check_output_path
from lorazip_core.report.html import check_available

from . import console


def check_report_files(
    files: Mapping[str, Path | None], *, inputs: Sequence[Path] = (), force: bool, json: bool
) -> None:
    """Refuse, by option, paths where reports may not go, and pages that cannot be made, before the work.

    With ``json`` stdout holds one object and nothing else, so no file may be where stdout goes.
    """
    seen: dict[str | tuple[int, int], str] = {}
    for option, path in files.items():
        if path is None:
            continue
        check_report_file(path, inputs=inputs, force=force, option=option)
        status = path.stat() if path.exists() else None
        identity = (status.st_dev, status.st_ino) if status else os.path.realpath(path)
        other = seen.setdefault(identity, option)
        if other != option:
            raise UsageError(f"{other} and {option} both name {path}", "give each a file of its own")
        if json and _is_stream(path, sys.stdout):
            raise UsageError(f"{option} {path} is where --json prints", "leave out one of them")
    if files.get("--report") is not None:
        check_available()


def check_report_file(path: Path, *, inputs: Sequence[Path], force: bool, option: str = "-o") -> None:
    """Refuse a path where the report may not go, before the work.

    An empty file may be filled, since that is how a CI system says where something should go ($GITHUB_STEP_SUMMARY),
    and so may what is no regular file and loses nothing (/dev/stdout).
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory", f"{option} names the file of the report")
    check_output_path(path, inputs, option)
    if _is_filled_in_place(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    if os.path.lexists(path) and not force:
        raise OutputExists(f"{path} exists", f"choose another {option}, or --force to replace it")
    check_parent(path, option)


def write_report_files(files: Mapping[str, Path | None], contents: Mapping[str, Callable[[], bytes]]) -> None:
    """Write the ``files`` that were asked for, by option; what is in them is all made before the first is written."""
    made = [(path, contents[option]()) for option, path in files.items() if path is not None]
    for path, data in made:
        write_data(path, data)


def write_data(path: Path, data: bytes) -> None:
    """Write a report where `check_report_file` allowed it: beside it and renamed, or into what is there."""
    if _is_filled_in_place(path):
        _fill(path, data)
        return
    atomic_write(Path(os.path.realpath(path)), data)


def _is_filled_in_place(path: Path) -> bool:
    """It is there, and nothing is lost by writing to it: an empty file, a pipe, a device, or where our output goes."""
    if not path.exists():
        return False
    status = path.stat()
    return (
        not (stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_size))
        or _is_stream(path, sys.stdout)
        or _is_stream(path, sys.stderr)
    )


def _fill(path: Path, data: bytes) -> None:
    """Write to what is there, which stays the same file for others that have it open; empty again if that fails.

    Our own stdout and stderr go on where they are: opened anew, a log that they are appended to would be cut.
    """
    console.flush()
    target: Path | int = path
    for stream in (sys.stdout, sys.stderr):
        if _is_stream(path, stream):
            stream.flush()
            target = os.dup(stream.fileno())
            break
    try:
        # A reader may have seen enough.
        with contextlib.suppress(BrokenPipeError), naming(path), open(target, "wb") as file:
            file.write(data)
    except BaseException:
        if target is path and path.is_file():
            os.truncate(path, 0)
        raise


def _is_stream(path: Path, stream: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except (OSError, ValueError):  # nothing is there, or the stream is closed or no file
        return False
