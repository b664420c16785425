"""Vectors of small integers as a few entropy-coded streams, and back.

A vector goes to a stream by how many of its codes fit into a byte and by their deviation, so that the bytes of a stream
are alike. Each stream is compressed with deflate (RFC 1951), of which encoders here use the Huffman codes alone: its
redundancy is about 1% over the entropy, it is in every standard library, and it will be decoded alike in decades.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

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
_AT_ONCE = 2**9  # vectors that are measured together, for the reasons of `fixed_width`
_READ = 2**18  # bytes that zlib is given at a time
_STREAMS = 2**8  # at most: their numbers are bytes


class Contradiction(ValueError):
    """Streams that do not hold what they should."""


class Measured(NamedTuple):
    """What is known of n vectors."""

    largest: Integers
    """[n]: the largest absolute value of each."""
    norms: Integers
    """[n]: the sum of the squares of each."""


def measure(codes: Vector, lengths: Integers) -> Measured:
    """Measure vectors of these ``lengths`` [n], none of them 0, whose ``codes`` follow each other."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    largest, norms = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    for first in range(0, len(lengths), _AT_ONCE):
        own = slice(first, first + _AT_ONCE)
        some, at = codes[starts[first] : ends[own][-1]].astype(np.int16), starts[own] - starts[first]
        largest[own] = np.maximum.reduceat(np.abs(some), at)
        some *= some
        norms[own] = np.add.reduceat(some, at, dtype=np.int64)
    return Measured(largest, norms)


def assign_streams(lengths: Integers, measured: Measured) -> tuple[Bytes, Bytes]:
    """The stream of every vector [n], and how many codes a byte of each stream holds [streams]."""
    fits = np.select([measured.largest <= most for most in PER_BYTE.values()], list(PER_BYTE))
    mean_squares = np.maximum(measured.norms / np.maximum(lengths, 1), 2.0**-16)
    classes = np.rint(_PER_OCTAVE / 2 * np.log2(mean_squares)).astype(np.int64)
    streams = np.zeros(len(lengths), np.uint8)
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


def pack_streams(codes: Vector, lengths: Integers, streams: Bytes, kinds: Bytes) -> bytes:
    """The streams of vectors as `measure` takes them, each compressed, one after another."""
    data, ends = codes.data, np.cumsum(lengths)
    packed = []
    for stream, kind in enumerate(kinds.tolist()):
        members = np.flatnonzero(streams == stream)
        begin_and_end = zip((ends - lengths)[members].tolist(), ends[members].tolist(), strict=True)
        # As bytes: numpy, which copies no faster, has threads wait for each other after every vector.
        together = b"".join([data[begin:end] for begin, end in begin_and_end])
        packed.append(deflate(_joined(np.frombuffer(together, np.int8), kind)))
    return b"".join(packed)


def unpack_streams(data: Buffer, lengths: Integers, streams: Bytes, kinds: Bytes) -> Vector:
    """The codes of vectors of these ``lengths`` [n] and ``streams`` [n], as they follow each other.

    Raises Contradiction.
    """
    if len(streams) and int(streams.max()) >= len(kinds):
        raise Contradiction("a vector is in a stream that is not there")
    inflated: list[Vector] = []
    for stream, kind in enumerate(kinds.tolist()):
        if kind not in PER_BYTE:
            raise Contradiction(f"a byte of a stream cannot hold {kind} codes")
        count = int(lengths[streams == stream].sum())
        joined, data = inflate(data, -(-count // kind))
        inflated.append(_split(joined, kind))
    if len(data):
        raise Contradiction("there are more bytes than streams")
    codes = np.empty(int(lengths.sum()), np.int8)  # not before: now so many are known to be there
    data, ends = codes.data, np.cumsum(lengths)
    for stream, own in enumerate(inflated):
        members = np.flatnonzero(streams == stream)
        source, begin = own.data, 0
        for length, end in zip(lengths[members].tolist(), ends[members].tolist(), strict=True):
            data[end - length : end] = source[begin : begin + length]
            begin += length
    return codes


def deflate(data: Bytes, *, alone: bool = True) -> bytes:
    """``data`` as one raw deflate stream; ``alone`` for bytes of which each tells nothing of the next."""
    strategy = zlib.Z_HUFFMAN_ONLY if alone else zlib.Z_DEFAULT_STRATEGY
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return encoder.compress(np.ascontiguousarray(data).data) + encoder.flush()


def inflate(data: Buffer, size: int) -> tuple[Bytes, memoryview]:
    """The ``size`` bytes of the first raw deflate stream of ``data``, and what follows it. Raises Contradiction."""
    left = memoryview(data)
    decoder = zlib.decompressobj(-15)
    found: list[bytes] = []
    missing = size + 1  # one more: never more in memory than there should be
    while len(left) and missing and not decoder.eof:
        try:
            # Of what it is given, the decoder copies all that follows the stream: not too much at a time.
            found.append(decoder.decompress(left[:_READ], missing))
        except zlib.error as error:
            raise Contradiction(f"no deflate stream: {error}") from None
        missing -= len(found[-1])
        left = left[min(_READ, len(left)) - len(decoder.unused_data) :]
    if not decoder.eof or missing != 1:
        raise Contradiction(f"a stream is not of the {size} bytes that it should have")
    return np.frombuffer(b"".join(found), np.uint8), left


def _joined(codes: Vector, kind: int) -> Bytes:
    """``kind`` codes in each byte, the first one in the lowest place."""
    most = np.uint8(PER_BYTE[kind])
    padded = np.full(-(-len(codes) // kind) * kind, most)
    np.add(codes.view(np.uint8), most, out=padded[: len(codes)])
    digits = padded.reshape(-1, kind)
    joined = digits[:, kind - 1].copy()
    for place in range(kind - 2, -1, -1):
        joined *= np.uint8(2 * most + 1)
        joined += digits[:, place]
    return joined


def _split(joined: Bytes, kind: int) -> Vector:
    """The codes of every byte. Raises Contradiction for a byte that stands for none."""
    most = PER_BYTE[kind]
    base = 2 * most + 1
    if len(joined) and int(joined.max()) >= base**kind:
        raise Contradiction("a byte stands for no codes")
    digits = np.empty((len(joined), kind), np.uint8)
    for place in range(kind - 1):
        higher = joined // np.uint8(base)
        np.subtract(joined, higher * np.uint8(base), out=digits[:, place])
        joined = higher
    digits[:, kind - 1] = joined
    digits -= np.uint8(most)
    return digits.reshape(-1).view(np.int8)
