"""Vectors of numbers as bytes, so that kernels read any element of any of them from one array.

The `form` of a vector is a byte: for codes as in `schemes.fixed_width`, for floats one of `FLOATS`. A vector begins at
a multiple of `ALIGNED` bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schemes.fixed_width import forms_of, pack_all, packed_bytes
from ..schemes.fixed_width import unpack as unpack_codes

FLOATS = {torch.bfloat16: 32, torch.float16: 33, torch.float32: 34}
"""The form of a vector of such elements."""
ALIGNED = 4
_AT_ONCE = 2**9  # vectors that are looked at together, as in `fixed_width`

Bytes = NDArray[np.uint8]


class Packed(NamedTuple):
    """Vectors one after another, in whatever order."""

    data: Bytes
    """[bytes]"""
    at: NDArray[np.int64]
    """[n]: where each begins"""
    forms: Bytes
    """[n]"""


def pack(owners: Sequence[Sequence[Tensor]]) -> list[Packed]:
    """For each owner, all rows of its matrices [k, length] of int8, bf16, f16, f32 or f64, which are on the CPU.

    Codes take the fewest bits that hold all of their vector; f64 becomes f32, and so do all floats of an owner that has
    some of several dtypes. Many owners at once take less time than one by one.
    """
    matrices = [each for own in owners for each in _of_one_dtype(own)]
    ends = np.cumsum([0, *map(len, matrices)])
    first = ends[np.cumsum([0, *map(len, owners)])]
    owner = np.repeat(np.arange(len(owners)), np.diff(first))
    alike: dict[tuple[int, torch.dtype], list[int]] = {}
    for number, each in enumerate(matrices):
        alike.setdefault((each.shape[1], each.dtype), []).append(number)
    kind, sizes, forms = owner * 0, owner * 0, np.zeros(len(owner), np.uint8)
    kinds: list[tuple[list[Tensor], NDArray[np.int64]]] = []
    for (length, dtype), numbers in alike.items():
        places = np.concatenate([np.arange(ends[number], ends[number + 1]) for number in numbers])
        own = [matrices[number] for number in numbers]
        if dtype == torch.int8:
            own = [torch.cat(own)]
            forms[places] = _forms(own[0].numpy())
            sizes[places] = packed_bytes(forms[places].astype(np.int64), length)
        else:
            forms[places] = FLOATS[dtype]
            sizes[places] = length * dtype.itemsize
        kind[places] = len(kinds)
        kinds.append((own, places))
    sizes = -(-sizes // ALIGNED) * ALIGNED
    at, order = owner * 0, np.lexsort((forms, kind, owner))  # where they lie, those of one form side by side
    at[order] = np.cumsum(sizes[order]) - sizes[order]
    data = np.zeros(sizes.sum(), np.uint8)
    for own, places in kinds:
        rows = own[0] if len(own) == 1 else torch.cat(own)  # of floats, of one kind at a time: they are large
        for some, packed in _packed(rows, forms[places]) if len(rows) else ():
            _put(data, at[places[some]], packed)
    begins = np.cumsum(np.append(0, np.bincount(owner, sizes, len(owners)))).astype(np.int64)
    return [
        Packed(data[begin:end], at[a:b] - begin, forms[a:b])
        for (begin, end), (a, b) in zip(pairwise(begins), pairwise(first), strict=True)
    ]


def _of_one_dtype(own: Sequence[Tensor]) -> Iterator[Tensor]:
    """Kernels ask once what the floats of an adapter are."""
    dtypes = {each.dtype for each in own if each.is_floating_point()}
    for each in own:
        wider = each.is_floating_point() and (len(dtypes) > 1 or each.dtype == torch.float64)
        yield each.float() if wider else each


def _forms(codes: NDArray[np.int8]) -> Bytes:
    """As `forms_of`, of not too many rows at once to stay in the cache of a processor."""
    return np.concatenate([forms_of(some) for some in np.split(codes, range(_AT_ONCE, len(codes), _AT_ONCE))])


def _put(data: Bytes, at: NDArray[np.int64], packed: Bytes) -> None:
    """Write vectors [k, bytes] to where they begin. Those that follow each other there are written at once."""
    size = -(-packed.shape[1] // ALIGNED) * ALIGNED
    edges = np.flatnonzero(np.diff(at) != size) + 1
    for first, end in zip([0, *edges.tolist()], [*edges.tolist(), len(at)], strict=True):
        begin, count = int(at[first]), end - first
        data[begin : begin + count * size].reshape(count, size)[:, : packed.shape[1]] = packed[first:end]


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
