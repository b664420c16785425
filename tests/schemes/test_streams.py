"""Vectors of small integers in streams: what goes in comes out, and nothing else is taken for it."""

from __future__ import annotations

import tracemalloc
import zlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorazip_core.schemes import streams as streams_module
from lorazip_core.schemes.streams import (
    PER_BYTE,
    Bytes,
    Contradiction,
    Vector,
    assign_streams,
    deflate,
    inflate,
    measure,
    pack_streams,
    unpack_streams,
)


def vectors_of(largest: int) -> st.SearchStrategy[Vector]:
    return hnp.arrays(np.int8, st.integers(1, 60), elements=st.integers(-largest, largest))


VECTORS = st.lists(st.one_of([vectors_of(largest) for largest in (*PER_BYTE.values(), 0)]), max_size=12)


def lengths_of(vectors: list[Vector]) -> np.ndarray:
    return np.array([len(vector) for vector in vectors], np.int64)


def flat(vectors: list[Vector]) -> Vector:
    return np.concatenate([np.zeros(0, np.int8), *vectors])


def assigned(vectors: list[Vector]) -> tuple[Bytes, Bytes]:
    lengths = lengths_of(vectors)
    return assign_streams(lengths, measure(flat(vectors), lengths))


@given(VECTORS)
def test_round_trip(vectors: list[Vector]) -> None:
    streams, kinds = assigned(vectors)
    assert (streams.dtype, kinds.dtype, len(streams)) == (np.uint8, np.uint8, len(vectors))
    unpacked = unpack_streams(
        pack_streams(flat(vectors), lengths_of(vectors), streams, kinds), lengths_of(vectors), streams, kinds
    )
    np.testing.assert_array_equal(flat(vectors), unpacked)


@given(VECTORS)
def test_a_vector_is_where_its_largest_code_fits(vectors: list[Vector]) -> None:
    streams, kinds = assigned(vectors)
    for vector, stream in zip(vectors, streams, strict=True):
        kind = int(kinds[stream])
        assert np.abs(vector.astype(int)).max() <= PER_BYTE[kind]
        assert all(np.abs(vector.astype(int)).max() > PER_BYTE[more] for more in PER_BYTE if more > kind)


def test_a_byte_holds_what_it_can() -> None:
    for kind, most in PER_BYTE.items():
        assert (2 * most + 1) ** kind <= 256
        assert (2 * most + 3) ** kind > 256


@pytest.mark.parametrize(
    ("kind", "codes", "joined"),
    [
        (1, [-127, 0, 127], [0, 127, 254]),
        (2, [-7, 7, 1, 0], [14 * 15, 8 + 7 * 15]),
        (3, [2, -2, -2, 1], [4, 3 + 2 * 5 + 2 * 25]),  # code 0 where there is none
        (5, [1, 1, 1, 1, 1, -1], [242, 0 + 3 + 9 + 27 + 81]),
    ],
)
def test_bytes_are_as_specified(kind: int, codes: list[int], joined: list[int]) -> None:
    streams, kinds = np.zeros(1, np.uint8), np.array([kind], np.uint8)
    lengths = np.array([len(codes)])
    packed = pack_streams(np.array(codes, np.int8), lengths, streams, kinds)
    assert list(zlib.decompress(packed, -15)) == joined
    assert unpack_streams(packed, lengths, streams, kinds).tolist() == codes


def test_there_are_never_more_streams_than_a_byte_can_number() -> None:
    """Of every deviation, as many codes as are worth a stream."""
    rng = np.random.default_rng(0)
    vectors = []
    for most in PER_BYTE.values():
        for share in 2.0 ** -np.arange(0, 15, 0.2):
            vector = np.zeros(2**15 + 1, np.int8)
            count = max(1, int(share * len(vector)))
            vector[rng.choice(len(vector), count, replace=False)] = most
            vectors.append(vector)
    streams, kinds = assigned(vectors)
    assert 128 < len(kinds) <= 256
    packed = pack_streams(flat(vectors), lengths_of(vectors), streams, kinds)
    assert np.array_equal(unpack_streams(packed, lengths_of(vectors), streams, kinds), flat(vectors))


@given(st.binary(max_size=300), st.binary(max_size=20), st.booleans(), st.sampled_from([1, 7, 2**16]))
def test_inflate_gives_what_follows(data: bytes, after: bytes, alone: bool, read: int) -> None:
    with mock.patch.object(streams_module, "_READ", read):
        check_what_follows(data, after, alone)


