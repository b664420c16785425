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


class CodedModules(NamedTuple):
    """The components of the modules of one adapter, module by module."""

    sizes: Integers
    """[modules, 2]: d_out and d_in of each."""
    counts: Integers
    """[modules]: how many components each has."""
    u: Vector
    """The d_out codes û of every component, one component after another."""
    v: Vector
    """The same of v̂, d_in codes each."""
    scale: NDArray[np.int16]
    """[components]"""


def pack(adapters: Sequence[CodedModules]) -> Arrays:
    """The arrays of a file."""
    sizes, counts = (np.concatenate(each) for each in zip(*(adapter[:2] for adapter in adapters), strict=True))
    lengths, total = _lengths(sizes, counts), int(counts.sum())
    codes = np.concatenate([*(adapter.u for adapter in adapters), *(adapter.v for adapter in adapters)])
    measured = measure(codes, lengths)
    streams, kinds = assign_streams(lengths, measured)
    of_u, of_v = streams[:total], streams[total:]
    rest = np.concatenate([adapter.scale for adapter in adapters]) - _expected(measured.norms[:total])
    adapter_of = _owners([len(adapter.scale) for adapter in adapters])
    bases = np.array([_median(rest[adapter_of == number]) for number in range(len(adapters))], np.int64)
    columns = [*_bytes_of(counts), of_u, of_v - of_u, *_bytes_of(rest - bases[adapter_of])]
    return {
        "bases": bases.astype(np.int16),
        "kinds": kinds,
        "index": _array(
            b"".join(min((deflate(column, alone=alone) for alone in (True, False)), key=len) for column in columns)
        ),
        "codes": _array(pack_streams(codes, lengths, streams, kinds)),
    }


def unpack(arrays: Mapping[str, NDArray[np.generic]], sizes: Sequence[Sequence[Size]]) -> list[CodedModules]:
    """What `pack` was given, for modules of these sizes. Raises Contradiction."""
    flat = [size for adapter in sizes for size in adapter]
    if any(max(size) > _LONGEST for size in flat):
        raise Contradiction("an update is larger than any")
    shapes = np.array(flat, np.int64).reshape(-1, 2)
    columns = _Columns(arrays["index"].tobytes())
    counts = columns.wide(len(shapes))
    if (counts > shapes.min(1)).any():
        raise Contradiction("a module has more components than it can have")
    codes = arrays["codes"].data
    if sum(int(count) * sum(size) for count, size in zip(counts, flat, strict=True)) > _MOST_CODES * codes.nbytes:
        raise Contradiction("there are more codes than its bytes can hold")
    total = int(counts.sum())
    of_u, apart = columns.narrow(total), columns.narrow(total)
    rest = columns.wide(total)
    if columns.left:
        raise Contradiction("the index has more than it should")
    lengths = _lengths(shapes, counts)
    kinds = arrays["kinds"].astype(np.uint8)
    vectors = unpack_streams(codes, lengths, np.concatenate([of_u, of_u + apart]), kinds)
    u, v = np.split(vectors, [int(lengths[:total].sum())])
    modules = _starts([len(adapter) for adapter in sizes])
    components = _starts(counts)[modules]
    bases = arrays["bases"].astype(np.int64)[_owners(np.diff(components))]
    scales = rest.astype(np.uint16).view(np.int16) + bases + _expected(measure(u, lengths[:total]).norms)
    if len(scales) and not -(2**15) <= scales.min() <= scales.max() < 2**15:
        raise Contradiction("a scale is out of range")
    of_adapters = [_starts(own)[components] for own in (lengths[:total], lengths[total:])]
    cut = zip(
        np.split(shapes, modules[1:-1]),
        np.split(counts, modules[1:-1]),
        np.split(u, of_adapters[0][1:-1]),
        np.split(v, of_adapters[1][1:-1]),
        np.split(scales.astype(np.int16), components[1:-1]),
        strict=True,
    )
    return [CodedModules(*own) for own in cut]


class _Columns:
    """Columns of the index, one after another."""

    def __init__(self, data: bytes) -> None:
        self.left = memoryview(data)

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


def _lengths(sizes: Integers, counts: Integers) -> Integers:
    """Of the vectors û of all components, and of their v̂."""
    return np.concatenate([np.repeat(sizes[:, side], counts) for side in (0, 1)])


def _starts(counts: Sequence[int] | Integers) -> Integers:
    """Where each of several runs of this many begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _owners(counts: Sequence[int] | Integers) -> Integers:
    """The adapter of every component."""
    return np.repeat(np.arange(len(counts)), counts)


def _expected(norms: Integers) -> Integers:
    """What scales would be, up to a constant, if all entries had one step: −16 log₂ ‖û‖², from these ``norms``.

    The logarithm of a whole number below 2³¹ is so far from any half that all arithmetic rounds it alike.
    """
    return -np.rint(16 * np.log2(np.maximum(norms, 1))).astype(np.int64)


def _median(numbers: Integers) -> int:
    """One of ``numbers``; 0 if there are none."""
    return int(np.sort(numbers)[len(numbers) // 2]) if len(numbers) else 0


def _array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(data), np.uint8)
