"""Codes at fixed width: the ones that went in, from the fewest bits that hold them."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lorazip_core.schemes.fixed_width import ODD, forms_of, pack, packed_bytes, unpack


@st.composite
def vectors(draw: st.DrawFn) -> list[NDArray[np.int8]]:
    """Of one length, each of its own range, odd codes alone among them."""
    length = draw(st.integers(1, 40))
    found = []
    for _ in range(draw(st.integers(0, 6))):
        largest = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 31, 63, 64, 127]))
        codes = draw(hnp.arrays(np.int8, length, elements=st.integers(-largest, largest)))
        found.append(codes | 1 if draw(st.booleans()) else codes)
    return [np.zeros(length, np.int8), *found]


@given(vectors())
def test_round_trip(codes: list[NDArray[np.int8]]) -> None:
    """All vectors one after another, any of them by where it begins."""
    stacked = np.stack(codes)
    forms = forms_of(stacked)
    packed = [pack(vector[None], int(form))[0] for vector, form in zip(codes, forms, strict=True)]
    sizes = [len(data) for data in packed]
    assert sizes == [packed_bytes(int(form), stacked.shape[1]) for form in forms]
    data = torch.from_numpy(np.concatenate([*packed, np.full(1, 255, np.uint8)]))
    at = torch.tensor([0, *accumulate(sizes)][:-1])
    found = unpack(data, at.flip(0).int(), torch.from_numpy(forms).flip(0), stacked.shape[1])
    assert found.dtype == torch.int8
    assert np.array_equal(found.flip(0).numpy(), stacked)


@pytest.mark.parametrize("form", [*range(1, 9), *(bits | ODD for bits in range(1, 8))])
@pytest.mark.parametrize("length", [1, 8, 13])
def test_vectors_of_one_form_are_packed_as_each_by_itself(form: int, length: int) -> None:
    bits, odd = form & 15, bool(form & ODD)
    fields = np.random.default_rng(form).integers(0, 2**bits, (5, length))
    codes = (2 * fields - 2**bits + 1 if odd else fields - 2 ** (bits - 1)).astype(np.int8)
    expected = [sum(int(field) << bits * place for place, field in enumerate(row)) for row in fields]
    packed = pack(codes, form)
    assert [int.from_bytes(row.tobytes(), "little") for row in packed] == expected
    assert packed.shape == (5, -(-bits * length // 8))


@pytest.mark.parametrize(
    ("codes", "bits", "odd"),
    [
        ([-1, 1, 1], 1, True),
        ([-3, 1, 3], 2, True),
        ([5, -7, 1], 3, True),
        ([127, -127], 7, True),
        ([0], 1, False),
        ([-1, 0], 1, False),
        ([-1, 0, 1], 2, False),
        ([2, 1], 3, False),
        ([-4, 3], 3, False),
        ([7, 0], 4, False),
        ([15, 2], 5, False),
        ([31, 2], 6, False),
        ([63, 2], 7, False),
        ([64, 1], 8, False),
        ([-128, 127], 8, False),
    ],
)
def test_the_fewest_bits(codes: list[int], bits: int, odd: bool) -> None:
    vector = np.array([codes], np.int8)
    assert forms_of(vector).tolist() == [bits | ODD * odd]
    assert pack(vector, int(forms_of(vector)[0])).shape == (1, -(-bits * len(codes) // 8))


def test_where_a_code_is() -> None:
    """The layout that kernels read: of 3 bits, code 2 is in bits 6 to 8."""
    assert pack(np.array([[-4, 3, 1, 0]], np.int8), 3).tolist() == [[0b01_111_000, 0b0000_100_1]]
    assert pack(np.array([[-3, 3, -1, 1, 3]], np.int8), 2 | ODD).tolist() == [[0b10_01_11_00, 0b11]]
