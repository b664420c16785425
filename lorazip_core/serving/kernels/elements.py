"""Elements of vectors, of codes or of floats, see `vectors`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...schemes.fixed_width import ODD
from ..vectors import FLOATS

_BF16 = tl.constexpr(FLOATS[torch.bfloat16])
_F16 = tl.constexpr(FLOATS[torch.float16])
_ODD = tl.constexpr(ODD)


@triton.jit
def read_values(data, at, form, i, mask, first_form):
    """Elements ``i`` [1, w] of vectors that begin ``at`` [k, 1], in float32 [k, w], 0 where ``mask`` is not.

    Those of an adapter are all codes, or all floats of one dtype, as the ``first_form`` says.
    """
    if first_form < _BF16:
        bits = form & 15
        odd = (form & _ODD) != 0
        times = tl.where(odd, 2, 1)
        less = tl.where(odd, (1 << bits) - 1, 1 << (bits - 1))
        bit = i * bits
        byte = data + at + (bit >> 3)
        low = tl.load(byte, mask=mask, other=0).to(tl.int32)
        high = tl.load(byte + 1, mask=mask, other=0).to(tl.int32)
        field = ((low | (high << 8)) >> (bit & 7)) & ((1 << bits) - 1)
        values = tl.where(mask, field * times - less, 0).to(tl.float32)
    elif first_form == _BF16:
        values = tl.load((data + at).to(tl.pointer_type(tl.bfloat16)) + i, mask=mask, other=0).to(tl.float32)
    elif first_form == _F16:
        values = tl.load((data + at).to(tl.pointer_type(tl.float16)) + i, mask=mask, other=0).to(tl.float32)
    else:
        values = tl.load((data + at).to(tl.pointer_type(tl.float32)) + i, mask=mask, other=0)
    return values


@triton.jit
def read_vector(data, at, form, first, end, COLUMNS: tl.constexpr):
    """Elements ``first``, … of one vector, in float32 [COLUMNS]. Those from ``end`` on are any numbers.

    As `read_values`, in half the instructions: four codes are in two words of 32 bits, wherever they begin.
    """
    if form < _BF16:
        i = first + 4 * tl.arange(0, COLUMNS // 4)
        bits = form & 15
        bit = i * bits
        byte = at + (bit >> 3)
        word = data.to(tl.pointer_type(tl.uint32)) + (byte >> 2)
        low = tl.load(word, mask=i < end, other=0).to(tl.uint64)
        high = tl.load(word + 1, mask=i < end, other=0).to(tl.uint64)
        skipped = ((byte & 3) << 3).to(tl.int32) | (bit & 7)
        window = (((high << 32) | low) >> skipped.to(tl.uint64)).to(tl.int32)
        fields = (window[:, None] >> (bits * tl.arange(0, 4))[None, :]) & ((1 << bits) - 1)
        odd = (form & _ODD) != 0
        times = tl.where(odd, 2.0, 1.0)
        less = tl.where(odd, (1 << bits) - 1, 1 << (bits - 1)).to(tl.float32)
        values = tl.reshape(fields.to(tl.float32) * times - less, [COLUMNS])
    else:
        i_ = first + tl.arange(0, COLUMNS)
        values = read_values(data, at, form, i_, i_ < end, form)
    return values
