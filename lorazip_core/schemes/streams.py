"""Vectors of small integers as a few entropy-coded streams, and back.

A vector goes to a stream by how many of its codes fit into a byte and by their deviation, so that the bytes of a stream
are alike. Each stream is compressed with deflate (RFC 1951), of which encoders here use the Huffman codes alone: its
redundancy is about 1% over the entropy, it is in every standard library, and it will be decoded alike in decades.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Vector = NDArray[np.int8]
Integers = NDArray[np.int64]
Buffer = bytes | memoryview

PER_BYTE = {5: 1, 3: 2, 2: 7, 1: 127}
"""How many codes a byte holds, and how large they may be: 3⁵, 5³, 15² and 255 are at most 256."""

_PER_OCTAVE = 8  # classes of deviation: finer ones cost more in tables of Huffman codes than they save
_FULL = 2**15  # codes in a stream that is worth a table of its own
_AT_ONCE = 2**8  # vectors that are measured together
_READ = 2**16  # bytes that zlib is given at a time
_STREAMS = 2**8  # at most: their numbers are bytes


class Contradiction(ValueError):
    """Streams that do not hold what they should."""


def assign_streams(vectors: Sequence[Vector]) -> tuple[Bytes, Bytes]:
    """The stream of every vector [n], and how many codes a byte of each stream holds [streams]."""
    lengths = np.array([len(vector) for vector in vectors], np.int64)
    largest, norms = measure(vectors)
    fits = np.select([largest <= most for most in PER_BYTE.values()], list(PER_BYTE))
    mean_squares = np.maximum(norms / np.maximum(lengths, 1), 2.0**-16)
    classes = np.rint(_PER_OCTAVE / 2 * np.log2(mean_squares)).astype(np.int64)
    streams = np.zeros(len(vectors), np.uint8)
    kinds: list[int] = []
    for place, fit in enumerate(PER_BYTE):
        most = _STREAMS * (place + 1) // len(PER_BYTE)
        held = 0
        for one in np.unique(classes[fits == fit]):
            if not held:
                kinds.append(fit)
            own = (fits == fit) & (classes == one)
            streams[own] = len(kinds) - 1
            held += int(lengths[own].sum())
            if held >= _FULL and len(kinds) < most:
                held = 0
    return streams, np.array(kinds, np.uint8)


def measure(vectors: Sequence[Vector]) -> tuple[Integers, Integers]:
    """The largest absolute value and the sum of the squares of every vector."""
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for start in range(0, len(vectors), _AT_ONCE):
        some = vectors[start : start + _AT_ONCE]
        flat = np.concatenate(some).astype(np.int32)
        starts = np.cumsum([0, *map(len, some[:-1])])
        squares = np.add.reduceat(np.square(flat), starts, dtype=np.int64)
        found.append((np.maximum.reduceat(np.abs(flat), starts).astype(np.int64), squares))
    largest, norms = zip(*found, strict=True)
    return np.concatenate(largest), np.concatenate(norms)


def pack_streams(vectors: Sequence[Vector], streams: Bytes, kinds: Bytes) -> bytes:
    """The streams, each compressed, one after another."""
    packed = []
    for stream, kind in enumerate(kinds.tolist()):
        codes = np.concatenate([vectors[number] for number in np.flatnonzero(streams == stream).tolist()])
        packed.append(deflate(_joined(codes, kind)))
    return b"".join(packed)


def unpack_streams(data: Buffer, lengths: Integers, streams: Bytes, kinds: Bytes) -> list[Vector]:
    """The vectors, of these ``lengths`` [n] and ``streams`` [n]. Raises Contradiction."""
    if len(streams) and int(streams.max()) >= len(kinds):
        raise Contradiction("a vector is in a stream that is not there")
    vectors: list[Vector] = [np.empty(0, np.int8)] * len(lengths)
    for stream, kind in enumerate(kinds.tolist()):
        if kind not in PER_BYTE:
            raise Contradiction(f"a byte of a stream cannot hold {kind} codes")
        members = np.flatnonzero(streams == stream)
        ends = np.cumsum(lengths[members])
        count = int(ends[-1]) if len(ends) else 0
        inflated, data = inflate(data, -(-count // kind))
        codes = _split(inflated, kind)[:count]
        for number, vector in zip(members.tolist(), np.split(codes, ends[:-1]), strict=False):
            vectors[number] = vector
    if data:
        raise Contradiction("there are more bytes than streams")
    return vectors


def deflate(data: Bytes, *, alone: bool = True) -> bytes:
    """``data`` as one raw deflate stream; ``alone`` for bytes of which each tells nothing of the next."""
    strategy = zlib.Z_HUFFMAN_ONLY if alone else zlib.Z_DEFAULT_STRATEGY
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return encoder.compress(data.tobytes()) + encoder.flush()


def inflate(data: Buffer, size: int) -> tuple[Bytes, Buffer]:
    """The ``size`` bytes of the first raw deflate stream of ``data``, and what follows it. Raises Contradiction."""
    decoder = zlib.decompressobj(-15)
    view, found, read = memoryview(data), bytearray(), 0
    try:
        while not decoder.eof and read < len(view) and len(found) <= size:
            some = view[read : read + _READ]  # zlib copies what it leaves: all streams that follow, if it had them
            read += len(some)
            # One more than there should be: never more in memory than that.
            found += decoder.decompress(some, size + 1 - len(found))
    except zlib.error as error:
        raise Contradiction(f"no deflate stream: {error}") from None
    if not decoder.eof or len(found) != size:
        raise Contradiction(f"a stream is not of the {size} bytes that it should have")
    return np.frombuffer(found, np.uint8), view[read - len(decoder.unused_data) :]


def _joined(codes: Vector, kind: int) -> Bytes:
    """``kind`` codes in each byte, the first one in the lowest place."""
    most = PER_BYTE[kind]
    padded = np.zeros(-(-len(codes) // kind) * kind, np.int16)
    padded[: len(codes)] = codes
    digits = (padded + most).reshape(-1, kind).astype(np.uint8)
    joined = digits[:, kind - 1].copy()
    for place in range(kind - 2, -1, -1):
        joined *= np.uint8(2 * most + 1)
        joined += digits[:, place]
    return joined


def _split(joined: Bytes, kind: int) -> Vector:
    """The codes of every byte. Raises Contradiction for a byte that stands for none."""
    base = 2 * PER_BYTE[kind] + 1
    if len(joined) and int(joined.max()) >= base**kind:
        raise Contradiction("a byte stands for no codes")
    every = np.arange(256)
    table = np.stack([every // base**place % base for place in range(kind)], 1) - PER_BYTE[kind]
    codes: Vector = table.astype(np.int8)[joined].reshape(-1)
    return codes
