"""What a program of a kernel works on, see `tiles`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import FIELDS, HEAD

_HEAD = tl.constexpr(HEAD)
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def has_tile(batch, KIND: tl.constexpr):
    """Whether there is one for this program: grids are made for the most that so many tokens can have."""
    return tl.program_id(0) < tl.load(batch + _HEAD * KIND)


@triton.jit
def own_tile(batch, KIND: tl.constexpr):
    """Of the tile of this program: where its tokens are, and their adapters; how many these are, and their group."""
    head = batch + _HEAD * KIND
    own = batch + tl.load(head + 1) + _FIELDS * tl.program_id(0)
    first = tl.load(own)
    return batch + tl.load(head + 2) + first, batch + tl.load(head + 3) + first, tl.load(own + 1), tl.load(own + 2)
