"""Adapters that share nothing: each module is a sum of outer products, see `serving.terms`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..terms import TILE
from ..tiles import FEW, WIDE, most_tiles
from .cuts import Cuts, Expand, Shrink
from .elements import read_values, read_vector
from .launch import aligned, blocks_of, precision
from .tile import has_tile, own_tile

OF_FEW = Cuts(Shrink(8, 512, 1, groups=8), Expand(512, 1))
OF_MANY = Cuts(Shrink(4, 128, 4, terms=16), Expand(64, 2))


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
    tiles = most_tiles(tokens, groups, TILE)
    if not tiles:
        return
    few = tokens <= FEW
    shrink, expand = OF_FEW if few else OF_MANY
    blocks = blocks_of(tuple(columns), tuple(widths), tuple(out_starts), expand.columns, y.device)
    inner = torch.empty(shrink.splits, slices, tokens, most, dtype=torch.float32, device=y.device)
    both = {"KIND": kind, "TILE": TILE if few else WIDE, "SPLITS": shrink.splits}
    _shrink_terms[tiles, shrink.splits, shrink.groups](
        inner, x, batch, index, at, forms, scale, data,
        tokens * most, x.shape[1], x.stride(0), index.shape[1], most, in_start,
        SLICES=slices, TERMS=shrink.terms, COLUMNS=shrink.columns, PRECISION=precision(y),
        num_warps=shrink.warps, **both,
    )  # fmt: skip
    _expand_terms[tiles, len(blocks)](
        y, inner, batch, index, at, forms, data, blocks,
        tokens, slices * tokens * most, y.stride(0), index.shape[1], most,
        COLUMNS=expand.columns, ALIGNED=aligned(y, columns, widths, expand.columns),
        num_warps=expand.warps, **both,
    )  # fmt: skip


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
    if not has_tile(batch, KIND):
        return
    order, _, count, row = own_tile(batch, KIND)
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
                total += read_vector(data, v_at, form, in_start + column, in_start + end, COLUMNS) * given
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
                vectors = read_values(data, v_ats[:, None], forms_[:, None], in_start + j[None, :], wanted, first_form)
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
    if not has_tile(batch, KIND):
        return
    order, _, count, row = own_tile(batch, KIND)
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
            total += amount * read_vector(data, u_at, form, row_of_u, row_of_u + width, COLUMNS)
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
            vector = read_vector(data, u_at_, form_, row_of_u, row_of_u + width, COLUMNS)
            totals += amounts[:, None] * vector[None, :]
        tl.store(targets, totals, mask=written)