def check_what_follows(data: bytes, after: bytes, alone: bool) -> None:
    packed = deflate(np.frombuffer(data, np.uint8), alone=alone)
    found, left = inflate(packed + after, len(data))
    assert (found.tobytes(), left) == (data, after)
    for size in {len(data) + 1, max(len(data) - 1, 0), 0} - {len(data)}:
        with pytest.raises(Contradiction):
            inflate(packed, size)
    with pytest.raises(Contradiction):
        inflate(packed[:-1], len(data))


@pytest.mark.parametrize("piece", [1, 2, 7, 2**18])
def test_inflate_does_so_piece_by_piece(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "_READ", piece)
    data, after = np.random.default_rng(0).integers(0, 9, 500).astype(np.uint8), b"what follows"
    packed = deflate(data)
    for end in range(len(packed)):
        with pytest.raises(Contradiction):
            inflate(packed[:end], len(data))
    found, left = inflate(packed + after, len(data))
    assert found.tobytes() == data.tobytes()
    assert left == after
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(Contradiction):
            inflate(packed + after, size)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_what_is_measured(count: int) -> None:
    """Also of more vectors than are measured together, and of sums beyond what 16 bits hold."""
    rng = np.random.default_rng(count)
    vectors = [rng.integers(-127, 128, rng.integers(1, 90)).astype(np.int8) for _ in range(count)]
    largest, norms = measure(flat(vectors), lengths_of(vectors))
    assert largest.tolist() == [max(map(abs, vector.tolist())) for vector in vectors]
    assert norms.tolist() == [sum(code**2 for code in vector.tolist()) for vector in vectors]


@given(st.binary(max_size=60), st.integers(0, 60))
def test_inflate_of_anything(data: bytes, size: int) -> None:
    try:
        found, left = inflate(data, size)
    except Contradiction:
        return
    assert len(found) == size
    assert data.endswith(bytes(left))


def test_what_follows_a_stream_is_not_copied() -> None:
    """Once for each of 256 streams, that would take longer than all else."""
    after = bytes(2**24)
    packed = deflate(np.arange(100, dtype=np.uint8)) + after
    tracemalloc.start()
    _, left = inflate(packed, 100)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert left == after


def test_a_bomb_takes_no_memory() -> None:
    packed = deflate(np.zeros(2**28, np.uint8), alone=False)
    assert len(packed) < 2**19
    tracemalloc.start()
    with pytest.raises(Contradiction, match="not of the 1000 bytes"):
        inflate(packed, 1000)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_gaussian_codes_take_about_their_entropy() -> None:
    rng = np.random.default_rng(0)
    for deviation in (0.3, 0.8, 3.0, 20.0):
        vectors = [np.rint(rng.normal(0, deviation, 512)).clip(-127, 127).astype(np.int8) for _ in range(400)]
        streams, kinds = assigned(vectors)
        shares = np.unique(np.concatenate(vectors), return_counts=True)[1] / (400 * 512)
        entropy = -(shares * np.log2(shares)).sum() * 400 * 512 / 8
        packed = len(pack_streams(flat(vectors), lengths_of(vectors), streams, kinds))
        assert packed < (1.03 if deviation > 0.5 else 1.06) * entropy


@settings(max_examples=60)
@given(VECTORS.filter(bool), st.data())
def test_what_does_not_fit_is_refused(vectors: list[Vector], data: st.DataObject) -> None:
    streams, kinds = assigned(vectors)
    packed, lengths = pack_streams(flat(vectors), lengths_of(vectors), streams, kinds), lengths_of(vectors)
    place = data.draw(st.integers(0, len(vectors) - 1))
    for extra in (b"\0", deflate(np.zeros(3, np.uint8))):
        with pytest.raises(Contradiction):
            unpack_streams(packed + extra, lengths, streams, kinds)
    with pytest.raises(Contradiction):
        unpack_streams(packed[:-1], lengths, streams, kinds)
    more = lengths.copy()
    more[place] += 5  # at least another byte
    with pytest.raises(Contradiction):
        unpack_streams(packed, more, streams, kinds)
    other = streams.copy()
    other[place] = len(kinds)
    with pytest.raises(Contradiction, match="not there"):
        unpack_streams(packed, lengths, other, kinds)
    wrong = kinds.copy()
    wrong[streams[place]] = 4
    with pytest.raises(Contradiction, match="cannot hold 4"):
        unpack_streams(packed, lengths, streams, wrong)
