"""The operators of `operators` as Triton kernels: two launches each, whatever the adapters of the batch are.

The first one reads x once for all slices of a layer and writes what is between the two sides, the products with V or v̂, in
parts: `SPLITS` programs share the columns of x. The second one sums the parts, multiplies with U or û and adds to y. There are
no atomics, so results are the same in every run, and nothing is filled beforehand: what no adapter wrote, nobody reads.

The grid is made for the most tiles that so many tokens can have, so that a captured CUDA graph is right for any batch of its
size; programs without a tile end at once. Tokens beyond the batch, with which graphs are padded, are in no tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemes.fixed_width import ODD
from .tiles import FIELDS, HEAD, TILE, most_tiles
from .vectors import FLOATS

SPLITS = 4
_ODD = tl.constexpr(ODD)
_BF16 = tl.constexpr(FLOATS[torch.bfloat16])
_F16 = tl.constexpr(FLOATS[torch.float16])
_F32 = tl.constexpr(FLOATS[torch.float32])
_HEAD = tl.constexpr(HEAD)
_FIELDS = tl.constexpr(FIELDS)
_TILE = tl.constexpr(TILE)

_WIDE = 1024
"""Columns of one token that a program works on at once, and of y."""
_NARROW = 64
"""The same for a tile of several tokens."""
_WARPS = 4
_OUT = 128
"""Columns of y that a program adds to with shared bases."""


@triton.jit
def _elements(data, at, form, i, mask):
    """Elements ``i`` of a vector, in float32, 0 where ``mask`` is not."""
    if form < _BF16:
        bits = form & 15
        bit = i * bits
        low = tl.load(data + at + (bit >> 3), mask=mask, other=0).to(tl.int32)
        high = tl.load(data + at + (bit >> 3) + 1, mask=mask, other=0).to(tl.int32)
        field = ((low | (high << 8)) >> (bit & 7)) & ((1 << bits) - 1)
        code = tl.where((form & _ODD) != 0, 2 * field - ((1 << bits) - 1), field - (1 << (bits - 1)))
        values = tl.where(mask, code, 0).to(tl.float32)
    elif form == _BF16:
        values = tl.load((data + at).to(tl.pointer_type(tl.bfloat16)) + i, mask=mask, other=0).to(tl.float32)
    elif form == _F16:
        values = tl.load((data + at).to(tl.pointer_type(tl.float16)) + i, mask=mask, other=0).to(tl.float32)
    else:
        values = tl.load((data + at).to(tl.pointer_type(tl.float32)) + i, mask=mask, other=0)
    return values


@triton.jit
def _shrink_terms(
    inner, x, batch, index, at, forms, scale, data,
    tokens, d_in, x_stride, rows, most, in_start,
    KIND: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """inner [SPLITS, slices, tokens, most]: scale · v̂ᵀx, each over a part of the columns."""
    tile, slice_, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = batch + _HEAD * KIND
    if tile >= tl.load(head):
        return
    own = batch + tl.load(head + 1) + _FIELDS * tile
    first, count, row = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    order = batch + tl.load(head + 2) + first
    begin = tl.load(index + (slice_ * rows + row) * 2)
    terms = tl.load(index + (slice_ * rows + row) * 2 + 1)
    part = (tl.cdiv(d_in, SPLITS) + 7) // 8 * 8
    start = split * part
    end = tl.minimum(start + part, d_in)
    to = inner + ((split * tl.num_programs(1) + slice_) * tokens).to(tl.int64) * most
    if count == 1:
        only = tl.load(order).to(tl.int64)
        i = tl.arange(0, WIDE)
        for term in range(terms):
            which = begin + term
            v_at, form = tl.load(at + 2 * which + 1), tl.load(forms + 2 * which + 1).to(tl.int32)
            total = tl.zeros([WIDE], tl.float32)
            for column in range(start, end, WIDE):
                inside = column + i < end
                values = _elements(data, v_at, form, in_start + column + i, inside)
                total += values * tl.load(x + only * x_stride + column + i, mask=inside, other=0).to(tl.float32)
            tl.store(to + only * most + term, tl.sum(total, 0) * tl.load(scale + which))
    else:
        place = tl.arange(0, _TILE)
        there = place < count
        several = tl.load(order + place, mask=there, other=0).to(tl.int64)
        j = tl.arange(0, NARROW)
        for term in range(terms):
            which = begin + term
            v_at, form = tl.load(at + 2 * which + 1), tl.load(forms + 2 * which + 1).to(tl.int32)
            totals = tl.zeros([_TILE, NARROW], tl.float32)
            for column in range(start, end, NARROW):
                within = column + j < end
                parts = _elements(data, v_at, form, in_start + column + j, within)
                entries = x + several[:, None] * x_stride + column + j[None, :]
                given = tl.load(entries, mask=there[:, None] & within[None, :], other=0).to(tl.float32)
                totals += parts[None, :] * given
            tl.store(to + several * most + term, tl.sum(totals, 1) * tl.load(scale + which), mask=there)


@triton.jit
def _expand_terms(
    y, inner, batch, index, at, forms, data, blocks,
    tokens, slices, y_stride, rows, most,
    KIND: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """y += û (sum of the parts of inner), for one tile and one block of columns of y."""
    tile, block = tl.program_id(0), tl.program_id(1)
    head = batch + _HEAD * KIND
    if tile >= tl.load(head):
        return
    own = batch + tl.load(head + 1) + _FIELDS * tile
    first, count, row = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    order = batch + tl.load(head + 2) + first
    slice_, row_within = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    column, width = tl.load(blocks + 4 * block + 2), tl.load(blocks + 4 * block + 3)
    begin = tl.load(index + (slice_ * rows + row) * 2)
    terms = tl.load(index + (slice_ * rows + row) * 2 + 1)
    if terms == 0:
        return
    parts = inner + (slice_ * tokens).to(tl.int64) * most
    apart = (slices * tokens).to(tl.int64) * most
    if count == 1:
        only = tl.load(order).to(tl.int64)
        i = tl.arange(0, WIDE)
        inside = i < width
        target = y + only * y_stride + column + i
        total = tl.load(target, mask=inside, other=0).to(tl.float32)
        for term in range(terms):
            which = begin + term
            amount = 0.0
            for split in tl.static_range(SPLITS):
                amount += tl.load(parts + split * apart + only * most + term)
            form = tl.load(forms + 2 * which).to(tl.int32)
            total += amount * _elements(data, tl.load(at + 2 * which), form, row_within + i, inside)
        tl.store(target, total, mask=inside)
    else:
        place = tl.arange(0, _TILE)
        there = place < count
        several = tl.load(order + place, mask=there, other=0).to(tl.int64)
        for left in range(0, width, NARROW):
            j = left + tl.arange(0, NARROW)
            within = j < width
            targets = y + several[:, None] * y_stride + column + j[None, :]
            both = there[:, None] & within[None, :]
            totals = tl.load(targets, mask=both, other=0).to(tl.float32)
            for term in range(terms):
                which = begin + term
                amounts = tl.zeros([_TILE], tl.float32)
                for split in tl.static_range(SPLITS):
                    amounts += tl.load(parts + split * apart + several * most + term, mask=there, other=0)
                form = tl.load(forms + 2 * which).to(tl.int32)
                values = _elements(data, tl.load(at + 2 * which), form, row_within + j, within)
                totals += amounts[:, None] * values[None, :]
            tl.store(targets, totals, mask=both)


@triton.jit
def _shrink_bases(
    inner, x, batch, v, core,
    tokens, d_in, x_stride, slices, places,
    KIND: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, NARROW: tl.constexpr, DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """inner [SPLITS, slices, tokens, RANK]: Σ Vᵀx, each over a part of the columns."""
    tile, slice_, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = batch + _HEAD * KIND
    if tile >= tl.load(head):
        return
    own = batch + tl.load(head + 1) + _FIELDS * tile
    first, count, cluster = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    place = tl.arange(0, _TILE)
    there = place < count
    token = tl.load(batch + tl.load(head + 2) + first + place, mask=there, other=0).to(tl.int64)
    adapter = tl.load(batch + tl.load(head + 3) + first + place, mask=there, other=0).to(tl.int64)
    part = tl.cdiv(tl.cdiv(d_in, SPLITS), NARROW) * NARROW
    start = split * part
    end = tl.minimum(start + part, d_in)
    column_of = tl.arange(0, RANK)
    basis = v + (cluster * slices + slice_).to(tl.int64) * RANK * d_in
    total = tl.zeros([_TILE, RANK], tl.float32)
    for column in range(start, end, NARROW):
        i = column + tl.arange(0, NARROW)
        inside = i < end
        given = tl.load(x + token[:, None] * x_stride + i[None, :], mask=there[:, None] & inside[None, :], other=0)
        side = tl.load(basis + column_of[None, :] * d_in + i[:, None], mask=inside[:, None], other=0)
        total = tl.dot(given.to(side.dtype), side, total, input_precision=PRECISION)
    own_core = core + slice_.to(tl.int64) * places * (RANK if DIAGONAL else RANK * RANK)
    if DIAGONAL:
        entries = own_core + adapter[:, None] * RANK + column_of[None, :]
        product = total * tl.load(entries, mask=there[:, None], other=0).to(tl.float32)
    else:
        product = tl.zeros([_TILE, RANK], tl.float32)
        for r in range(RANK):
            amounts = tl.sum(tl.where(column_of[None, :] == r, total, 0.0), 1)
            entries = own_core + (adapter[:, None] * RANK + r) * RANK + column_of[None, :]
            product += amounts[:, None] * tl.load(entries, mask=there[:, None], other=0).to(tl.float32)
    to = inner + (((split * slices + slice_) * tokens).to(tl.int64) + token[:, None]) * RANK + column_of[None, :]
    tl.store(to, product, mask=there[:, None])


@triton.jit
def _expand_bases(
    y, inner, batch, u, blocks,
    tokens, slices, y_stride, wide,
    KIND: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y += U (sum of the parts of inner), for one tile and one block of columns of y."""
    tile, block = tl.program_id(0), tl.program_id(1)
    head = batch + _HEAD * KIND
    if tile >= tl.load(head):
        return
    own = batch + tl.load(head + 1) + _FIELDS * tile
    first, count, cluster = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    slice_, row_within = tl.load(blocks + 4 * block), tl.load(blocks + 4 * block + 1)
    column, width = tl.load(blocks + 4 * block + 2), tl.load(blocks + 4 * block + 3)
    place = tl.arange(0, _TILE)
    there = place < count
    token = tl.load(batch + tl.load(head + 2) + first + place, mask=there, other=0).to(tl.int64)
    column_of = tl.arange(0, RANK)
    total = tl.zeros([_TILE, RANK], tl.float32)
    for split in tl.static_range(SPLITS):
        part = inner + (((split * slices + slice_) * tokens).to(tl.int64) + token[:, None]) * RANK + column_of[None, :]
        total += tl.load(part, mask=there[:, None], other=0)
    i = tl.arange(0, OUT)
    inside = i < width
    row = cluster.to(tl.int64) * wide + row_within + i
    basis = tl.load(u + row[None, :] * RANK + column_of[:, None], mask=inside[None, :], other=0)
    added = tl.dot(total.to(basis.dtype), basis, input_precision=PRECISION)
    target = y + token[:, None] * y_stride + column + i[None, :]
    both = there[:, None] & inside[None, :]
    tl.store(target, tl.load(target, mask=both, other=0).to(tl.float32) + added, mask=both)


