"""Which parts of an array are free, when its length is fixed and what it holds comes and goes."""

from __future__ import annotations

from bisect import insort


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
