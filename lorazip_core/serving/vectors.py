"""Vectors of numbers as bytes, so that kernels read any element of any of them from one array.

The `form` of a vector is a byte: for codes as in `schemes.fixed_width`, for floats one of `FLOATS`. A vector begins at
a multiple of `ALIGNED` bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..schemes.fixed_width import ODD

FLOATS = {torch.bfloat16: 32, torch.float16: 33, torch.float32: 34}
"""The form of a vector of such elements."""
ALIGNED = 4
_BITS = 15
_AT_ONCE = 2**24  # codes that are packed together


class Packed(NamedTuple):
    """Vectors one after another."""

    data: Tensor
    """[bytes] of uint8"""
    at: Tensor
    """[n] of int64, on the CPU: where each begins"""
    forms: Tensor
    """[n] of uint8, on the CPU"""


def pack(vectors: Sequence[Tensor]) -> Packed:
    """All rows of matrices [k, length] of int8, bf16, f16, f32 or f64, in order, on the device of the first.

    Codes take the fewest bits that hold all of their vector; f64 becomes f32.
    """
    device = vectors[0].device
    vectors = [each.float() if each.dtype == torch.float64 else each for each in vectors]
    kinds: dict[tuple[int, torch.dtype], list[int]] = {}
    for number, each in enumerate(vectors):
        kinds.setdefault((each.shape[1], each.dtype), []).append(number)
    firsts = torch.tensor([0, *(len(each) for each in vectors)]).cumsum(0)
    forms, sizes = torch.zeros(int(firsts[-1]), dtype=torch.uint8), torch.zeros(int(firsts[-1]), dtype=torch.int64)
    joined: list[tuple[Tensor, Tensor]] = []  # rows of one length and dtype, and which these are of all
    for (length, dtype), numbers in kinds.items():
        rows = torch.cat([vectors[number] for number in numbers])
        places = torch.cat([torch.arange(firsts[number], firsts[number + 1]) for number in numbers])
        forms[places] = forms_of(rows).cpu() if dtype == torch.int8 else FLOATS[dtype]
        sizes[places] = sizes_of(forms[places], length)
        joined.append((rows, places))
    at = sizes.cumsum(0) - sizes
    data = torch.zeros(int(sizes.sum()), dtype=torch.uint8, device=device)
    for rows, places in joined:
        for form in forms[places].unique().tolist():
            those = (forms[places] == form).nonzero().squeeze(1)
            step = max(1, _AT_ONCE // max(1, rows.shape[1]))
            for some in those.split(step):
                packed = _packed(rows[some.to(device)], form)
                where = at[places[some]].to(device)
                data[where[:, None] + torch.arange(packed.shape[1], device=device)] = packed
    return Packed(data, at, forms)


def forms_of(codes: Tensor) -> Tensor:
    """The form [k] of each row of codes [k, length] of int8, as `fixed_width.forms_of`."""
    wide = codes.short()
    odd = (wide & 1).bool().all(-1)
    largest = torch.where(odd[:, None], wide.abs(), torch.maximum(wide, ~wide)).amax(-1)
    bits = (largest[:, None] >= 2 ** torch.arange(8, device=codes.device)).sum(-1)
    return torch.where(odd, bits | ODD, bits + 1).to(torch.uint8)


def sizes_of(forms: Tensor, length: int) -> Tensor:
    """How many bytes vectors of ``length`` elements take, up to the next that begins."""
    sizes = ((forms & _BITS).long() * length + 7) >> 3
    for dtype, form in FLOATS.items():
        sizes = torch.where(forms == form, length * dtype.itemsize, sizes)
    return (sizes + ALIGNED - 1) // ALIGNED * ALIGNED


def unpack(data: Tensor, at: int, form: int, length: int) -> Tensor:
    """The elements [length] of one vector, in float32. ``data`` has a byte after it."""
    for dtype, known in FLOATS.items():
        if form == known:
            return data[at : at + length * dtype.itemsize].view(dtype).float()
    bits = form & _BITS
    bit = torch.arange(length, device=data.device) * bits
    low = data[at + (bit >> 3)].int() | data[at + (bit >> 3) + 1].int() << 8
    fields = low >> (bit & 7) & (1 << bits) - 1
    return (2 * fields - (1 << bits) + 1 if form & ODD else fields - (1 << bits - 1)).float()


def _packed(rows: Tensor, form: int) -> Tensor:
    """[k, bytes] of rows [k, length] of one form."""
    if rows.is_floating_point():
        return rows.contiguous().view(torch.uint8)
    bits, length = form & _BITS, rows.shape[1]
    wide = torch.nn.functional.pad(rows.long(), (0, -length % 8), value=1)
    fields = (wide + 2**bits - 1) >> 1 if form & ODD else wide + 2 ** (bits - 1)
    eights = fields.unflatten(1, (-1, 8)) << bits * torch.arange(8, device=rows.device)
    words = eights.sum(-1)  # the fields lie side by side: the top one may set the sign bit
    return words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1)[:, : (bits * length + 7) // 8]
