"""The file of a `coded` scheme: codes of several adapters in shared streams, and an index that says whose they are.

The codes of a component are two vectors, û and v̂. ``index`` is a sequence of deflate streams, one for each column of a
table: how many components every module has (low bytes, high bytes); and of every component the stream of û, the stream
of v̂ less that of û (mod 256), and its scale less what is expected (low bytes, high bytes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .scheme import Size
from .streams import (
    Buffer,
    Bytes,
    Contradiction,
    Integers,
    Vector,
    assign_streams,
    deflate,
    inflate,
    measure,
    pack_streams,
    unpack_streams,
)

Arrays = dict[str, NDArray[np.generic]]

# Of files that are made to fill memory, not of any that is meant to be read:
_LONGEST = 2**28  # of a vector
_MOST_CODES = 64  # for each byte that they are stored in: Huffman codes alone leave 40


class CodedModule(NamedTuple):
    """The k components of a module."""

    u: NDArray[np.int8]
    """[k, d_out]"""
    v: NDArray[np.int8]
    """[k, d_in]"""
    scale: NDArray[np.int16]
    """[k]"""


def pack(adapters: Sequence[Sequence[CodedModule]]) -> Arrays:
    """The arrays of a file: of every adapter, its modules in order."""
    modules = [module for adapter in adapters for module in adapter]
    counts = np.array([len(module.scale) for module in modules], np.int64)
    us = [vector for module in modules for vector in module.u]
    vs = [vector for module in modules for vector in module.v]
    streams, kinds = assign_streams([*us, *vs])
    of_u, of_v = streams[: len(us)], streams[len(us) :]
    scales = np.concatenate([np.zeros(0, np.int64), *(module.scale for module in modules)])
    rest = scales - _expected(us)
    adapter_of = np.repeat(_owners(adapters), counts)
    bases = np.array([_median(rest[adapter_of == number]) for number in range(len(adapters))], np.int64)
    columns = [*_bytes_of(counts), of_u, of_v - of_u, *_bytes_of(rest - bases[adapter_of])]
    return {
        "bases": bases.astype(np.int16),
        "kinds": kinds,
        "index": _array(
            b"".join(min((deflate(column, alone=alone) for alone in (True, False)), key=len) for column in columns)
        ),
        "codes": _array(pack_streams([*us, *vs], streams, kinds)),
    }


def unpack(arrays: Mapping[str, NDArray[np.generic]], sizes: Sequence[Sequence[Size]]) -> list[list[CodedModule]]:
    """What `pack` was given, for modules of these sizes. Raises Contradiction."""
    flat = [size for adapter in sizes for size in adapter]
    if any(max(size) > _LONGEST for size in flat):
        raise Contradiction("an update is larger than any")
    shapes = np.array(flat, np.int64).reshape(-1, 2)
    columns = _Columns(arrays["index"].tobytes())
    counts = columns.wide(len(shapes))
    if (counts > shapes.min(1)).any():
        raise Contradiction("a module has more components than it can have")
    codes = arrays["codes"].tobytes()
    if sum(int(count) * sum(size) for count, size in zip(counts, flat, strict=True)) > _MOST_CODES * len(codes):
        raise Contradiction("there are more codes than its bytes can hold")
    total = int(counts.sum())
    of_u, apart = columns.narrow(total), columns.narrow(total)
    rest = columns.wide(total)
    if columns.left:
        raise Contradiction("the index has more than it should")
    streams = np.concatenate([of_u, of_u + apart])
    lengths = np.concatenate([np.repeat(shapes[:, side], counts) for side in (0, 1)])
    kinds = arrays["kinds"].astype(np.uint8)
    vectors = unpack_streams(codes, lengths, streams, kinds)
    bases = arrays["bases"].astype(np.int64)
    scales = (
        rest.astype(np.uint16).view(np.int16) + bases[np.repeat(_owners(sizes), counts)] + _expected(vectors[:total])
    )
    if len(scales) and not -(2**15) <= scales.min() <= scales.max() < 2**15:
        raise Contradiction("a scale is out of range")
    stored = scales.astype(np.int16)
    ends = np.cumsum(counts)
    modules = iter(
        CodedModule(
            _stacked(vectors[end - count : end], d_out),
            _stacked(vectors[total + end - count : total + end], d_in),
            stored[end - count : end],
        )
        for end, count, (d_out, d_in) in zip(ends.tolist(), counts.tolist(), shapes.tolist(), strict=True)
    )
    return [[next(modules) for _ in adapter] for adapter in sizes]


class _Columns:
    """Columns of the index, one after another."""

    def __init__(self, data: bytes) -> None:
        self.left: Buffer = data

    def narrow(self, count: int) -> Bytes:
        """One of bytes."""
        column, self.left = inflate(self.left, count)
        return column

    def wide(self, count: int) -> Integers:
        """One of numbers of 16 bits, without sign."""
        low, high = self.narrow(count), self.narrow(count)
        return low.astype(np.int64) + 256 * high.astype(np.int64)


def _bytes_of(numbers: Integers) -> Iterator[Bytes]:
    """The low and the high bytes of numbers of 16 bits: apart they compress better."""
    yield (numbers & 255).astype(np.uint8)
    yield (numbers >> 8 & 255).astype(np.uint8)


def _owners(adapters: Sequence[Sequence[object]]) -> Integers:
    """The adapter of every module."""
    return np.repeat(np.arange(len(adapters)), [len(adapter) for adapter in adapters])


def _expected(us: Sequence[Vector]) -> Integers:
    """What scales would be, up to a constant, if all entries had one step: −16 log₂ ‖û‖².

    The logarithm of a whole number below 2³¹ is so far from any half that all arithmetic rounds it alike.
    """
    _, norms = measure(us)
    return -np.rint(16 * np.log2(np.maximum(norms, 1))).astype(np.int64)


def _median(numbers: Integers) -> int:
    """One of ``numbers``; 0 if there are none."""
    return int(np.sort(numbers)[len(numbers) // 2]) if len(numbers) else 0


def _stacked(vectors: list[Vector], length: int) -> NDArray[np.int8]:
    return np.stack(vectors) if vectors else np.zeros((0, length), np.int8)


def _array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(data), np.uint8)
