"""Vectors of int8 codes, each at the fewest bits that hold all of its codes, so that any code is found from its index.

Code i of a vector is field i of ``bits`` bits, from the lowest bit of its first byte upwards. A field q stands for
q − 2^(bits−1); in a vector whose codes are all odd it stands for 2q − (2^bits − 1), so that 2, 4, 8, … levels about 0
take 1, 2, 3, … bits. The `form` of a vector says which, as one byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

ODD = 16
"""In a form, beside its bits: all codes are odd."""
_BITS = 15
_AT_ONCE = 2**9
"""Vectors that are packed together: more leave the processor's cache; after fewer, threads wait for the interpreter."""
_LENGTHS = np.array([number.bit_length() for number in range(128)], np.uint8)

Numbers = TypeVar("Numbers", int, "Tensor", NDArray[np.int64])


def forms_of(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The form [k] of each of k vectors of ``codes`` [k, length]: its bits, 1 to 8, and `ODD`."""
    # With ~c for a negative c, all codes of a vector together have the bits of the largest.
    largest = _LENGTHS[np.bitwise_or.reduce(codes ^ (codes >> 7), axis=-1)]
    odd = (np.bitwise_and.reduce(codes, axis=-1) & 1).astype(bool)
    return np.where(odd, np.maximum(largest, 1) | ODD, largest + 1).astype(np.uint8)


def packed_bytes(form: Numbers, length: int) -> Numbers:
    """How many bytes a vector of ``length`` codes takes."""
    return ((form & _BITS) * length + 7) >> 3


def pack(codes: NDArray[np.int8], form: int) -> NDArray[np.uint8]:
    """Vectors [k, length] of one form as bytes [k, `packed_bytes`]."""
    bits, (count, length) = form & _BITS, codes.shape
    fields = codes.view(np.uint8) + np.uint8(2**bits - 1 if form & ODD else 2 ** (bits - 1))  # modulo 256
    words = np.zeros((count, -(-length // 8) * 8), np.uint8)
    words[:, :length] = fields >> 1 if form & ODD else fields
    # In every word of two, four and then eight bytes the upper half moves down to the fields of the lower one, until
    # eight fields fill as many bytes as they have bits.
    for half in (8, 16, 32):
        words = words.view(f"<u{half // 4}")
        lower = words & (2**half - 1)
        words = lower | (words ^ lower) >> (half - half // 8 * bits)
    eights = words.view(np.uint8).reshape(count, -1, 8)[..., :bits]
    return eights.reshape(count, -1)[:, : packed_bytes(form, length)]


def pack_all(
    codes: NDArray[np.int8], forms: NDArray[np.uint8]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """`pack` of vectors [k, length] of any ``forms`` [k]: which of them, and these as bytes; some at a time."""
    for form in np.unique(forms).tolist():
        members = np.flatnonzero(forms == form)
        for some in np.split(members, range(_AT_ONCE, len(members), _AT_ONCE)):
            yield some, pack(codes[some], form)


def unpack(data: Tensor, at: Tensor, forms: Tensor, length: int) -> Tensor:
    """The k vectors [k, length] of int8 that begin ``at`` [k] bytes of ``data``, on its device.

    A field is read from two bytes, so one more than the last vector has must be there.
    """
    import torch

    bits = (forms & _BITS).int()[:, None]
    first = torch.arange(length, dtype=torch.int32, device=data.device) * bits  # [k, length]: the lowest of every field
    byte = (at.int()[:, None] + (first >> 3)).flatten()
    low, high = data.index_select(0, byte), data.index_select(0, byte + 1)  # on a CPU three times as fast as data[byte]
    window = (low.int() | high.int() << 8).view_as(first)
    fields = window >> (first & 7) & (1 << bits) - 1
    odd = (forms & ODD).bool()[:, None].int()
    return ((fields << odd) - (1 << bits + odd - 1) + odd).to(torch.int8)
