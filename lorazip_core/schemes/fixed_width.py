"""Vectors of int8 codes, each at the fewest bits that hold all of its codes, so that any code is found from its index.

Code i of a vector is field i of ``bits`` bits, from the lowest bit of its first byte upwards. A field q stands for
q − 2^(bits−1); in a vector whose codes are all odd it stands for 2q − (2^bits − 1), so that 2, 4, 8, … levels about 0
take 1, 2, 3, … bits. The `form` of a vector says which, as one byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

ODD = 16
"""In a form, beside its bits: all codes are odd."""
_BITS = 15
_LENGTHS = np.array([number.bit_length() for number in range(128)], np.uint8)

Numbers = TypeVar("Numbers", int, "Tensor", NDArray[np.int64])


def forms_of(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The form [k] of each of k vectors of ``codes`` [k, length]: its bits, 1 to 8, and `ODD`."""
    odd = (codes & 1).all(-1)
    largest = np.where(odd, np.abs(codes).max(-1, initial=0), np.maximum(codes, ~codes).max(-1, initial=0))
    return np.where(odd, _LENGTHS[largest] | ODD, _LENGTHS[largest] + 1).astype(np.uint8)


def packed_bytes(form: Numbers, length: int) -> Numbers:
    """How many bytes a vector of ``length`` codes takes."""
    return ((form & _BITS) * length + 7) >> 3


def pack(codes: NDArray[np.int8], form: int) -> NDArray[np.uint8]:
    """One vector as bytes."""
    bits = form & _BITS
    wide = codes.astype(np.int16)
    fields = (wide + 2**bits - 1) >> 1 if form & ODD else wide + 2 ** (bits - 1)
    return np.packbits(fields[:, None] >> np.arange(bits) & 1, bitorder="little")


def unpack(data: Tensor, at: Tensor, forms: Tensor, length: int) -> Tensor:
    """The k vectors [k, length] of int8 that begin ``at`` [k] bytes of ``data``, on its device.

    A field is read from two bytes, so one more than the last vector has must be there.
    """
    import torch

    bits = (forms & _BITS).long()[:, None]
    first = torch.arange(length, device=data.device) * bits  # [k, length]: the lowest bit of every field
    byte = at.long()[:, None] + (first >> 3)
    window = data[byte].long() | data[byte + 1].long() << 8
    fields = window >> (first & 7) & (1 << bits) - 1
    odd = (forms & ODD).bool()[:, None]
    return torch.where(odd, 2 * fields - (1 << bits) + 1, fields - (1 << bits - 1)).to(torch.int8)
