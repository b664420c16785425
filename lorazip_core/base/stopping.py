"""Cooperative cancellation: work that takes long checks between its steps whether it should stop.

A request, as of the handler of a signal, is for the whole process. Work in the threads of `threads.in_order` also stops
when its result is not needed any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_requested = threading.Event()
_of_thread = threading.local()


def request_stop() -> None:
    """Have all work of this process stop at its next `check_stop`, until `clear_stop`."""
    _requested.set()


def clear_stop() -> None:
    """Let work go on that starts from now on."""
    _requested.clear()


def stop_requested() -> bool:
    """Whether the process is to stop."""
    return _requested.is_set()


def stop_with(abandoned: threading.Event) -> None:
    """Have the work of this thread stop when ``abandoned`` is set, too."""
    _of_thread.abandoned = abandoned


def check_stop() -> None:
    """Raise KeyboardInterrupt if the work of this thread is to stop. It costs less than a microsecond."""
    abandoned: threading.Event | None = getattr(_of_thread, "abandoned", None)
    if _requested.is_set() or (abandoned is not None and abandoned.is_set()):
        raise KeyboardInterrupt


@contextmanager
def stop_unmasked() -> Iterator[None]:
    """Raise KeyboardInterrupt for an exception that follows a request: C extensions can turn the one into the other."""
    try:
        yield
    except Exception:
        check_stop()
        raise
