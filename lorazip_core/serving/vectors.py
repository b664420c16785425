"""Vectors of numbers as bytes, so that kernels read any element of any of them from one array.

The `form` of a vector is a byte: for codes as in `schemes.fixed_width`, for floats one of `FLOATS`. A vector begins at
a multiple of `ALIGNED` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schemes.fixed_width import forms_of, pack_all
from ..schemes.fixed_width import unpack as unpack_codes

FLOATS = {torch.bfloat16: 32, torch.float16: 33, torch.float32: 34}
"""The form of a vector of such elements."""
ALIGNED = 4

Bytes = NDArray[np.uint8]


class Packed(NamedTuple):
    """Vectors one after another, in whatever order."""

    data: Bytes
    """[bytes]"""
    at: NDArray[np.int64]
    """[n]: where each begins"""
    forms: Bytes
    """[n]"""


def pack(vectors: Sequence[Tensor]) -> Packed:
    """All rows of matrices [k, length] of int8, bf16, f16, f32 or f64, which are on the CPU.

    Codes take the fewest bits that hold all of their vector; f64 becomes f32.
    """
    vectors = [each.float() if each.dtype == torch.float64 else each for each in vectors]
    kinds: dict[tuple[int, torch.dtype], list[int]] = {}
    for number, each in enumerate(vectors):
        kinds.setdefault((each.shape[1], each.dtype), []).append(number)
    ends = np.cumsum([0, *map(len, vectors)])
    at, forms = np.zeros(ends[-1], np.int64), np.zeros(ends[-1], np.uint8)
    data, size = [np.zeros(0, np.uint8)], 0
    for (_, dtype), numbers in kinds.items():
        rows = torch.cat([vectors[number] for number in numbers])
        places = np.concatenate([np.arange(ends[number], ends[number + 1]) for number in numbers])
        forms[places] = forms_of(rows.numpy()) if dtype == torch.int8 else FLOATS[dtype]
        for some, packed in _packed(rows, forms[places]):
            aligned = np.zeros((len(some), -(-packed.shape[1] // ALIGNED) * ALIGNED), np.uint8)
            aligned[:, : packed.shape[1]] = packed
            at[places[some]] = size + aligned.shape[1] * np.arange(len(some))
            data.append(aligned.ravel())
            size += aligned.size
    return Packed(np.concatenate(data), at, forms)


def unpack(data: Tensor, at: int, form: int, length: int) -> Tensor:
    """The elements [length] of one vector, in float32. ``data`` has a byte after it."""
    for dtype, known in FLOATS.items():
        if form == known:
            return data[at : at + length * dtype.itemsize].view(dtype).float()
    only = torch.zeros(1, dtype=torch.int32, device=data.device)
    return unpack_codes(data[at:], only, only + form, length)[0].float()


def _packed(rows: Tensor, forms: Bytes) -> Iterator[tuple[NDArray[np.int64], Bytes]]:
    """As `pack_all`, for codes or floats."""
    if rows.is_floating_point():
        yield np.arange(len(rows)), rows.contiguous().view(torch.uint8).numpy()
    else:
        yield from pack_all(rows.numpy(), forms)
