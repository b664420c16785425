"""Ctrl-C and `kill`: the first asks the command to stop and clear away unfinished output, the second ends the process.

KeyboardInterrupt raised inside a C extension can come out as another exception, or be lost. So the request is also
remembered: long work looks at it (`lorazip_core.base.stopping`), and whatever a command then fails with counts as
interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from lorazip_core.base.stopping import clear_stop, request_stop, stop_requested

INTERRUPTED = 130  # the exit code
TOLD = "interrupted; nothing was left half-written"

_announce: Callable[[], None] | None = None


def announce_with(announce: Callable[[], None]) -> None:
    """Have ``announce`` say that the command which runs is about to stop, when it is asked to."""
    global _announce
    _announce = announce


def leave_when_asked() -> None:
    """From now on SIGINT and SIGTERM end the process with one line: there is nothing to clear away."""
    _handle(_leave)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While in the block, SIGINT and SIGTERM ask for a stop and raise KeyboardInterrupt; a second one ends the process.

    Those that the parent has us ignore stay ignored.
    """
    global _announce
    _announce = None
    clear_stop()
    hook = sys.unraisablehook
    before = _handle(_stop)
    sys.unraisablehook = _quiet_about_interrupts
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        clear_stop()


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, signal._HANDLER]:
    """Install ``handler``; the handlers that were there before."""
    before: dict[int, signal._HANDLER] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: somebody else handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    return before


def _stop(number: int, frame: FrameType | None) -> None:
    if stop_requested():
        os._exit(INTERRUPTED)
    request_stop()
    if _announce is not None:
        with contextlib.suppress(RuntimeError, OSError):  # in the middle of another write to stderr
            _announce()
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"lorazip: error: {TOLD}\n".encode())
    os._exit(INTERRUPTED)


def _quiet_about_interrupts(unraisable: sys.UnraisableHookArgs) -> None:
    """KeyboardInterrupt that a destructor or a callback of the interpreter loses has been remembered."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
