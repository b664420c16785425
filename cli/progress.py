"""Progress on stderr: a bar with the time left on a terminal, a line now and then in a log, nothing with -q."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorazip_core.progress import Advance, Progress, Silent
from lorazip_core.text import plain

from . import console
from .interrupt import Interruptible

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_OFTEN, _SELDOM = 10.0, 60.0  # seconds between two lines in a log while much happens, and at the most
_WORTH_A_LINE = 1.0  # seconds that a stage takes before a log hears of its end


def progress(quiet: bool) -> Progress:
    """The one that suits stderr."""
    if quiet:
        return Interruptible(Silent())
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    return Interruptible(Bars() if terminal else Lines())


class Lines:
    """A line at the start of a stage, at its end if it took a while, and between after 10 s and 10%, or a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        start = said_at = self._clock()
        done = said = 0
        if total:
            console.say(f"{label} ...")

        def advance(steps: int) -> None:
            nonlocal done, said, said_at
            done += steps
            now = self._clock()
            waited = now - said_at
            if waited >= _SELDOM or (waited >= _OFTEN and done - said >= total / 10):
                left = (now - start) / done * (total - done) if done else 0
                console.say(f"{label}: {100 * done // max(total, 1)}%, about {_duration(left)} left")
                said, said_at = done, now

        yield advance
        if self._clock() - start >= _WORTH_A_LINE:
            console.say(f"{label}: done in {_duration(self._clock() - start)}")

    def note(self, text: str) -> None:
        console.say(plain(text))


class Bars:
    """Rich's progress bars; a bar goes away when its stage ends."""

    def __init__(self) -> None:
        self._live: RichProgress | None = None

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        outermost = self._live is None
        if self._live is None:
            self._live = _rich_progress()
            self._live.start()
        live = self._live
        task = live.add_task(label, total=total)
        try:
            yield lambda steps: live.advance(task, steps)
        finally:
            live.remove_task(task)
            if outermost:
                live.stop()
                self._live = None

    def note(self, text: str) -> None:
        if self._live is None:
            console.say(plain(text))
        else:
            self._live.console.print(plain(text))


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True),
        transient=True,
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