def add_terms(
    y: Tensor,
    x: Tensor,
    batch: Tensor,
    index: Tensor,
    at: Tensor,
    forms: Tensor,
    scale: Tensor,
    data: Tensor,
    kind: int,
    groups: int,
    most: int,
    columns: list[int],
    widths: list[int],
    out_starts: list[int],
    in_start: int,
) -> None:
    """As the operator."""
    tokens, slices = len(x), len(columns)
    tiles = most_tiles(tokens, groups)
    if not tiles:
        return
    blocks = _blocks(tuple(columns), tuple(widths), tuple(out_starts), _WIDE, y.device)
    inner = torch.empty(SPLITS, slices, tokens, most, dtype=torch.float32, device=y.device)
    _shrink_terms[tiles, slices, SPLITS](
        inner, x, batch, index, at, forms, scale, data,
        tokens, x.shape[1], x.stride(0), index.shape[1], most, in_start,
        KIND=kind, SPLITS=SPLITS, WIDE=_WIDE, NARROW=_NARROW, num_warps=_WARPS,
    )  # fmt: skip
    _expand_terms[tiles, len(blocks)](
        y, inner, batch, index, at, forms, data, blocks,
        tokens, slices, y.stride(0), index.shape[1], most,
        KIND=kind, SPLITS=SPLITS, WIDE=_WIDE, NARROW=_NARROW, num_warps=_WARPS,
    )  # fmt: skip


