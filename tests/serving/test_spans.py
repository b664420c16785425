"""Free spans, against a set of free cells."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorazip_core.serving.spans import Spans

LENGTHS = st.integers(0, 7)
STEPS = st.lists(st.tuples(st.booleans(), LENGTHS), max_size=60)
"""Of each step whether to take, and how many, or else to give back, and which of what is taken."""


def fitting(free: set[int], length: int) -> int | None:
    """Where the lowest so many free cells begin that follow each other."""
    return next((start for start in sorted(free) if free >= set(range(start, start + length))), None)


@given(st.integers(0, 30), STEPS)
def test_what_is_taken_was_free(size: int, steps: list[tuple[bool, int]]) -> None:
    spans, free = Spans(size), set(range(size))
    taken: list[tuple[int, int]] = []
    for takes, number in steps:
        if takes:
            start = spans.take(number)
            if number:
                assert start == fitting(free, number)
            else:
                assert start is not None
            if start is not None:
                free -= set(range(start, start + number))
                taken.append((start, number))
        elif taken:
            start, length = taken.pop(number % len(taken))
            spans.give(start, length)
            free |= set(range(start, start + length))
        assert spans.free == len(free)
    for start, length in taken:
        spans.give(start, length)
    assert spans.take(size) == 0  # in one piece again
