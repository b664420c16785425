"""Layers of an engine, and which modules of a bundle each of them is made of."""

from __future__ import annotations

from typing import NamedTuple


class Slice(NamedTuple):
    """A module, or what a device computes of it where several share the work."""

    module: str
    """Its name in the bundle."""
    column: int
    """The first column of y that it adds to."""
    out: range
    """The rows of ΔW."""
    taken: range
    """The columns of ΔW: those of x."""


class Layer(NamedTuple):
    """Modules that an engine computes with one matrix, from one x."""

    name: str
    slices: tuple[Slice, ...]
