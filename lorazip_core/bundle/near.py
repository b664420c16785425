"""Which names someone may have meant who gave one that is not there.

difflib takes a tenth of a millisecond for two names, too long for each of thousands whenever a server is asked for a
wrong one. So a name is compared with few, however many there are: those next to it in the order of all names, and in
that of all names read backwards. A slip of the pen leaves the beginning of a name as it was, or its end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_BESIDE = 8
"""How many names are compared on either side, in either order. No more than four times as many are all compared."""


class NearNames:
    """Names, put in order once."""

    def __init__(self, names: Iterable[str]) -> None:
        self._ahead = sorted(names)
        self._back = sorted(name[::-1] for name in self._ahead)
        self._longest = max(map(len, self._ahead), default=0)

    def find(self, wrong: str, most: int, ratio: float) -> list[str]:
        """The ``most`` names that are likest to ``wrong``, likest first, of difflib's ``ratio`` to it or above."""
        if ratio * len(wrong) > (2 - ratio) * self._longest:
            return []  # too long to be like any of them, and maybe so long that it takes time to find that out
        return get_close_matches(wrong, self._compared(wrong), most, ratio)

    def _compared(self, wrong: str) -> list[str]:
        if len(self._ahead) <= 4 * _BESIDE:
            return self._ahead
        ends_alike = (name[::-1] for name in _beside(self._back, wrong[::-1]))
        return sorted({*_beside(self._ahead, wrong), *ends_alike})


def _beside(ordered: list[str], name: str) -> list[str]:
    at = bisect_left(ordered, name)
    return ordered[max(at - _BESIDE, 0) : at + _BESIDE]


def did_you_mean(near: Sequence[str]) -> str:
    """The question, for one name or more."""
    return f"did you mean {' or '.join(map(repr, near))}?"
