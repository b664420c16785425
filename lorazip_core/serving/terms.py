"""Adapters that share nothing, on a device, as kernels read them: each module is a sum of outer products.

Tensors keep their addresses when adapters come and go, so that a captured CUDA graph stays right:

- ``index`` [modules, rows, 2] of int32: the first term and the number of terms of a module of the adapter in a row;
- ``at`` [terms, 2] of int64, ``forms`` [terms, 2] of uint8, ``scale`` [terms] of float32: of u and v of each term,
  where in ``data`` they begin and what they are, see `vectors`;
- ``data`` [bytes] of uint8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.errors import LocalError
from ..schemes.scheme import Size, Terms
from .spans import Spans
from .vectors import pack

Modules = Mapping[int, Terms]
"""The modules that an adapter has, by number."""

_MARGIN = 16  # bytes after the last vector: a code is read from two bytes
_SPARE = 1.5  # how much larger an adapter may be, that comes later, than those that are there are on average
_TYPICAL_TERMS, _TYPICAL_BITS = 4, 4  # of a module, and of an element, where none are there
_MOST_TERMS = 16  # of one module, if none that is there has more


TILE = 1
"""The most tokens that a kernel works on together in a batch of few: most have adapters of their own."""


class TermsTable:
    """What is in which row. Rows 0, 1, … are those of the adapters that it is made of."""

    tile = TILE

    def __init__(
        self, adapters: Iterable[Modules], sizes: Sequence[Size], device: torch.device, spare: int = 0
    ) -> None:
        """``sizes``: those of the modules. There is room for ``spare`` adapters more."""
        counts: list[dict[int, int]] = []
        packs: list[_Adapter] = []
        for adapter in adapters:
            counts.append({module: len(terms.scale) for module, terms in adapter.items()})
            packs.append(_packed(adapter, device))
        rows = len(packs) + spare
        terms, size = (sum(each) for each in ([len(each.scale) for each in packs], [len(each.data) for each in packs]))
        if spare and packs:
            more_terms, more_bytes = (_SPARE * each / len(packs) for each in (terms, size))
        else:
            more_terms = _TYPICAL_TERMS * len(sizes)
            more_bytes = _TYPICAL_TERMS * _TYPICAL_BITS / 8 * sum(map(sum, sizes))
        terms, size = terms + math.ceil(spare * more_terms), size + math.ceil(spare * more_bytes)
        self.most = max([_MOST_TERMS if spare else 1, *(count for adapter in counts for count in adapter.values())])
        self.index = torch.zeros(len(sizes), rows, 2, dtype=torch.int32, device=device)
        self.at = torch.zeros(terms, 2, dtype=torch.int64, device=device)
        self.forms = torch.zeros(terms, 2, dtype=torch.uint8, device=device)
        self.scale = torch.zeros(terms, device=device)
        self.data = torch.zeros(size + _MARGIN, dtype=torch.uint8, device=device)
        self._terms, self._data, self._rows = Spans(terms), Spans(size), Spans(rows)
        self._held: dict[int, tuple[int, int, int, int]] = {}
        for count, each in zip(counts, packs, strict=True):
            self._put(count, each)

    def add(self, adapter: Modules) -> int:
        """Put one more adapter into a free row, which is returned. Raises LocalError where it does not fit."""
        count = {module: len(terms.scale) for module, terms in adapter.items()}
        if max(count.values(), default=0) > self.most:
            raise LocalError(
                f"a module has {max(count.values())} terms, but room was made for {self.most}",
                "start the server with this bundle",
            )
        return self._put(count, _packed(adapter, self.data.device))

    def remove(self, row: int) -> None:
        """Free a row. Nothing on the device changes but that the row has no terms."""
        first, count, at, size = self._held.pop(row)
        self.index[:, row] = 0
        self._terms.give(first, count)
        self._data.give(at, size)
        self._rows.give(row, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (self.index, self.at, self.forms, self.scale, self.data))

    def _put(self, counts: Mapping[int, int], adapter: _Adapter) -> int:
        count, size = len(adapter.scale), len(adapter.data)
        row, first, at = self._rows.take(1), self._terms.take(count), self._data.take(size)
        if row is None or first is None or at is None:
            for spans, start, length in ((self._rows, row, 1), (self._terms, first, count), (self._data, at, size)):
                if start is not None:
                    spans.give(start, length)
            raise LocalError(
                f"no room for an adapter of {count:,} terms and {size:,} bytes: {self._rows.free:,} rows, "
                f"{self._terms.free:,} terms and {self._data.free:,} bytes are free",
                "remove others, or start the server with more room",
            )
        own = slice(first, first + count)
        self.at[own] = adapter.at.to(self.at.device) + at
        self.forms[own] = adapter.forms.to(self.at.device)
        self.scale[own] = adapter.scale.to(self.at.device)
        self.data[at : at + size] = adapter.data.to(self.at.device)
        index = torch.zeros(len(self.index), 2, dtype=torch.int32)
        begin = first
        for module, many in counts.items():
            index[module, 0], index[module, 1] = begin, many
            begin += many
        self.index[:, row] = index.to(self.at.device)
        self._held[row] = first, count, at, size
        return row


class _Adapter(NamedTuple):
    """All terms of an adapter, on the CPU."""

    at: Tensor
    forms: Tensor
    scale: Tensor
    data: Tensor


def _packed(adapter: Modules, device: torch.device) -> _Adapter:
    """``device`` is where codes are packed."""
    if not sum(len(terms.scale) for terms in adapter.values()):
        return _Adapter(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.uint8))
    sides = [side.to(device) for terms in adapter.values() for side in (terms.u, terms.v)]
    packed = pack(sides)
    pairs = _pairs([len(side) for side in sides])
    scale = torch.cat([terms.scale for terms in adapter.values()])
    return _Adapter(packed.at[pairs], packed.forms[pairs], scale.cpu(), packed.data.cpu())


def _pairs(counts: list[int]) -> Tensor:
    """[terms, 2]: which vectors belong together, of matrices with so many rows: those of u, of v, of the next u, …"""
    firsts = torch.tensor([0, *counts]).cumsum(0).tolist()
    return torch.cat(
        [
            torch.arange(count)[:, None] + torch.tensor([[u, v]])
            for count, u, v in zip(counts[::2], firsts[::2], firsts[1::2], strict=False)
        ]
    )
