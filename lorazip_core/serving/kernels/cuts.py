"""How kernels cut their work into programs and steps."""

from __future__ import annotations

from typing import NamedTuple


class Shrink(NamedTuple):
    """How a first kernel cuts its work."""

    splits: int
    """Programs that share the columns of x."""
    columns: int
    """Columns of x at once."""
    warps: int
    terms: int = 1
    """Terms at once."""
    groups: int = 1
    """Programs that share the terms."""


class Expand(NamedTuple):
    """How a second kernel cuts its work."""

    columns: int
    """Columns of y of a program."""
    warps: int


class Cuts(NamedTuple):
    """How both kernels cut their work, which changes no result but by the order of sums; see docs/benchmarks.md.

    Of few tokens there is one term at once.
    """

    shrink: Shrink
    expand: Expand
