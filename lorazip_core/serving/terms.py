"""Adapters that share nothing, on a device, as kernels read them: each module is a sum of outer products.

Tensors keep their addresses when adapters come and go, so that a captured CUDA graph stays right:

- ``index`` [modules, rows, 2] of int32: the first term and the number of terms of a module of the adapter in a row;
- ``at`` [terms, 2] of int64, ``forms`` [terms, 2] of uint8, ``scale`` [terms] of float32: of u and v of each term,
  where in ``data`` they begin and what they are, see `vectors`;
- ``data`` [bytes] of uint8.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..base.errors import LocalError
from ..schemes.joined import Joined
from ..schemes.scheme import JoinedTerms, Size, Terms
from .spans import Piece, Spans, moved
from .vectors import ALIGNED, pack

_MARGIN = 16  # bytes after the last vector: codes are read from whole words
_SPARE = 1.5  # how much larger an adapter may be, that comes later, than those that are there are on average
_TYPICAL_TERMS, _TYPICAL_BITS = 4, 4  # of a module, and of an element, where none are there
_MOST_TERMS = 16  # of one module, if none that is there has more
_CRUMBS = 1  # room for each adapter besides, in parts as large as the largest: spans are rarely filled to the end


TILE = 1
"""The most tokens that a kernel works on together in a batch of few: most have adapters of their own."""


class AdapterTerms(NamedTuple):
    """All terms of an adapter, module after module, in tensors on the CPU."""

    modules: NDArray[np.int64]
    """The number of each module that it has."""
    counts: NDArray[np.int64]
    """How many terms each has."""
    u: Sequence[Tensor]
    """Matrices [k, d_out], each the u of one module or of several that have rows of one length."""
    v: Sequence[Tensor]
    """The same of v."""
    scale: Tensor
    """[terms] in float32."""

    @classmethod
    def of_modules(cls, modules: Mapping[int, Terms]) -> AdapterTerms:
        """The terms of each module, by number."""
        terms = list(modules.values())
        counts = np.array([len(each.scale) for each in terms], np.int64)
        scale = torch.cat([torch.zeros(0), *(each.scale for each in terms)])
        return cls(
            np.array(list(modules), np.int64), counts, [each.u for each in terms], [each.v for each in terms], scale
        )

    @classmethod
    def of_joined(cls, modules: NDArray[np.int64], terms: JoinedTerms) -> AdapterTerms:
        """The terms of all modules; those of which the number is −1 are left out."""
        kept, counts = modules >= 0, terms.u.shapes[:, 0]
        scale = terms.scale[torch.from_numpy(np.repeat(kept, counts))]
        return cls(modules[kept], counts[kept], _matrices(terms.u, kept), _matrices(terms.v, kept), scale)


def _matrices(joined: Joined, kept: NDArray[np.bool_]) -> list[Tensor]:
    """The ``kept`` ones of matrices [k, length]; those that follow each other and have rows of one length are one."""
    counts, lengths = joined.shapes.T
    edges = [0, *(np.flatnonzero(np.diff(lengths) | np.diff(kept)) + 1).tolist(), len(lengths)]
    ends = np.cumsum([0, *(counts * lengths)])
    return [
        joined.flat[ends[first] : ends[end]].view(-1, int(lengths[first]))
        for first, end in pairwise(edges)
        if end > first and kept[first]
    ]


class PackedTerms(NamedTuple):
    """All terms of an adapter in main memory, module after module."""

    modules: NDArray[np.int64]
    """The number of each module that it has."""
    counts: NDArray[np.int64]
    """How many terms each has."""
    at: NDArray[np.int64]
    """[terms, 2]: where in ``data`` u and v of each begin."""
    forms: NDArray[np.uint8]
    """[terms, 2]"""
    scale: Tensor
    """[terms] in float32."""
    data: NDArray[np.uint8]
    """[bytes]"""

    def term_edges(self) -> NDArray[np.int64]:
        """Between which terms it may be cut: those of a module are side by side."""
        return np.append(0, np.cumsum(self.counts))

    def data_edges(self) -> NDArray[np.int64]:
        """At which bytes it may be cut: between any two vectors."""
        return np.append(np.sort(self.at, None), len(self.data))


def pack_terms(adapters: Sequence[AdapterTerms]) -> list[PackedTerms]:
    """Pack adapters, many in less time than one by one."""
    return [
        PackedTerms(own.modules, own.counts, at.reshape(2, -1).T, forms.reshape(2, -1).T, own.scale, data)
        for own, (data, at, forms) in zip(adapters, pack([[*own.u, *own.v] for own in adapters]), strict=True)
    ]


class _Held(NamedTuple):
    """What an adapter has of the table."""

    row: int
    terms: list[Piece]
    data: list[Piece]


class TermsTable:
    """What is in which row. Rows 0, 1, … are those of the adapters that it is made of."""

    tile = TILE

    def __init__(
        self, adapters: Iterable[PackedTerms], sizes: Sequence[Size], device: torch.device, spare: int = 0
    ) -> None:
        """``sizes``: those of the modules. There is room for ``spare`` adapters more.

        How large the table is, only all adapters tell: until then they are in main memory, as they are packed.
        """
        packs = deque(adapters)
        count = len(packs)
        vectors = [_TYPICAL_BITS / 8 * length for size in sizes for length in size]
        typical = _TYPICAL_TERMS * sum(vectors), max(vectors, default=0)
        terms = _room(map(PackedTerms.term_edges, packs), spare, (_TYPICAL_TERMS * len(sizes), _TYPICAL_TERMS))
        size = _room(map(PackedTerms.data_edges, packs), spare, typical)
        size = -(-size // ALIGNED) * ALIGNED
        self.most = max([_MOST_TERMS if spare else 1, *(most for each in packs for most in each.counts.tolist())])
        self.index = torch.zeros(len(sizes), count + spare, 2, dtype=torch.int32, device=device)
        self.at = torch.zeros(terms, 2, dtype=torch.int64, device=device)
        self.forms = torch.zeros(terms, 2, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(terms, device=device)
        self.data = torch.zeros(size + _MARGIN, dtype=torch.uint8, device=device)
        self._terms, self._data, self._rows = Spans(terms), Spans(size), Spans(count + spare)
        self._held: dict[int, _Held] = {}
        self._put(packs.popleft() for _ in range(count))  # those of a file leave main memory together

    def add(self, adapter: PackedTerms) -> int:
        """Put one more adapter into a free row, which is returned. Raises LocalError where it does not fit."""
        if (most := max(adapter.counts.tolist(), default=0)) > self.most:
            raise LocalError(
                f"a module has {most} terms, but room was made for {self.most}", "start the server with this bundle"
            )
        [row] = self._put([adapter])
        return row

    def remove(self, row: int) -> None:
        """Free a row. Nothing on the device changes but that the row has no terms."""
        held = self._held.pop(row)
        self.index[:, row] = 0
        self._give(held.terms, held.data)
        self._rows.give(row, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.index, self.at, self.forms, self.scale, self.data))

    def _put(self, adapters: Iterable[PackedTerms]) -> list[int]:
        """Put one adapter into a free row, or the first ones into rows 0, 1, …; the rows are returned.

        All but ``data`` is written at once.
        """
        rows, indices, places = list[int](), list[NDArray[np.int32]](), [np.zeros(0, np.int64)]
        ats, forms, scales = [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.uint8)], [torch.zeros(0)]
        for adapter in adapters:
            edges = adapter.term_edges()
            held = self._take(edges, adapter.data_edges())
            self._held[held.row] = held
            for begin, start, length in held.data:
                self.data[start : start + length] = torch.from_numpy(adapter.data[begin : begin + length])
            index = np.zeros((len(self.index), 2), np.int32)
            index[adapter.modules] = np.stack([moved(held.terms, edges[:-1]), adapter.counts], 1)
            rows.append(held.row)
            indices.append(index)
            places.append(moved(held.terms, np.arange(edges[-1])))
            ats.append(moved(held.data, adapter.at))
            forms.append(adapter.forms)
            scales.append(adapter.scale)
        device = self.data.device
        written = torch.from_numpy(np.concatenate(places)).to(device)
        self.at[written] = torch.from_numpy(np.concatenate(ats)).to(device)
        self.forms[written] = torch.from_numpy(np.concatenate(forms)).to(device)
        self.scale[written] = torch.cat(scales).to(device)
        if rows:
            self.index[:, rows] = torch.from_numpy(np.stack(indices, 1)).to(device)
        return rows

    def _take(self, term_edges: NDArray[np.int64], data_edges: NDArray[np.int64]) -> _Held:
        row, terms, data = self._rows.take(1), self._terms.take_pieces(term_edges), self._data.take_pieces(data_edges)
        if row is not None and terms is not None and data is not None:
            return _Held(row, terms, data)
        if row is not None:
            self._rows.give(row, 1)
        self._give(terms or [], data or [])
        raise LocalError(
            f"no room for an adapter of {term_edges[-1]:,} terms and {data_edges[-1]:,} bytes: {self._rows.free:,} "
            f"rows, {self._terms.free:,} terms and {self._data.free:,} bytes are free",
            "remove others, or start the server with more room",
        )

    def _give(self, terms: list[Piece], data: list[Piece]) -> None:
        for spans, pieces in ((self._terms, terms), (self._data, data)):
            for piece in pieces:
                spans.give(piece.start, piece.length)


def _room(edges: Iterable[NDArray[np.int64]], spare: int, typical: tuple[float, float]) -> int:
    """How many elements there have to be for adapters that may be cut at these ``edges``, and ``spare`` more.

    What one takes that comes later, and the largest of its parts, is as of these, or ``typical`` where there are none.
    """
    taken = [(int(each[-1]), int(np.diff(each).max(initial=0))) for each in edges]
    held = sum(length for length, _ in taken)
    if not spare:
        return held
    length, largest = np.mean(taken, 0) * (_SPARE, 1) if taken else typical
    return held + math.ceil(spare * length + (len(taken) + spare) * _CRUMBS * largest)
