"""How long work reports where it is, without knowing whether anybody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """What a verb tells its caller while it works."""

    def stage(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of ``total`` steps; the function it yields is called with each number of steps done."""
        ...

    def note(self, text: str) -> None:
        """Say one line that a person should see: a decision taken, an adapter left out."""
        ...


class Silent:
    """A progress that tells nobody."""

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        yield lambda steps: None

    def note(self, text: str) -> None:
        pass
