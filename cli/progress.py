"""Progress on stderr: a bar with the time left on a terminal, a line now and then in a log, nothing with -q."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorazip_core.base.progress import Advance, Progress, Silent, Transfer
from lorazip_core.base.text import count, megabytes, plain

from . import console
from .interrupt import announce_with
from .wording import in_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_OFTEN, _SELDOM = 10.0, 60.0  # seconds between two lines in a log while much happens, and at the most
_STOPPING = "stopping ... (a second signal ends it at once)"
_WORTH_A_LINE = 1.0  # seconds; the end of a shorter stage is not logged


def progress(quiet: bool) -> Progress:
    """The one that suits stderr; unless it is silent, it also says when the command is asked to stop."""
    if quiet:
        return Silent()
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    shown = Bars() if terminal else Lines()
    announce_with(shown.stopping)
    return shown


class _Pace:
    """When a log gets the next line of a stage: after 10 s and a tenth of its ``total``, or after a minute."""

    def __init__(self, total: int, now: float) -> None:
        self._total = total
        self._done, self._at = 0, now

    def since_last(self, done: int, now: float) -> tuple[int, float] | None:
        """If a line is due: what was done since the last one, and in how many seconds."""
        steps, seconds = done - self._done, now - self._at
        if seconds < _SELDOM and (seconds < _OFTEN or steps < self._total / 10):
            return None
        self._done, self._at = done, now
        return steps, seconds


class Lines:
    """A line at the start of a stage, at its end if it took a while, and between at a `_Pace`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        start = self._clock()
        pace = _Pace(total, start)
        done = 0
        if total:
            console.say(f"{label} ...")

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            now = self._clock()
            if pace.since_last(done, now):
                left = f", about {_duration((now - start) / done * (total - done))} left" if done else ""
                console.say(f"{label}: {100 * done // max(total, 1)}% in {_duration(now - start)}{left}")

        yield advance
        if self._clock() - start >= _WORTH_A_LINE:
            console.say(f"{label}: done in {_duration(self._clock() - start)}")

    @contextmanager
    def transfer(self, label: str, items: int, size: int) -> Iterator[Transfer]:
        start = self._clock()
        lines = _TransferLines(label, items, size, self._clock)
        console.say(f"{label}: {count(items, 'adapter')}, {megabytes(size)} ...")
        yield lines
        console.say(f"{lines.state()} in {_duration(self._clock() - start)}")

    def note(self, text: str) -> None:
        console.say(plain(in_options(text)))

    def stopping(self) -> None:
        """Say that the command is about to stop; from the handler of a signal."""
        console.say(_STOPPING)


class _TransferLines:
    """How far a transfer is, for a log, at a `_Pace`."""

    def __init__(self, label: str, items: int, size: int, clock: Callable[[], float]) -> None:
        self._label, self._items, self._size, self._clock = label, items, size, clock
        self._mutex = threading.Lock()
        self._pace = _Pace(size, clock())
        self._done = self._arrived = 0

    def received(self, size: int) -> None:
        with self._mutex:
            self._arrived += size
            if since := self._pace.since_last(self._arrived, self._clock()):
                rate = max(0, since[0]) / since[1]  # below 0 after an attempt that failed
                left = (self._size - self._arrived) / rate if rate > 0 else None
                time_left = "" if left is None else f", about {_duration(left)} left"
                console.say(f"{self.state()}, {megabytes(round(rate))}/s{time_left}")

    def finished(self, items: int = 1) -> None:
        with self._mutex:
            self._done += items

    def state(self) -> str:
        sizes = f"{megabytes(self._arrived)} of {megabytes(self._size)}"
        return f"{self._label}: {self._done:,} of {count(self._items, 'adapter')}, {sizes}"


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

    @contextmanager
    def transfer(self, label: str, items: int, size: int) -> Iterator[Transfer]:
        with _transfer_bars() as live:
            bar = _TransferBar(live, live.add_task(label, total=size, items=items, done=0))
            self._live = live
            try:
                yield bar
            finally:
                self._live = None

    def note(self, text: str) -> None:
        if self._live is None:
            console.say(plain(in_options(text)))
        else:
            self._live.console.print(plain(in_options(text)))

    def stopping(self) -> None:
        """As `Lines.stopping`. A second signal leaves the terminal as it then is: with a cursor."""
        self.note(_STOPPING)
        if self._live is not None:
            self._live.console.show_cursor(True)


class _TransferBar:
    """A bar over bytes, with adapters done and the rate."""

    def __init__(self, live: RichProgress, task: TaskID) -> None:
        self._live, self._task = live, task
        self._done = 0
        self._mutex = threading.Lock()

    def received(self, size: int) -> None:
        self._live.advance(self._task, size)

    def finished(self, items: int = 1) -> None:
        with self._mutex:
            self._done += items
            self._live.update(self._task, done=self._done)


def _transfer_bars() -> RichProgress:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description} {task.fields[done]:,}/{task.fields[items]:,}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=_stderr(),
        transient=True,
    )


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _rich_progress() -> RichProgress:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=_stderr(),
        transient=True,
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
