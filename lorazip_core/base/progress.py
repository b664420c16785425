"""How work that takes long reports its progress, whether or not anybody shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]
Share = Callable[[float], None]
"""Called with each further share of one piece of work that is done; the shares add up to 1."""


def unheard(share: float) -> None:
    """A `Share` that nobody looks at."""


@contextmanager
def part_of(whole: Share, size: float) -> Iterator[Share]:
    """The `Share` of a part that is ``size`` of a ``whole``; work that ends early counts as done."""
    left = 1.0

    def report(share: float) -> None:
        nonlocal left
        share = min(share, left)
        left -= share
        whole(share * size)

    yield report
    report(left)


class Transfer(Protocol):
    """A stage that is measured in bytes and in whole items; its methods may be called from several threads."""

    def received(self, size: int) -> None:
        """So many bytes more, or fewer when an attempt failed and its bytes do not count."""
        ...

    def finished(self, items: int = 1) -> None:
        """So many items more are complete."""
        ...


class Progress(Protocol):
    """How a verb reports its progress to its caller."""

    def stage(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a stage of ``total`` steps; the function it yields is called with each number of steps done.

        It may be called by other threads than the one that opened the stage, but never by two at once.
        """
        ...

    def transfer(self, label: str, items: int, size: int) -> AbstractContextManager[Transfer]:
        """Open a stage of ``items`` things that have ``size`` bytes together."""
        ...

    def note(self, text: str) -> None:
        """Say one line that a person should see: a decision taken, an adapter left out."""
        ...


class SilentTransfer:
    """A transfer that nobody looks at."""

    def received(self, size: int) -> None:
        pass

    def finished(self, items: int = 1) -> None:
        pass


class Silent:
    """A progress that nobody looks at."""

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        yield lambda steps: None

    @contextmanager
    def transfer(self, label: str, items: int, size: int) -> Iterator[Transfer]:
        yield SilentTransfer()

    def note(self, text: str) -> None:
        pass
