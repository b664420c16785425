"""Adapters that share bases, each with a core of its own, see `serving.cores`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..cores import TILE
from ..tiles import FEW, WIDE, most_tiles
from .cuts import Cuts, Expand, Shrink
from .launch import aligned, blocks_of, precision
from .tile import has_tile, own_tile

OF_FEW = Cuts(Shrink(16, 128, 1), Expand(128, 2))
OF_MANY = Cuts(Shrink(2, 64, 4), Expand(128, 4))
_LARGEST_BLOCK = 2**13  # elements of U that a program has in shared memory
_LEAST_COLUMNS = 16  # that tensor cores multiply at once


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
    tiles = most_tiles(tokens, groups, TILE)
    if not tiles:
        return
    few = tokens <= FEW
    shrink, expand = OF_FEW if few else OF_MANY
    starts = [sum(widths[:number]) for number in range(slices)]
    size = min(expand.columns, max(_LEAST_COLUMNS, _LARGEST_BLOCK // rank))
    blocks = blocks_of(tuple(columns), tuple(widths), tuple(starts), size, y.device)
    inner = torch.empty(shrink.splits, slices, tokens, rank, dtype=torch.float32, device=y.device)
    both = {
        "KIND": kind, "TILE": TILE if few else WIDE, "SPLITS": shrink.splits, "RANK": rank,
        "PRECISION": precision(y),
    }  # fmt: skip
    _shrink_bases[tiles, slices, shrink.splits](
        inner, x, batch, v, core,
        tokens, x.shape[1], x.stride(0), slices, core.shape[1],
        COLUMNS=shrink.columns, DIAGONAL=core.ndim == 3, num_warps=shrink.warps, **both,
    )  # fmt: skip
    _expand_bases[tiles, len(blocks)](
        y, inner, batch, u, blocks,
        tokens, slices, y.stride(0), u.shape[1],
        COLUMNS=size, ALIGNED=aligned(y, columns, widths, size), num_warps=expand.warps, **both,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _shrink_bases(
    inner, x, batch, v, core,
    tokens, d_in, x_stride, slices, places,
    KIND: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inner [SPLITS, slices, tokens, RANK]: Σ Vᵀx, each over a part of the columns."""
    slice_, split = tl.program_id(1), tl.program_id(2)
    if not has_tile(batch, KIND):
        return
    order, adapters, count, cluster = own_tile(batch, KIND)
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
    if not has_tile(batch, KIND):
        return
    order, _, count, cluster = own_tile(batch, KIND)
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
