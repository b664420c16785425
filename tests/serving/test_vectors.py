"""Vectors of codes and of floats in one array: each is found again, whatever lies beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorazip_core.schemes import fixed_width
from lorazip_core.schemes.fixed_width import ODD, packed_bytes
from lorazip_core.serving import vectors as module
from lorazip_core.serving.vectors import ALIGNED, FLOATS, Packed, pack, unpack

DTYPES = [torch.int8, *FLOATS, torch.float64]


@st.composite
def matrices(draw: st.DrawFn) -> list[Tensor]:
    found = []
    for _ in range(draw(st.integers(0, 6))):
        rows, length = draw(st.integers(0, 5)), draw(st.sampled_from([1, 7, 8, 9, 33]))
        dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
        values = np.random.default_rng(seed).uniform(-1, 1, (rows, length))
        if dtype == torch.int8:
            largest = draw(st.sampled_from([1, 2, 7, 60, 127]))
            codes = np.rint(largest * values).astype(np.int8)
            found.append(torch.from_numpy(codes | 1 if draw(st.booleans()) else codes))
        else:
            found.append(torch.from_numpy(values).to(dtype))
    return found


def rows_of(vectors: list[Tensor]) -> list[Tensor]:
    return [row for each in vectors for row in each]


@settings(deadline=None)
@given(st.lists(matrices(), max_size=4))
def test_round_trip(owners: list[list[Tensor]]) -> None:
    for packed, vectors in zip(pack(owners), owners, strict=True):
        data = torch.cat([torch.from_numpy(packed.data), torch.full((1,), 255, dtype=torch.uint8)])
        for at, form, row in zip(packed.at.tolist(), packed.forms.tolist(), rows_of(vectors), strict=True):
            found = unpack(data, at, form, len(row))
            assert found.dtype == torch.float32
            assert torch.equal(found, row.float())


def sizes(packed: Packed, vectors: list[Tensor]) -> list[int]:
    bytes_of = {form: dtype.itemsize for dtype, form in FLOATS.items()}
    return [
        len(row) * bytes_of[form] if form in bytes_of else packed_bytes(form, len(row))
        for form, row in zip(packed.forms.tolist(), rows_of(vectors), strict=True)
    ]


@settings(deadline=None)
@given(st.lists(matrices(), max_size=4))
def test_those_of_an_owner_lie_side_by_side_and_aligned(owners: list[list[Tensor]]) -> None:
    for packed, vectors in zip(pack(owners), owners, strict=True):
        assert packed.data.dtype == packed.forms.dtype == np.uint8
        assert not (packed.at % ALIGNED).any()
        end = 0
        for at, size in sorted(zip(packed.at.tolist(), sizes(packed, vectors), strict=True)):
            assert at == end
            end = at + -(-size // ALIGNED) * ALIGNED
        assert len(packed.data) == end


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (torch.tensor([[-1, 1, 1]], dtype=torch.int8), 1 | ODD),
        (torch.tensor([[-1, 0, 0]], dtype=torch.int8), 1),
        (torch.tensor([[-2, 0, 1]], dtype=torch.int8), 2),
        (torch.tensor([[100, 0, 1]], dtype=torch.int8), 8),
        (torch.ones(1, 3, dtype=torch.bfloat16), 32),
        (torch.ones(1, 3, dtype=torch.float16), 33),
        (torch.ones(1, 3), 34),
        (torch.ones(1, 3, dtype=torch.float64), 34),
    ],
)
def test_the_form_of_a_vector(values: Tensor, form: int) -> None:
    assert pack([[values]])[0].forms.tolist() == [form]


def test_floats_of_an_owner_have_one_form() -> None:
    """As the kernels for many tokens take them to have."""
    half, single = torch.ones(1, 3, dtype=torch.float16), torch.full((2, 5), 1e-30)
    mixed, alone = pack([[half, single], [half]])
    assert mixed.forms.tolist() == [FLOATS[torch.float32]] * 3
    assert alone.forms.tolist() == [FLOATS[torch.float16]]


def test_more_than_are_packed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_width, "_AT_ONCE", 7)
    monkeypatch.setattr(module, "_AT_ONCE", 11)
    largest = torch.arange(600)[:, None] % 7 + 1
    codes = (
        (torch.rand(600, 9, generator=torch.Generator().manual_seed(0)) * 2 * largest - largest).round().to(torch.int8)
    )
    [packed] = pack([[codes[:350].mT.contiguous().mT, codes[350:]]])  # strides are no matter
    data = torch.from_numpy(np.append(packed.data, np.uint8(0)))
    found = [unpack(data, at, form, 9) for at, form in zip(packed.at.tolist(), packed.forms.tolist(), strict=True)]
    assert torch.equal(torch.stack(found), codes.float())
