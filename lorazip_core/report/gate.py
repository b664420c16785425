"""A limit that `verify` was given."""

from __future__ import annotations

from typing import NamedTuple


class Gate(NamedTuple):
    """A limit that was asked for, and what came of it."""

    option: str
    applies_to: str
    limit: float
    found: float | None
    held: bool | None
    """None where errors that could break it are not known."""

    @property
    def verdict(self) -> str:
        return {True: "held", False: "failed", None: "not known"}[self.held]
