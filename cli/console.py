"""The two streams: data for programs and reports on stdout, everything else that people read on stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO, TypeVar

import msgspec

from lorazip_core.base.digests import canonical_json
from lorazip_core.base.errors import LocalError
from lorazip_core.base.text import plain

if TYPE_CHECKING:
    from lorazip_core.bundle.quality import QualityWarning

Report = TypeVar("Report", bound=msgspec.Struct)

LISTED = 10
"""Lines of a list that are shown at most."""


def line(text: str = "") -> None:
    """One line of a report on stdout."""
    _write(sys.stdout, text)


def json(report: msgspec.Struct) -> None:
    """A command's report as the one JSON object on stdout: UTF-8 and canonical, whatever the locale."""
    flush()
    with _writing(sys.stdout):
        sys.stdout.buffer.write(json_bytes(report))
    flush()


def json_bytes(report: msgspec.Struct) -> bytes:
    """What `json` prints, for a file."""
    return canonical_json(msgspec.to_builtins(report))


def show(report: Report, render: Callable[[Report], None], *, as_json: bool, quiet: bool) -> None:
    """A command's report: as `json`, or for people by ``render``, or not at all."""
    if as_json:
        json(report)
    elif not quiet:
        render(report)


def say(text: str = "") -> None:
    """One line for people, on stderr."""
    _write(sys.stderr, text)


def listing(what: str, lines: list[str]) -> None:
    """The first of ``lines`` on stderr below their number; nothing if there are none."""
    if lines:
        say(f"{what}: {len(lines):,}")
        for text in lines[:LISTED]:
            say(f"  {plain(text)}")
        if len(lines) > LISTED:
            say(f"  (and {len(lines) - LISTED:,} more; --json has them all)")


def error(text: str) -> None:
    """One line on stderr about what went wrong; -q does not silence it."""
    say(plain(f"lorazip: error: {text}"))


def warn_of(warnings: Sequence[QualityWarning]) -> None:
    """One line on stderr for each of ``warnings``."""
    for warning in warnings:
        say(plain(f"lorazip: warning: {warning.message} ({warning.hint})"))


def flush() -> None:
    """Have stdout's reader get everything now; a reader that has gone away is no failure."""
    with _writing(sys.stdout):
        sys.stdout.flush()


def _write(stream: TextIO, text: str) -> None:
    with _writing(stream):
        print("\n".join(map(plain, text.split("\n"))), file=stream)


@contextmanager
def _writing(stream: TextIO) -> Iterator[None]:
    """Raise LocalError for data that cannot be written, as on a full disk; a reader that has gone is no failure."""
    try:
        yield
    except OSError as error:
        _stop_writing(stream)
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
            raise LocalError(f"stdout: {error.strerror}", hint) from error


def _stop_writing(stream: TextIO) -> None:
    """What is still buffered goes nowhere: Python would try again at its end, and fail with a code of its own."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
