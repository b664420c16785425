"""A progress for tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lorazip_core.base.progress import Advance


class RecordedTransfer:
    """What a transfer was told."""

    def __init__(self, items: int, size: int) -> None:
        self.items, self.size = items, size
        self.done = self.arrived = 0
        self._mutex = threading.Lock()

    def received(self, size: int) -> None:
        with self._mutex:
            self.arrived += size

    def finished(self, items: int = 1) -> None:
        with self._mutex:
            self.done += items


class Recorder:
    """A progress that writes down what it is told."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, int]] = {}
        self.notes: list[str] = []
        self.transfers: dict[str, RecordedTransfer] = {}

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        self.stages[label] = total, 0

        def advance(steps: int) -> None:
            self.stages[label] = total, self.stages[label][1] + steps

        yield advance

    @contextmanager
    def transfer(self, label: str, items: int, size: int) -> Iterator[RecordedTransfer]:
        self.transfers[label] = RecordedTransfer(items, size)
        yield self.transfers[label]

    def note(self, text: str) -> None:
        self.notes.append(text)
