"""The operators of `operators` as Triton kernels: two launches each, whatever the adapters of the batch are.

The first one writes what is between the two sides, the products of x with V or v̂, for all slices of a layer and in
parts: some programs share the columns of x. The second one sums the parts, multiplies with U or û and adds to y.
There are no atomics, so results are the same in every run, and nothing is filled beforehand: what was not written is
not read.

The grid is made for the most tiles that so many tokens can have, so that a captured CUDA graph is right for any batch
of its size; programs without a tile end at once. Tokens beyond the batch, with which graphs are padded, are in no tile.
What differs from batch to batch is nothing that kernels are compiled for, but whether it is of few tokens or of many.

A batch of few tokens, as in decoding, is made of tokens that hardly share adapters: each is a tile where adapters share
nothing, and a program has one term at a time. In one of many, tiles are wide and tensor cores multiply with V and v̂.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schemes.fixed_width import ODD
from .cores import TILE as CORES_TILE
from .terms import TILE as TERMS_TILE
from .tiles import FEW, FIELDS, HEAD, WIDE, most_tiles
from .vectors import FLOATS

_BF16 = tl.constexpr(FLOATS[torch.bfloat16])
_F16 = tl.constexpr(FLOATS[torch.float16])
_ODD = tl.constexpr(ODD)
_HEAD = tl.constexpr(HEAD)
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _tile(batch, KIND: tl.constexpr):
    """Of the tile of this program: where its tokens are, and their adapters; how many these are, and their group."""
    head = batch + _HEAD * KIND
    own = batch + tl.load(head + 1) + _FIELDS * tl.program_id(0)
    first = tl.load(own)
    return batch + tl.load(head + 2) + first, batch + tl.load(head + 3) + first, tl.load(own + 1), tl.load(own + 2)


@triton.jit
def _values(data, at, form, i, mask, first_form):
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
def _vector(data, at, form, first, end, COLUMNS: tl.constexpr):
    """Elements ``first``, … of one vector, in float32 [COLUMNS]. Those from ``end`` on are any numbers.

    As `_values`, in half the instructions: four codes are in two words of 32 bits, wherever they begin.
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
        values = _values(data, at, form, i_, i_ < end, form)
    return values


@triton.jit
def _count_terms(index, row, rows, SLICES: tl.constexpr):
    """How many terms an adapter has in all slices of a layer, and one of them."""
    count, one = 0, 0
    for slice_ in tl.static_range(SLICES):
        own = index + (slice_ * rows + row) * 2
        more = tl.load(own + 1)
        one = tl.where(more > 0, tl.load(own), one)
        count += more
    return count, one


@triton.jit
def _find_terms(index, row, rows, number, apart, SLICES: tl.constexpr):
    """The terms of an adapter with these numbers, counted over all slices of a layer: which ones of the table they are,
    and their places where those of a slice are side by side and those of the next slice are ``apart``."""
    term, place = 0, 0
    before = 0
    for slice_ in tl.static_range(SLICES):
        own = index + (slice_ * rows + row) * 2
        within = number - before
        more = tl.load(own + 1)
        here = (within >= 0) & (within < more)
        term = tl.where(here, tl.load(own) + within, term)
        place = tl.where(here, slice_ * apart + within, place)
        before += more
    return term, place


