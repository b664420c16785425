"""A progress for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorazip_core.progress import Advance


class Recorder:
    """A progress that writes down what it is told."""

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, int]] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        self.stages[label] = total, 0

        def advance(steps: int) -> None:
            self.stages[label] = total, self.stages[label][1] + steps

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)
