"""Many fits at once: the updates of several modules of one shape, each for the adapters of several clusters.

A *problem* is one module for the adapters of one cluster. `Batch` holds the T updates of P problems. Adapters of one
rank lie together, in a `Part`, and within it in `Chunks` of one problem each, so that a step of all fits is a few
batched products. A batch is made in two steps: which rows go where is decided with integers alone, and then the rows
are copied there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import Chunks, renumbered
from .cores import Cores
from .part import Bases, Part, Store
from .stack import Group, ScaledStack, Stack


@dataclass(frozen=True)
class Batch:
    """P problems of one shape. ``owners`` [T] and ``adapters`` [T] have the problem and the number of every adapter,
    in the order of problems and then of numbers. An *entry* is a position in there.

    Two problems with the adapters 3, 4 and 3, 9, whose ranks are 8 but for a 16::

        entry       0   1   2   3
        owners      0   0   1   1
        adapters    3   4   3   9
        rank        8  16   8   8       one part has the entries 0, 2, 3 and one the entry 1
    """

    problems: int
    shape: tuple[int, int]
    owners: Tensor
    adapters: Tensor
    _parts: tuple[Part, ...]
    _entries: tuple[Tensor, ...]  # of each part: the entries that it holds, in the order of its `Chunks.places`

    @classmethod
    def of(
        cls,
        stacks: Sequence[ScaledStack],
        owners: Sequence[Tensor],
        problems: int,
        scales: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """The adapters of ``stacks``, all of one shape, in ``dtype``. ``owners`` [n] of a stack has the problem of each
        of its adapters, −1 for one that is left out, and ``scales`` [n] what to multiply each update by."""
        folded = [stack.factors for stack in stacks]
        if scales is not None:
            folded = [factors * scale for factors, scale in zip(folded, scales, strict=True)]
        return cls._built(stacks, owners, problems, dtype, folded)

    @classmethod
    def exact(cls, stacks: Sequence[ScaledStack], owners: Sequence[Tensor], problems: int) -> Batch:
        """The same for `encoded` alone: nothing is rounded, and the factors of the updates are kept apart."""
        dtype = functools.reduce(torch.promote_types, (stack.rows.a.dtype for stack in stacks))
        return cls._built(stacks, owners, problems, dtype, None)

    @classmethod
    def _built(
        cls,
        stacks: Sequence[ScaledStack],
        owners: Sequence[Tensor],
        problems: int,
        dtype: torch.dtype,
        folded: Sequence[Tensor] | None,
    ) -> Batch:
        """``folded`` [n] of each stack is multiplied into its rows; without, its factors go with them."""
        rows = stacks[0].rows
        plan = _planned(stacks, owners, problems)
        return cls(
            problems,
            (rows.bt.shape[1], rows.a.shape[1]),
            plan.owners,
            plan.adapters,
            tuple(_filled(part, stacks, dtype, folded) for part in plan.parts),
            tuple(part.entries for part in plan.parts),
        )

    @classmethod
    def of_stack(cls, stack: Stack) -> Batch:
        """All of ``stack`` as one problem."""
        owner = torch.zeros(len(stack.adapters), dtype=torch.int64)
        return cls.of([ScaledStack.of(stack)], [owner], 1, dtype=stack.a.dtype)

    @property
    def device(self) -> torch.device:
        return self._parts[0].a.device

    @property
    def dtype(self) -> torch.dtype:
        return self._parts[0].a.dtype

    def select(self, problems: Tensor) -> Batch:
        """Some of the problems [P'], ascending, numbered anew."""
        owners = renumbered(problems, self.problems)[self.owners]
        kept = owners >= 0
        entry = kept.cumsum(0) - 1  # of those that stay
        parts = [
            (part.select(problems), entry[own[kept[own]]])
            for part, own in zip(self._parts, self._entries, strict=True)
            if kept[own].any()
        ]
        return Batch(len(problems), self.shape, owners[kept], self.adapters[kept], *zip(*parts, strict=True))

    def cores(self, u: Tensor, v: Tensor) -> Tensor:
        """Uᵀ D_i V for U [P, d_out, k] and V [P, d_in, l], as [T, k, l]."""
        return self._in_order([part.cores(u, v) for part in self._parts])

    def chunked_cores(self, u: Tensor, v: Tensor) -> Cores:
        """The same, in chunks of adapters of any rank."""
        if len(self._parts) == 1:
            return Cores.of(self._parts[0].chunks, self._parts[0].cores(u, v))
        chunks = Chunks.of_problems(self.owners, self.problems).to(self.device)
        cores = self.cores(u, v)
        placed = cores.new_zeros(chunks.all_places, *cores.shape[1:])
        placed[chunks.places] = cores
        return Cores.of(chunks, placed.reshape(-1, chunks.size, *cores.shape[1:]))

    def times_left_gram(self, u: Tensor) -> Tensor:
        """Σ_i D_i D_iᵀ U of every problem, for U [P, d_out, k]: power steps towards the HOSVD's U."""
        return _sum(part.times_left_gram(u) for part in self._parts)

    def times_right_gram(self, v: Tensor) -> Tensor:
        """Σ_i D_iᵀ D_i V of every problem, for V [P, d_in, k]."""
        return _sum(part.times_right_gram(v) for part in self._parts)

    def gradients(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_i D_i V Vᵀ D_iᵀ U [P, d_out, R_U] and Σ_i D_iᵀ U Uᵀ D_i V [P, d_in, R_V] of every problem."""
        along_u, along_v = zip(*(part.gradients(u, v) for part in self._parts), strict=True)
        return _sum(along_u), _sum(along_v)

    def encoded(self, u: Tensor, v: Tensor, store: Store) -> tuple[Tensor, Tensor]:
        """The cores Σ_i that fit U [P, d_out, R_U] and V [P, d_in, R_V] best, and ‖D_i − U Σ_i Vᵀ‖² [T] with them.

        Σ_i = (UᵀU)⁻¹ Uᵀ D_i V (VᵀV)⁻¹, for bases that need not be quite orthonormal. ``store`` rounds what is kept of
        it, [T, R_U, R_V], and errors are those of what is kept. All of it in float64, some chunks at a time.
        """
        bases = Bases.of(u, v)
        cores, errors = zip(*(part.encoded(bases, store) for part in self._parts), strict=True)
        return self._in_order(cores), self._in_order(errors)

    def _in_order(self, of_parts: Sequence[Tensor]) -> Tensor:
        """What every part has of each place, [N, c, ...], in the order of the entries, [T, ...]."""
        out = of_parts[0].new_empty(len(self.owners), *of_parts[0].shape[2:])
        for part, entries, found in zip(self._parts, self._entries, of_parts, strict=True):
            out[entries.to(found.device)] = found.flatten(0, 1)[part.chunks.places]
        return out


def _sum(of_parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, of_parts)


class _Piece(NamedTuple):
    """The adapters of one rank in one of the stacks, and the place [n_g] of each in the part; −1 for one left out."""

    stack: int
    group: Group
    places: Tensor


class _PlannedPart(NamedTuple):
    """A part before there are rows in it: where these come from, and the entries that it will hold."""

    rank: int
    chunks: Chunks
    pieces: list[_Piece]
    entries: Tensor


class _Plan(NamedTuple):
    """What a batch holds and where it goes; all of it on the CPU."""

    owners: Tensor
    adapters: Tensor
    parts: list[_PlannedPart]


def _planned(stacks: Sequence[ScaledStack], owners: Sequence[Tensor], problems: int) -> _Plan:
    """The plan for the adapters of all stacks, which it numbers one stack after another."""
    owner = torch.cat(list(owners))
    adapters = torch.cat([torch.tensor(stack.adapters, dtype=torch.int64) for stack in stacks])
    kept = (owner >= 0).nonzero()[:, 0]
    by_problem_and_number = owner * (int(adapters.max()) + 1) + adapters
    order = kept[by_problem_and_number[kept].argsort(stable=True)]
    entry = renumbered(order, len(owner))
    spans: dict[int, list[tuple[int, Group, slice]]] = {}  # by rank
    first = 0
    for number, stack in enumerate(stacks):
        for group in stack.rows.groups:
            span = slice(first + group.positions.start, first + group.positions.stop)
            spans.setdefault(group.rank, []).append((number, group, span))
        first += len(stack.adapters)
    parts = (_planned_part(rank, own, owner, entry, problems) for rank, own in sorted(spans.items()))
    return _Plan(owner[order], adapters[order], [part for part in parts if len(part.entries)])


def _planned_part(
    rank: int, spans: list[tuple[int, Group, slice]], owner: Tensor, entry: Tensor, problems: int
) -> _PlannedPart:
    """The part of the adapters in ``spans``, each with its stack and its group there, which all have this rank."""
    numbers = torch.arange(len(owner))
    here = torch.cat([numbers[span] for *_, span in spans])
    inside = here[owner[here] >= 0]
    chunks = Chunks.of_problems(owner[inside], problems)
    place = torch.full_like(owner, -1)
    place[inside] = chunks.places
    pieces = [_Piece(stack, group, place[span]) for stack, group, span in spans if (place[span] >= 0).any()]
    return _PlannedPart(rank, chunks, pieces, entry[inside])


def _filled(
    plan: _PlannedPart, stacks: Sequence[ScaledStack], dtype: torch.dtype, folded: Sequence[Tensor] | None
) -> Part:
    """Copy the rows of a part to their places, times what is ``folded`` [n] into those of each stack."""
    rank, places = plan.rank, plan.chunks.all_places
    rows = stacks[0].rows
    bt, a = (side.new_zeros(places, rank, side.shape[1], dtype=dtype) for side in (rows.bt, rows.a))
    factors = torch.ones(places, dtype=torch.float64)
    for number, group, to in plan.pieces:
        wanted = to >= 0
        to = to[wanted]
        own_bt, own_a = (_adapters(side, group, wanted) for side in (stacks[number].rows.bt, stacks[number].rows.a))
        if folded is None:
            factors[to] = stacks[number].factors[group.positions][wanted]
        else:
            scale = folded[number][group.positions][wanted].to(a.device, dtype)
            own_bt = own_bt.to(dtype) * scale[:, None, None]
        here = to.to(a.device)
        bt[here], a[here] = own_bt.to(dtype), own_a.to(dtype)
    bt, a = (side.reshape(-1, plan.chunks.size * rank, side.shape[2]) for side in (bt, a))
    factors = factors.reshape(-1, plan.chunks.size).to(a.device)
    return Part(rank, plan.chunks.to(a.device), bt, a, factors)


def _adapters(rows: Tensor, group: Group, wanted: Tensor) -> Tensor:
    """The rows [S, d] of the ``wanted`` [n_g] adapters of a group, as [wanted, r, d]; without a copy if it is all."""
    own = rows[group.rows].reshape(-1, group.rank, rows.shape[1])
    return own if wanted.all() else own[wanted.to(rows.device)]
