"""Which parts of an array are free, when its length is fixed and what it holds comes and goes.

Nothing is moved, so free spans get shorter and more; what may be cut lies in several of them.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Piece(NamedTuple):
    """A part of something that was put into an array."""

    begin: int
    """Where the part begins in that."""
    start: int
    """Where it begins in the array."""
    length: int


def moved(pieces: Sequence[Piece], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in the array is what was at ``places`` [...] of that which lies in ``pieces``, ascending."""
    begins, starts, _ = np.array(pieces, np.int64).T
    return places + (starts - begins)[np.searchsorted(begins, places, "right") - 1]


class Spans:
    """The free spans of ``length`` elements; the lowest that is long enough is given away."""

    def __init__(self, length: int) -> None:
        self._free = [(0, length)] if length else []

    def take(self, length: int) -> int | None:
        """Where ``length`` elements begin that were free; None if nowhere so many are."""
        for number, (start, end) in enumerate(self._free):
            if end - start >= length:
                self._free[number : number + 1] = [(start + length, end)] if end - start > length else []
                return start
        return 0 if not length else None

    def take_pieces(self, edges: NDArray[np.int64]) -> list[Piece] | None:
        """Room for something that may be cut at ``edges`` [n + 1], which ascend from 0 to its length.

        It is one piece where a span is long enough. Else the largest spans are filled first, each with as many whole
        parts as fit, so that pieces are few, and what is left of a span is shorter than a part. None, and nothing is
        taken, if it does not fit.
        """
        length = int(edges[-1])
        if (start := self.take(length)) is not None:
            return [Piece(0, start, length)]
        pieces, begin = list[Piece](), 0
        for start, end in sorted(self._free, key=lambda span: span[0] - span[1]):
            cut = int(edges[np.searchsorted(edges, begin + end - start, "right") - 1])
            if cut > begin:
                pieces.append(Piece(begin, start, cut - begin))
                begin = cut
        if begin < length:
            return None
        taken = {piece.start: piece.length for piece in pieces}
        rests = [(start + taken.get(start, 0), end) for start, end in self._free]
        self._free = [(start, end) for start, end in rests if start < end]
        return pieces

    def give(self, start: int, length: int) -> None:
        """Take back what was taken."""
        if not length:
            return
        insort(self._free, (start, start + length))
        merged: list[tuple[int, int]] = []
        for first, end in self._free:
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((first, end))
        self._free = merged

    @property
    def free(self) -> int:
        """How many elements are free in all."""
        return sum(end - start for start, end in self._free)
