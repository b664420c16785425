"""Many fits at once: the updates of several modules of one shape, each for the adapters of several clusters.

A *problem* is one module for the adapters of one cluster. The rows of all problems lie in chunks of equally many
adapters, so that a step of all fits is a few batched products, and sums over the adapters of a problem are sums over
its chunks in a fixed order. What a problem lacks to full chunks is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from .stack import ScaledStack, Stack

_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}  # numbers in what a step makes besides its result, at the most
_CANCELLED = 1e-7  # of ‖D‖²: of smaller errors, the sum of three terms loses too many digits
_MOST_IN_CHUNK = 64  # adapters: what a large problem makes on the way is made for some of its chunks at a time
_PADDING = 1.25  # times the rows there are, at the most, for chunks as large as that allows


@dataclass(frozen=True)
class Chunks:
    """Where things go that belong to P problems: N chunks of ``size`` places, each of one problem, in their order."""

    size: int
    of: Tensor  # [N]: the problem of every chunk, ascending
    lengths: Tensor  # [P]: the number of chunks of every problem
    places: Tensor  # [things]: the place, out of N · size, of every thing

    @classmethod
    def of_problems(cls, problems: Tensor, count: int) -> Chunks:
        """Chunks for things that belong to ``problems`` [things], out of ``count``."""
        sizes = torch.bincount(problems, minlength=count)
        size = _chunk_size(sizes)
        lengths = -(-sizes // size)
        order = problems.argsort(stable=True)
        within = torch.arange(len(problems)) - (sizes.cumsum(0) - sizes)[problems[order]]
        places = torch.empty_like(problems)
        places[order] = (lengths.cumsum(0) - lengths)[problems[order]] * size + within
        return cls(size, torch.repeat_interleave(torch.arange(count), lengths), lengths, places)

    @property
    def one_each(self) -> bool:
        """Whether chunk p is all of problem p."""
        return len(self.of) == len(self.lengths) and bool((self.lengths == 1).all())

    def to(self, device: torch.device) -> Chunks:
        return Chunks(self.size, self.of.to(device), self.lengths.to(device), self.places.to(device))


def _chunk_size(sizes: Tensor) -> int:
    size = max(1, min(_MOST_IN_CHUNK, int(sizes.max())))
    while size > 1 and int((-(-sizes // size)).sum()) * size > _PADDING * int(sizes.sum()):
        size = -(-size // 2)
    return size


@dataclass(frozen=True)
class _Placed:
    """Chunks on a device, ready for sums and look-ups."""

    chunks: Chunks
    one_each: bool

    def spread(self, x: Tensor) -> Tensor:
        """What each problem has, x [P, ...], for each of its chunks, [N, ...]."""
        return x if self.one_each else x[self.chunks.of]

    def total(self, x: Tensor) -> Tensor:
        """The sum over the chunks of each problem of x [N, ...], as [P, ...]; always in one order."""
        if self.one_each:
            return x
        if x.device.type == "cpu":
            return x.new_zeros(len(self.chunks.lengths), *x.shape[1:]).index_add_(0, self.chunks.of, x)
        return torch.segment_reduce(x, "sum", lengths=self.chunks.lengths, axis=0, initial=0, unsafe=True)

    def total_of(self, make: Callable[[slice], Tensor], step: int) -> Tensor:
        """The `total` of what ``make`` has for some chunks, ``step`` of them at a time."""
        count = len(self.chunks.of)
        if step >= count:
            return self.total(make(slice(0, count)))

        def made_of(some: slice) -> tuple[slice, Tensor]:
            check_stop()
            return some, make(some)

        pieces = map(made_of, (slice(start, start + step) for start in range(0, count, step)))
        if self.chunks.of.device.type != "cpu":
            return self.total(torch.cat([made for _, made in pieces]))
        sums: Tensor | None = None
        for some, made in pieces:  # in the order of `total`
            sums = made.new_zeros(len(self.chunks.lengths), *made.shape[1:]) if sums is None else sums
            sums.index_add_(0, self.chunks.of[some], made)
        assert sums is not None
        return sums


def _placed(problems: Tensor, count: int, device: torch.device) -> _Placed:
    chunks = Chunks.of_problems(problems, count)
    return _Placed(chunks.to(device), chunks.one_each)


@dataclass(frozen=True)
class _Part:
    """All adapters of one rank r: their factors in chunks."""

    rank: int
    placed: _Placed
    bt: Tensor  # [N, c·r, d_out]
    a: Tensor  # [N, c·r, d_in]
    factors: Tensor  # [N, c] in float64: what each update is still to be multiplied by, see `Batch.exact`

    @property
    def size(self) -> int:
        return self.placed.chunks.size

    @property
    def chunks_at_once(self) -> int:
        """How many chunks to turn to float64 at a time."""
        return max(1, _AT_ONCE[self.a.device.type] // max(1, self.bt[0].numel() + self.a[0].numel()))

    def per_adapter(self, rows: Tensor) -> Tensor:
        """Rows [N, c·r, k] as [N, c, r, k]."""
        return rows.reshape(len(rows), self.size, self.rank, -1)


@dataclass(frozen=True)
class Cores:
    """Cores C_i of the adapters of P problems, in chunks."""

    placed: _Placed
    left: Tensor  # [N, c, k, l]: C_i
    right: Tensor  # [N, c, l, k]: C_iᵀ

    @classmethod
    def of(cls, placed: _Placed, cores: Tensor) -> Cores:
        return cls(placed, cores, cores.mT.contiguous())

    def corner(self, rows: int, columns: int) -> Cores:
        """The first rows and columns of every core."""
        return Cores(
            self.placed, self.left[..., :rows, :columns].contiguous(), self.right[..., :columns, :rows].contiguous()
        )

    def left_gram(self, v: Tensor) -> Tensor:
        """Σ_i C_i V Vᵀ C_iᵀ for s bases V [P, s, l, r] of each problem, as [P, s, k, k]."""
        return _half_gram(self.left, v, self.placed)

    def right_gram(self, u: Tensor) -> Tensor:
        """Σ_i C_iᵀ U Uᵀ C_i for U [P, s, k, r], as [P, s, l, l]."""
        return _half_gram(self.right, u, self.placed)

    def full_left_gram(self) -> Tensor:
        """Σ_i C_i C_iᵀ, [P, 1, k, k]."""
        return _full_gram(self.left, self.placed)

    def full_right_gram(self) -> Tensor:
        """Σ_i C_iᵀ C_i, [P, 1, l, l]."""
        return _full_gram(self.right, self.placed)


def _half_gram(cores: Tensor, basis: Tensor, placed: _Placed) -> Tensor:
    _, size, rows, _ = cores.shape
    starts, rank = basis.shape[1], basis.shape[3]
    together = basis.transpose(1, 2).flatten(2)  # [P, l, s·r]: one product for all starts

    def grams(some: slice) -> Tensor:
        half = cores[some].flatten(1, 2) @ (together[some] if placed.one_each else together[placed.chunks.of[some]])
        half = half.reshape(-1, size, rows, starts, rank).permute(0, 3, 2, 1, 4).flatten(3)  # [N, s, k, c·r]
        return half @ half.mT

    return placed.total_of(grams, max(1, _AT_ONCE[cores.device.type] // (size * rows * starts * rank)))


def _full_gram(cores: Tensor, placed: _Placed) -> Tensor:
    flat = cores.transpose(1, 2).flatten(2)
    return placed.total(flat @ flat.mT)[:, None]


@dataclass(frozen=True)
class Batch:
    """P problems of one shape. ``owners`` [T] and ``members`` [T] are, by problem and then by number, the problem and
    the number of every adapter in it."""

    problems: int
    shape: tuple[int, int]
    owners: Tensor
    members: Tensor
    _parts: tuple[_Part, ...]
    _entries: tuple[Tensor, ...]  # for each part, the entries of 0 … T − 1 that it holds, in the order of its places

    @classmethod
    def of(
        cls,
        stacks: Sequence[ScaledStack],
        owners: Sequence[Tensor],
        problems: int,
        scales: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """The adapters of ``stacks``, all of one shape, in ``dtype``; −1 in ``owners`` [n] of a stack leaves one out.

        ``scales`` [n] are multiplied into the updates. Both are in the order of the stacks.
        """
        folded = [stack.factors for stack in stacks]
        if scales is not None:
            folded = [factors * scale for factors, scale in zip(folded, scales, strict=True)]
        return cls._of(stacks, owners, problems, dtype, folded)

    @classmethod
    def exact(cls, stacks: Sequence[ScaledStack], owners: Sequence[Tensor], problems: int) -> Batch:
        """The same for `encoded` alone: nothing is rounded, and the factors of the updates are kept apart."""
        dtype = functools.reduce(torch.promote_types, (stack.rows.a.dtype for stack in stacks))
        return cls._of(stacks, owners, problems, dtype, None)

    @classmethod
    def _of(
        cls,
        scaled: Sequence[ScaledStack],
        owners: Sequence[Tensor],
        problems: int,
        dtype: torch.dtype,
        folded: Sequence[Tensor] | None,
    ) -> Batch:
        """``folded`` [n] of each stack is multiplied into its rows; without, its factors go with them."""
        stacks = [stack.rows for stack in scaled]
        device = stacks[0].a.device
        d_out, d_in = stacks[0].bt.shape[1], stacks[0].a.shape[1]
        numbers = torch.cat([torch.tensor(stack.members) for stack in stacks])
        owner = torch.cat(list(owners))
        kept = owner >= 0
        key = owner * (int(numbers.max()) + 1) + numbers
        entry = torch.full_like(owner, -1)
        order = torch.where(kept, key, key.max() + 1).argsort(stable=True)[: int(kept.sum())]
        entry[order] = torch.arange(len(order))
        first = [0, *torch.tensor([len(stack.members) for stack in stacks]).cumsum(0).tolist()]
        parts, entries = [], []
        for rank in sorted(set(chain.from_iterable((group.rank for group in stack.groups) for stack in stacks))):
            groups = [(i, group) for i, stack in enumerate(stacks) for group in stack.groups if group.rank == rank]
            here = torch.cat([torch.arange(first[i] + g.members.start, first[i] + g.members.stop) for i, g in groups])
            inside = here[kept[here]]
            if not len(inside):
                continue
            placed = _placed(owner[inside], problems, device)
            places = torch.full((len(numbers),), -1)
            places[inside] = placed.chunks.places.cpu()
            total = len(placed.chunks.of) * placed.chunks.size
            bt, a = (torch.zeros(total, rank, side, dtype=dtype, device=device) for side in (d_out, d_in))
            factors = torch.ones(total, dtype=torch.float64)
            for i, group in groups:
                span = slice(first[i] + group.members.start, first[i] + group.members.stop)
                wanted = places[span] >= 0
                if not wanted.any():
                    continue
                to = places[span][wanted].to(device)
                own_bt = stacks[i].bt[group.rows].reshape(-1, rank, d_out)
                own_a = stacks[i].a[group.rows].reshape(-1, rank, d_in)
                if not wanted.all():
                    chosen = wanted.to(device)
                    own_bt, own_a = own_bt[chosen], own_a[chosen]
                if folded is None:
                    factors[places[span][wanted]] = scaled[i].factors[group.members][wanted]
                else:
                    own_bt = own_bt.to(dtype) * folded[i][group.members][wanted].to(device, dtype)[:, None, None]
                bt[to] = own_bt.to(dtype)
                a[to] = own_a.to(dtype)
            chunked = (len(placed.chunks.of), placed.chunks.size * rank)
            factors = factors.reshape(-1, placed.chunks.size).to(device)
            parts.append(_Part(rank, placed, bt.reshape(*chunked, d_out), a.reshape(*chunked, d_in), factors))
            entries.append(entry[inside])
        return cls(problems, (d_out, d_in), owner[order], numbers[order], tuple(parts), tuple(entries))

    @classmethod
    def of_stack(cls, stack: Stack) -> Batch:
        """All of ``stack`` as one problem."""
        owner = torch.zeros(len(stack.members), dtype=torch.int64)
        return cls.of([ScaledStack.of(stack)], [owner], 1, dtype=stack.a.dtype)

    @property
    def device(self) -> torch.device:
        return self._parts[0].a.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parts[0].a.dtype

    def select(self, problems: Tensor) -> Batch:
        """Some of the problems [P'], ascending, numbered anew."""
        number = torch.full((self.problems,), -1)
        number[problems] = torch.arange(len(problems))
        kept = number[self.owners] >= 0
        entry = kept.cumsum(0) - 1
        parts, entries = [], []
        for part, own in zip(self._parts, self._entries, strict=True):
            wanted = number[part.placed.chunks.of.cpu()] >= 0
            if not wanted.any():
                continue
            chunks, staying = part.placed.chunks, wanted.to(self.device)
            of = number[chunks.of.cpu()[wanted]]
            lengths = torch.bincount(of, minlength=len(problems))
            shift = (torch.arange(len(wanted)) - (wanted.cumsum(0) - 1)) * chunks.size
            inside = kept[own]
            places = chunks.places.cpu()[inside]
            places = places - shift[places // chunks.size]
            moved = Chunks(chunks.size, of, lengths, places)
            placed = _Placed(moved.to(self.device), moved.one_each)
            parts.append(_Part(part.rank, placed, part.bt[staying], part.a[staying], part.factors[staying]))
            entries.append(entry[own[inside]])
        return Batch(
            len(problems), self.shape, number[self.owners[kept]], self.members[kept], tuple(parts), tuple(entries)
        )

    def cores(self, u: Tensor, v: Tensor) -> Tensor:
        """Uᵀ D_i V for U [P, d_out, k] and V [P, d_in, l], as [T, k, l]."""
        return self._in_order([_blocks(part, u, v) for part in self._parts])

    def chunked_cores(self, u: Tensor, v: Tensor) -> Cores:
        """The same, in chunks."""
        if len(self._parts) == 1:
            return Cores.of(self._parts[0].placed, _blocks(self._parts[0], u, v))
        placed = _placed(self.owners, self.problems, self.device)
        cores = self.cores(u, v)
        room = cores.new_zeros(len(placed.chunks.of) * placed.chunks.size, *cores.shape[1:])
        room[placed.chunks.places] = cores
        return Cores.of(placed, room.reshape(-1, placed.chunks.size, *room.shape[1:]))

    def times_left_gram(self, u: Tensor) -> Tensor:
        """Σ_i D_i D_iᵀ U of every problem, for U [P, d_out, k]."""
        return self._sum(
            _total(part, part.bt, _times_gram(part, part.a, _rows(part, part.bt, u))) for part in self._parts
        )

    def times_right_gram(self, v: Tensor) -> Tensor:
        """Σ_i D_iᵀ D_i V, for V [P, d_in, k]."""
        return self._sum(
            _total(part, part.a, _times_gram(part, part.bt, _rows(part, part.a, v))) for part in self._parts
        )

    def gradients(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_i D_i V Vᵀ D_iᵀ U [P, d_out, R_U] and Σ_i D_iᵀ U Uᵀ D_i V [P, d_in, R_V]."""
        along_u, along_v = [], []
        for part in self._parts:
            y, x = (part.per_adapter(_rows(part, *side)) for side in ((part.bt, u), (part.a, v)))
            core = x.mT @ y  # [N, c, R_V, R_U]
            along_u.append(_total(part, part.bt, (x @ core).flatten(1, 2)))
            along_v.append(_total(part, part.a, (y @ core.mT).flatten(1, 2)))
        return self._sum(along_u), self._sum(along_v)

    def encoded(self, u: Tensor, v: Tensor, store: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The cores Σ_i that fit U [P, d_out, R_U] and V [P, d_in, R_V] best, and ‖D_i − U Σ_i Vᵀ‖² [T] with them.

        Σ_i = (UᵀU)⁻¹ Uᵀ D_i V (VᵀV)⁻¹, for bases that need not be quite orthonormal. ``store`` rounds what is kept of
        it, [T, R_U, R_V], and errors are those of what is kept. All of it in float64, a slice at a time.
        """
        bases = _Bases.of(u, v)
        cores, errors = [], []
        for part in self._parts:
            found = []
            for start in range(0, len(part.bt), part.chunks_at_once):
                check_stop()
                found.append(_encoded(part, slice(start, start + part.chunks_at_once), bases, store))
            cores.append(torch.cat([each for each, _ in found]))
            errors.append(torch.cat([each for _, each in found]))
        return self._in_order(cores), self._in_order(errors)

    def _sum(self, of_parts: Iterable[Tensor]) -> Tensor:
        return functools.reduce(torch.add, of_parts)

    def _in_order(self, of_parts: list[Tensor]) -> Tensor:
        """What every part has of each place, [N, c, ...], in the order of the entries, [T, ...]."""
        out = of_parts[0].new_empty(len(self.owners), *of_parts[0].shape[2:])
        for part, entries, found in zip(self._parts, self._entries, of_parts, strict=True):
            out[entries.to(found.device)] = found.flatten(0, 1)[part.placed.chunks.places]
        return out


def _rows(part: _Part, rows: Tensor, basis: Tensor) -> Tensor:
    """The rows [N, c·r, d] times the basis [P, d, k] of their problem."""
    step = _chunks_with(part, basis.shape[1] * basis.shape[2])
    if part.placed.one_each or step >= len(rows):
        return rows @ part.placed.spread(basis)
    of = part.placed.chunks.of  # bases are repeated for some chunks at a time: they may be larger than these
    pieces = zip(torch.split(rows, step), torch.split(of, step), strict=True)
    return torch.cat([some @ basis[problems] for some, problems in pieces])


def _total(part: _Part, rows: Tensor, x: Tensor) -> Tensor:
    """The sum of Rᵀ X over the chunks of each problem, for rows R [N, c·r, d] and X [N, c·r, k], as [P, d, k]."""
    return part.placed.total_of(lambda some: rows[some].mT @ x[some], _chunks_with(part, rows.shape[2] * x.shape[2]))


def _chunks_with(part: _Part, numbers: int) -> int:
    """For how many chunks at a time to make so many numbers each; on a GPU, whose budget allows for it, for all."""
    return max(1, _AT_ONCE["cpu"] // numbers) if part.a.device.type == "cpu" else len(part.a)


def _blocks(part: _Part, u: Tensor, v: Tensor) -> Tensor:
    y, x = part.per_adapter(_rows(part, part.bt, u)), part.per_adapter(_rows(part, part.a, v))
    return y.mT @ x


def _times_gram(part: _Part, rows: Tensor, x: Tensor) -> Tensor:
    """G_i X_i with G_i = R_i R_iᵀ of every adapter's rows R_i, for X [N, c·r, k]."""
    own = part.per_adapter(rows)
    return (own @ own.mT @ part.per_adapter(x)).flatten(1, 2)


class _Bases(NamedTuple):
    """Bases of P problems in float64, with UᵀU and its inverse, and likewise for V."""

    u: Tensor
    v: Tensor
    gram_u: Tensor
    gram_v: Tensor
    inverse_u: Tensor
    inverse_v: Tensor

    @classmethod
    def of(cls, u: Tensor, v: Tensor) -> _Bases:
        u, v = u.double(), v.double()
        grams = u.mT @ u, v.mT @ v
        return cls(u, v, *grams, *map(torch.linalg.inv, grams))


def _encoded(part: _Part, chunks: slice, bases: _Bases, store: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """`Batch.encoded` for some chunks: cores [N, c, R_U, R_V] as kept, and errors [N, c].

    ‖D − U Σ Vᵀ‖² = ‖D‖² − 2⟨Uᵀ D V, Σ⟩ + ⟨UᵀU Σ, Σ VᵀV⟩, and where that cancels, what `_small_errors` says.
    """
    of = part.placed.chunks.of[chunks]
    own = _Bases(*(each[of] for each in bases))
    bt, a, factors = part.bt[chunks].double(), part.a[chunks].double(), part.factors[chunks]
    y, x = part.per_adapter(bt @ own.u), part.per_adapter(a @ own.v)
    projected = y.mT @ x * factors[:, :, None, None]
    cores = store(own.inverse_u[:, None] @ projected @ own.inverse_v[:, None])
    kept = cores.double()
    per_b, per_a = part.per_adapter(bt), part.per_adapter(a)
    norms = (per_b @ per_b.mT * (per_a @ per_a.mT)).sum((2, 3)) * factors.square()
    errors = norms + ((own.gram_u[:, None] @ kept @ own.gram_v[:, None] - 2 * projected) * kept).sum((2, 3))
    small = (errors < _CANCELLED * norms).any(1).nonzero()[:, 0]
    if len(small):
        scaled = bt[small] * factors[small].repeat_interleave(part.rank, 1)[:, :, None]
        errors[small] = _small_errors(scaled, a[small], _Bases(*(each[small] for each in own)), kept[small], part)
    return cores, errors


def _small_errors(bt: Tensor, a: Tensor, own: _Bases, cores: Tensor, part: _Part) -> Tensor:
    """‖D − U Σ Vᵀ‖² [N, c], of which no digit is lost, for rows [N, c·r, d].

    With P = (UᵀU)⁻¹ Uᵀ, D − U Σ Vᵀ = (B − U P B) A + U (P B A − Σ Vᵀ). The two are orthogonal, and nothing cancels.
    """
    inside = bt @ own.u @ own.inverse_u  # the rows of (P B)ᵀ
    outside, per_a = part.per_adapter(bt - inside @ own.u.mT), part.per_adapter(a)
    rest = part.per_adapter(inside).mT @ per_a - cores @ own.v.mT[:, None]
    lost = (outside @ outside.mT * (per_a @ per_a.mT)).sum((2, 3))
    return lost + (own.gram_u[:, None] @ rest * rest).sum((2, 3))