@triton.jit(do_not_specialize=["apart"])
def _shrink_terms(
    inner, x, batch, index, at, forms, scale, data,
    apart, d_in, x_stride, rows, most, in_start,
    KIND: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, SLICES: tl.constexpr, TERMS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inner [SPLITS, SLICES, tokens, most]: scale · v̂ᵀx, each over a part of the columns.

    Programs share a tile by columns, and by terms: a group of them has every so many.
    """
    split, first, step = tl.program_id(1), tl.program_id(2) * TERMS, tl.num_programs(2) * TERMS
    if tl.program_id(0) >= tl.load(batch + _HEAD * KIND):
        return
    order, _, count, row = _tile(batch, KIND)
    terms, one = _count_terms(index, row, rows, SLICES)
    part = tl.cdiv(tl.cdiv(d_in, SPLITS), 16) * 16
    start = split * part
    end = tl.minimum(start + part, d_in)
    to = inner + split.to(tl.int64) * SLICES * apart
    if TILE == 1:
        only = tl.load(order).to(tl.int64)
        for number in range(first, terms, step):
            term, place = _find_terms(index, row, rows, number, apart, SLICES)
            v_at = tl.load(at + 2 * term + 1)
            form = tl.load(forms + 2 * term + 1).to(tl.int32)
            total = tl.zeros([COLUMNS], tl.float32)
            for column in range(start, end, COLUMNS):
                i = column + tl.arange(0, COLUMNS)
                given = tl.load(x + only * x_stride + i, mask=i < end, other=0).to(tl.float32)
                total += _vector(data, v_at, form, in_start + column, in_start + end, COLUMNS) * given
            tl.store(to + only * most + place, tl.sum(total, 0) * tl.load(scale + term))
    else:
        first_form = tl.load(forms + 2 * one + 1, mask=terms > 0, other=0).to(tl.int32)
        used = tl.arange(0, TILE) < count
        several = tl.load(order + tl.arange(0, TILE), mask=used, other=0).to(tl.int64)
        for done in range(first, terms, step):
            numbers = done + tl.arange(0, TERMS)
            known = numbers < terms
            terms_, places = _find_terms(index, row, rows, numbers, apart, SLICES)
            v_ats = tl.load(at + 2 * terms_ + 1, mask=known, other=0)
            forms_ = tl.load(forms + 2 * terms_ + 1, mask=known, other=1).to(tl.int32)
            totals = tl.zeros([TILE, TERMS], tl.float32)
            for column in range(start, end, COLUMNS):
                j = column + tl.arange(0, COLUMNS)
                within = j < end
                several_x = x + several[:, None] * x_stride + j[None, :]
                givens = tl.load(several_x, mask=used[:, None] & within[None, :], other=0).to(tl.float32)
                wanted = known[:, None] & within[None, :]
                vectors = _values(data, v_ats[:, None], forms_[:, None], in_start + j[None, :], wanted, first_form)
                totals = tl.dot(givens, tl.trans(vectors), totals, input_precision=PRECISION)
            scales = tl.load(scale + terms_, mask=known, other=0)
            to_several = to + several[:, None] * most + places[None, :]
            tl.store(to_several, totals * scales[None, :], mask=used[:, None] & known[None, :])


@triton.jit(do_not_specialize=["tokens", "apart"])
def _expand_terms(
    y, inner, batch, index, at, forms, data, blocks,
    tokens, apart, y_stride, rows, most,
    KIND: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y += û (sum of the parts of inner), for one tile and one block of columns of y."""
    block = blocks + 4 * tl.program_id(1)
    if tl.program_id(0) >= tl.load(batch + _HEAD * KIND):
        return
    order, _, count, row = _tile(batch, KIND)
    slice_, row_of_u, column, width = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    begin = tl.load(index + (slice_ * rows + row) * 2)
    terms = tl.load(index + (slice_ * rows + row) * 2 + 1)
    if terms == 0:
        return
    parts = inner + (slice_ * tokens).to(tl.int64) * most
    i = tl.arange(0, COLUMNS)
    inside = i < tl.multiple_of(width, ALIGNED)
    beside = y + tl.multiple_of(column, ALIGNED) + i
    if TILE == 1:
        only = tl.load(order).to(tl.int64)
        target = beside + only * y_stride
        total = tl.load(target, mask=inside, other=0).to(tl.float32)
        split = tl.arange(0, SPLITS).to(tl.int64)
        for number in range(terms):
            u_at = tl.load(at + 2 * (begin + number))
            form = tl.load(forms + 2 * (begin + number)).to(tl.int32)
            amount = tl.sum(tl.load(parts + split * apart + only * most + number), 0)
            total += amount * _vector(data, u_at, form, row_of_u, row_of_u + width, COLUMNS)
        tl.store(target, total, mask=inside)
    else:
        used = tl.arange(0, TILE) < count
        several = tl.load(order + tl.arange(0, TILE), mask=used, other=0).to(tl.int64)
        targets = beside[None, :] + several[:, None] * y_stride
        written = used[:, None] & inside[None, :]
        totals = tl.load(targets, mask=written, other=0).to(tl.float32)
        for one in range(terms):
            u_at_ = tl.load(at + 2 * (begin + one))
            form_ = tl.load(forms + 2 * (begin + one)).to(tl.int32)
            amounts = tl.zeros([TILE], tl.float32)
            for each in tl.static_range(SPLITS):
                amounts += tl.load(parts + each * apart + several * most + one, mask=used, other=0)
            vector = _vector(data, u_at_, form_, row_of_u, row_of_u + width, COLUMNS)
            totals += amounts[:, None] * vector[None, :]
        tl.store(targets, totals, mask=written)


@triton.jit(do_not_specialize=["tokens"])
def _shrink_bases(
    inner, x, batch, v, core,
    tokens, d_in, x_stride, slices, places,
    KIND: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inner [SPLITS, slices, tokens, RANK]: Σ Vᵀx, each over a part of the columns."""
    slice_, split = tl.program_id(1), tl.program_id(2)
    if tl.program_id(0) >= tl.load(batch + _HEAD * KIND):
        return
    order, adapters, count, cluster = _tile(batch, KIND)
    place = tl.arange(0, TILE)
    used = place < count
    token = tl.load(order + place, mask=used, other=0).to(tl.int64)
    adapter = tl.load(adapters + place, mask=used, other=0).to(tl.int64)
    part = tl.cdiv(tl.cdiv(d_in, SPLITS), COLUMNS) * COLUMNS
    start = split * part
    end = tl.minimum(start + part, d_in)
    r = tl.arange(0, RANK)
    basis = v + (cluster * slices + slice_).to(tl.int64) * RANK * d_in
    total = tl.zeros([TILE, RANK], tl.float32)
    for column in range(start, end, COLUMNS):
        i = column + tl.arange(0, COLUMNS)
        inside = i < end
        given = tl.load(x + token[:, None] * x_stride + i[None, :], mask=used[:, None] & inside[None, :], other=0)
        side = tl.load(basis + r[None, :] * d_in + i[:, None], mask=inside[:, None], other=0)
        total = tl.dot(given.to(side.dtype), side, total, input_precision=PRECISION)
    own_core = core + slice_.to(tl.int64) * places * (RANK if DIAGONAL else RANK * RANK)
    if DIAGONAL:
        entries = own_core + adapter[:, None] * RANK + r[None, :]
        product = total * tl.load(entries, mask=used[:, None], other=0).to(tl.float32)
    else:
        product = tl.zeros([TILE, RANK], tl.float32)
        for k in tl.range(RANK, loop_unroll_factor=16):
            amount = tl.sum(tl.where(r[None, :] == k, total, 0.0), 1)
            row = own_core + (adapter[:, None] * RANK + k) * RANK + r[None, :]
            product += amount[:, None] * tl.load(row, mask=used[:, None], other=0).to(tl.float32)
    to = inner + (((split * slices + slice_) * tokens).to(tl.int64) + token[:, None]) * RANK + r[None, :]
    tl.store(to, product, mask=used[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _expand_bases(
    y, inner, batch, u, blocks,
    tokens, slices, y_stride, wide,
    KIND: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y += U (sum of the parts of inner), for one tile and one block of columns of y."""
    block = blocks + 4 * tl.program_id(1)
    if tl.program_id(0) >= tl.load(batch + _HEAD * KIND):
        return
    order, _, count, cluster = _tile(batch, KIND)
    slice_, row_of_u, column, width = tl.load(block), tl.load(block + 1), tl.load(block + 2), tl.load(block + 3)
    place = tl.arange(0, TILE)
    used = place < count
    token = tl.load(order + place, mask=used, other=0).to(tl.int64)
    r = tl.arange(0, RANK)
    total = tl.zeros([TILE, RANK], tl.float32)
    for split in tl.static_range(SPLITS):
        part = inner + (((split * slices + slice_) * tokens).to(tl.int64) + token[:, None]) * RANK + r[None, :]
        total += tl.load(part, mask=used[:, None], other=0)
    i = tl.arange(0, COLUMNS)
    inside = i < tl.multiple_of(width, ALIGNED)
    row = cluster.to(tl.int64) * wide + row_of_u + i
    basis = tl.load(u + row[None, :] * RANK + r[:, None], mask=inside[None, :], other=0).to(tl.float32)
    target = y + token[:, None] * y_stride + tl.multiple_of(column, ALIGNED) + i[None, :]
    written = used[:, None] & inside[None, :]
    before = tl.load(target, mask=written, other=0).to(tl.float32)
    tl.store(target, tl.dot(total, basis, before, input_precision=PRECISION), mask=written)


class Shrink(NamedTuple):
    """How a first kernel cuts its work."""

    splits: int
    """Programs that share the columns of x."""
    columns: int
    """Columns of x at once."""
    warps: int
    terms: int = 1
    """Terms at once."""
    groups: int = 1
    """Programs that share the terms."""


class Expand(NamedTuple):
    """How a second kernel cuts its work."""

    columns: int
    """Columns of y of a program."""
    warps: int


class Cuts(NamedTuple):
    """How both kernels cut their work, which changes no result but by the order of sums; see docs/benchmarks.md.

    Of few tokens there is one term at once.
    """

    shrink: Shrink
    expand: Expand


TERMS_OF_FEW = Cuts(Shrink(8, 512, 1, groups=8), Expand(512, 1))
TERMS_OF_MANY = Cuts(Shrink(4, 128, 4, terms=16), Expand(64, 2))
BASES_OF_FEW = Cuts(Shrink(16, 128, 1), Expand(128, 2))
BASES_OF_MANY = Cuts(Shrink(2, 64, 4), Expand(128, 4))
_LARGEST_BLOCK = 2**13  # elements of U that a program has in shared memory
_LEAST_COLUMNS = 16  # that tensor cores multiply at once


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
    tiles = most_tiles(tokens, groups, TERMS_TILE)
    if not tiles:
        return
    few = tokens <= FEW
    shrink, expand = TERMS_OF_FEW if few else TERMS_OF_MANY
    blocks = _blocks(tuple(columns), tuple(widths), tuple(out_starts), expand.columns, y.device)
    inner = torch.empty(shrink.splits, slices, tokens, most, dtype=torch.float32, device=y.device)
    both = {"KIND": kind, "TILE": TERMS_TILE if few else WIDE, "SPLITS": shrink.splits}
    _shrink_terms[tiles, shrink.splits, shrink.groups](
        inner, x, batch, index, at, forms, scale, data,
        tokens * most, x.shape[1], x.stride(0), index.shape[1], most, in_start,
        SLICES=slices, TERMS=shrink.terms, COLUMNS=shrink.columns, PRECISION=_precision(y),
        num_warps=shrink.warps, **both,
    )  # fmt: skip
    _expand_terms[tiles, len(blocks)](
        y, inner, batch, index, at, forms, data, blocks,
        tokens, slices * tokens * most, y.stride(0), index.shape[1], most,
        COLUMNS=expand.columns, ALIGNED=_aligned(y, columns, widths, expand.columns),
        num_warps=expand.warps, **both,
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
    tiles = most_tiles(tokens, groups, CORES_TILE)
    if not tiles:
        return
    few = tokens <= FEW
    shrink, expand = BASES_OF_FEW if few else BASES_OF_MANY
    starts = [sum(widths[:number]) for number in range(slices)]
    size = min(expand.columns, max(_LEAST_COLUMNS, _LARGEST_BLOCK // rank))
    blocks = _blocks(tuple(columns), tuple(widths), tuple(starts), size, y.device)
    inner = torch.empty(shrink.splits, slices, tokens, rank, dtype=torch.float32, device=y.device)
    both = {
        "KIND": kind, "TILE": CORES_TILE if few else WIDE, "SPLITS": shrink.splits, "RANK": rank,
        "PRECISION": _precision(y),
    }  # fmt: skip
    _shrink_bases[tiles, slices, shrink.splits](
        inner, x, batch, v, core,
        tokens, x.shape[1], x.stride(0), slices, core.shape[1],
        COLUMNS=shrink.columns, DIAGONAL=core.ndim == 3, num_warps=shrink.warps, **both,
    )  # fmt: skip
    _expand_bases[tiles, len(blocks)](
        y, inner, batch, u, blocks,
        tokens, slices, y.stride(0), u.shape[1],
        COLUMNS=size, ALIGNED=_aligned(y, columns, widths, size), num_warps=expand.warps, **both,
    )  # fmt: skip


def _precision(y: Tensor) -> str:
    """Of products of float32: all of it where the engine is in float32, else that of 11 bits, which bf16 has not."""
    return "ieee" if y.dtype == torch.float32 else "tf32"


def _aligned(y: Tensor, columns: list[int], widths: list[int], size: int) -> int:
    """What divides the first column and the width of every block, and a row: then several elements are read at once."""
    return gcd(16, y.stride(0), size, *columns, *widths)


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
