"""Ctrl-C and `kill` take one way out, which clears away unfinished output.

KeyboardInterrupt raised inside a C extension can come out as another exception, or be lost. So the request is also
remembered: every step of progress asks for it, and whatever a command then fails with counts as interrupted.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lorazip_core.progress import Advance, Progress, Transfer

_requested = False


def requested() -> bool:
    """Whether the command that runs was asked to stop."""
    return _requested


@contextmanager
def interruptible() -> Iterator[None]:
    """While in the block, SIGINT and SIGTERM raise KeyboardInterrupt, but for those that the parent has us ignore."""
    global _requested
    _requested = False
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _stop)
    except ValueError:  # not in the main thread: somebody else handles signals
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruptible:
    """A progress whose steps are the places where a request to stop is heard in any case."""

    def __init__(self, inner: Progress) -> None:
        self._inner = inner
        self.note = inner.note

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        with self._inner.stage(label, total) as advance:

            def heed(steps: int) -> None:
                advance(steps)
                if requested():
                    raise KeyboardInterrupt

            yield heed

    @contextmanager
    def transfer(self, label: str, items: int, size: int) -> Iterator[Transfer]:
        """Its steps are heard in other threads; the one that waits for them gets the signal itself."""
        with self._inner.transfer(label, items, size) as transfer:
            yield transfer


def _stop(number: int, frame: FrameType | None) -> None:
    """The first request ends the command; further ones would only disturb the clearing away."""
    global _requested
    if not _requested:
        _requested = True
        raise KeyboardInterrupt