def add_cores(
    y: Tensor,
    x: Tensor,
    batch: Tensor,
    u: Tensor,
    v: Tensor,
    core: Tensor,
    kind: int,
    groups: int,
    columns: list[int],
    widths: list[int],
) -> None:
    """As the operator."""
    tokens, slices, rank = len(x), len(columns), u.shape[-1]
    tiles = most_tiles(tokens, groups)
    if not tiles:
        return
    starts = [sum(widths[:number]) for number in range(slices)]
    blocks = _blocks(tuple(columns), tuple(widths), tuple(starts), _OUT, y.device)
    inner = torch.empty(SPLITS, slices, tokens, rank, dtype=torch.float32, device=y.device)
    precision = "ieee" if u.dtype == torch.float32 else "tf32"  # which is about float32 only
    _shrink_bases[tiles, slices, SPLITS](
        inner, x, batch, v, core,
        tokens, x.shape[1], x.stride(0), slices, core.shape[1],
        KIND=kind, SPLITS=SPLITS, RANK=rank, NARROW=_NARROW, DIAGONAL=core.ndim == 3, PRECISION=precision,
    )  # fmt: skip
    _expand_bases[tiles, len(blocks)](
        y, inner, batch, u, blocks,
        tokens, slices, y.stride(0), u.shape[1],
        KIND=kind, SPLITS=SPLITS, RANK=rank, OUT=_OUT, PRECISION=precision,
    )  # fmt: skip


_Key = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, torch.device]
_known: dict[_Key, Tensor] = {}


def _blocks(
    columns: tuple[int, ...], widths: tuple[int, ...], starts: tuple[int, ...], size: int, device: torch.device
) -> Tensor:
    """[n, 4]: of every block of columns of y, its slice, its first row of û or U, its first column and its width."""
    key = columns, widths, starts, size, device
    if key not in _known:
        found = [
            (slice_, start + left, column + left, min(size, width - left))
            for slice_, (column, width, start) in enumerate(zip(columns, widths, starts, strict=True))
            for left in range(0, width, size)
        ]
        _known[key] = torch.tensor(found, dtype=torch.int32, device=device)
    return _known[key]
