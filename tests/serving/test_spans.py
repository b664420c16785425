"""Free spans, against a set of free cells."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorazip_core.serving.spans import Piece, Spans, moved

LENGTHS = st.integers(0, 7)
STEPS = st.lists(st.tuples(st.booleans(), LENGTHS), max_size=60)
"""Of each step whether to take, and how many, or else to give back, and which of what is taken."""
PARTS = st.lists(st.integers(0, 4), max_size=6)
"""The lengths between the places where something may be cut."""


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


@given(st.integers(0, 40), st.lists(st.one_of(PARTS, st.integers(0, 9)), max_size=60))
def test_what_is_taken_in_pieces_was_free(size: int, steps: list[list[int] | int]) -> None:
    """Each step takes something with these parts, or gives back one of what was taken."""
    spans, free = Spans(size), set(range(size))
    taken: list[list[Piece]] = []
    for step in steps:
        if isinstance(step, list):
            edges = np.cumsum([0, *step])
            before, whole = list(spans._free), fitting(free, int(edges[-1]))
            pieces = spans.take_pieces(edges)
            if pieces is None:
                assert spans._free == before
                assert whole is None
                assert len(free) < edges[-1] + len(before) * max(step)  # no span is left with room for a largest part
                continue
            if whole is not None and edges[-1]:
                assert pieces == [Piece(0, whole, int(edges[-1]))]
            check_pieces(pieces, edges.tolist())
            free -= check_free(pieces, free)
            taken.append(pieces)
        elif taken:
            for piece in taken.pop(step % len(taken)):
                spans.give(piece.start, piece.length)
                free |= set(range(piece.start, piece.start + piece.length))
        assert spans.free == len(free)
    for piece in [piece for pieces in taken for piece in pieces]:
        spans.give(piece.start, piece.length)
    assert spans._free == ([(0, size)] if size else [])


def check_pieces(pieces: list[Piece], edges: list[int]) -> None:
    """They follow each other in what is cut, and are cut where it may be."""
    assert pieces[0].begin == 0
    assert pieces[-1].begin + pieces[-1].length == edges[-1]
    for piece, following in pairwise(pieces):
        assert piece.begin + piece.length == following.begin
        assert following.begin in edges
        assert min(piece.length, following.length) > 0


def check_free(pieces: list[Piece], free: set[int]) -> set[int]:
    """The cells of all pieces, each of which was free and is of one piece."""
    cells = [piece.start + place for piece in pieces for place in range(piece.length)]
    begins = [piece.begin + place for piece in pieces for place in range(piece.length)]
    assert set(cells) <= free
    assert len(set(cells)) == len(cells)
    assert moved(pieces, np.array(begins, np.int64)).tolist() == cells
    return set(cells)


def test_the_largest_spans_are_filled_first() -> None:
    spans = Spans(20)
    assert spans.take(20) == 0
    for start, length in ((1, 3), (6, 7), (15, 4)):
        spans.give(start, length)
    assert spans.take_pieces(np.array([0, 2, 4, 9, 11])) is None  # 4 in 7, and 5 nowhere
    assert spans.take_pieces(np.array([0, 3, 6, 8, 10])) == [Piece(0, 6, 6), Piece(6, 15, 4)]
    assert spans.free == 4
    assert spans.take_pieces(np.array([0, 3])) == [Piece(0, 1, 3)]
