"""All adapters of one target module at once: a stack of factored updates of any mix of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from .chunks import ELEMENTS_AT_ONCE
from .factored import Factors

_AT_ONCE = ELEMENTS_AT_ONCE | {"cpu": 2**22}  # elements in a product with many bases, at the most


class Group(NamedTuple):
    """All adapters of one rank r: their n_g positions in the stack, and their n_g · r rows."""

    rank: int
    positions: slice
    rows: slice


@dataclass(frozen=True)
class Stack:
    """n updates D_i = B_i A_i of one module, with S = Σ r_i rows in all.

    Adapters are in the order of (rank, number), so that every step below is one matrix product over all rows or one
    batched product for each distinct rank: nothing is padded, and nothing loops over adapters. Of the adapters 0, 1, 2
    with the ranks 2, 1, 2::

        adapters   1   0     2          the caller's number of each adapter
        position   0   1     2
        rows       0   1 2   3 4        groups: rank 1 has position 0 and row 0, rank 2 has 1, 2 and 1 … 4
    """

    bt: Tensor  # [S, d_out]: the columns of every B_i
    a: Tensor  # [S, d_in]: the rows of every A_i
    adapters: tuple[int, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, factors: Sequence[Factors], adapters: Sequence[int]) -> Stack:
        """Stack the factors B_i [d_out, r_i] and A_i [r_i, d_in] of the adapters numbered ``adapters``."""
        order = sorted(range(len(adapters)), key=lambda i: (factors[i][1].shape[0], adapters[i]))
        return cls(
            torch.cat([factors[i][0].mT for i in order]),
            torch.cat([factors[i][1] for i in order]),
            tuple(adapters[i] for i in order),
            _groups([factors[i][1].shape[0] for i in order]),
        )

    @classmethod
    def of_rows(cls, bt: Tensor, a: Tensor, adapters: Sequence[int], ranks: Sequence[int]) -> Stack:
        """A stack whose rows are there already, in the order of (rank, number)."""
        return cls(bt, a, tuple(adapters), _groups(ranks))

    @property
    def ranks(self) -> list[int]:
        """The rank of every adapter, in the order of the stack."""
        return [group.rank for group in self.groups for _ in range(group.positions.start, group.positions.stop)]

    def select(self, wanted: set[int]) -> Stack:
        """The sub-stack of the adapters whose numbers are in ``wanted``."""
        if wanted.issuperset(self.adapters):
            return self
        keep = [adapter in wanted for adapter in self.adapters]
        ranks = self.ranks
        rows = torch.repeat_interleave(torch.tensor(keep), torch.tensor(ranks)).to(self.a.device)
        return Stack(
            self.bt[rows],
            self.a[rows],
            tuple(adapter for adapter, kept in zip(self.adapters, keep, strict=True) if kept),
            _groups([rank for rank, kept in zip(ranks, keep, strict=True) if kept]),
        )

    def scaled(self, factors: Tensor) -> Stack:
        """The stack of f_i D_i for ``factors`` [n] in the order of the stack."""
        return Stack(self.bt * self.per_row(factors.to(self.bt))[:, None], self.a, self.adapters, self.groups)

    def to(self, target: torch.device | torch.dtype) -> Stack:
        """The same on another device, or in another dtype."""
        return Stack(self.bt.to(target), self.a.to(target), self.adapters, self.groups)

    def factors(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """For every distinct rank r: B [n_g, d_out, r], A [n_g, r, d_in] and the positions of these adapters."""
        for group, (bt, a) in zip(self.groups, self._views(self.bt, self.a), strict=True):
            yield bt.mT, a, group.positions

    def squared_norms(self) -> Tensor:
        """‖D_i‖_F² = Σ (B_iᵀB_i ∘ A_iA_iᵀ), of shape [n]."""
        return torch.cat([(b @ b.mT * (a @ a.mT)).sum((-2, -1)) for b, a in self._views(self.bt, self.a)])

    def cores(self, u: Tensor, v: Tensor) -> Tensor:
        """Uᵀ D_i V for U [d_out, k] and V [d_in, l], of shape [n, k, l]."""
        return torch.cat([y.mT @ x for y, x in self._views(self.bt @ u, self.a @ v)])

    def captured(self, u: Tensor, v: Tensor) -> Tensor:
        """‖U_cᵀ D_i V_c‖² for bases U [c, d_out, k] and V [c, d_in, l], of shape [n, c] in float64."""
        most = max(1, _AT_ONCE[u.device.type] // max(1, len(self.a) * max(u.shape[2], v.shape[2])))  # bases at once
        return torch.cat(
            [self._captured(*some) for some in zip(torch.split(u, most), torch.split(v, most), strict=True)], 1
        )

    def _captured(self, u: Tensor, v: Tensor) -> Tensor:
        check_stop()
        y, x = (rows @ basis.transpose(0, 1).flatten(1) for rows, basis in ((self.bt, u), (self.a, v)))
        found = []
        for y_g, x_g in self._views(y, x):
            y_g, x_g = (z.reshape(*z.shape[:2], len(u), -1).permute(0, 2, 3, 1) for z in (y_g, x_g))  # [n_g, c, k, r]
            found.append((y_g @ x_g.mT).square().sum((2, 3), dtype=torch.float64))
        return torch.cat(found)

    def sums(self, x: Tensor) -> Tensor:
        """Σ over the rows of each adapter of X [S, k], of shape [n, k]."""
        return torch.cat([x_g.sum(1) for (x_g,) in self._views(x)])

    def per_row(self, x: Tensor) -> Tensor:
        """``x`` [n, ...] repeated for every row of its adapter, of shape [S, ...]."""
        return torch.repeat_interleave(x, torch.tensor(self.ranks, device=x.device), dim=0)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """``rows`` [S, k] of the adapters of every distinct rank r, as [n_g, r, k]."""
        return [view for (view,) in self._views(rows)]

    def _views(self, *rows: Tensor) -> list[list[Tensor]]:
        """For every group, each of ``rows`` [S, k] as [n_g, r, k]."""
        return [[x[group.rows].reshape(-1, group.rank, x.shape[1]) for x in rows] for group in self.groups]


@dataclass(frozen=True)
class ScaledStack:
    """Updates D_i = f_i B_i A_i whose factors are as the files have them: the f_i are kept apart, so none is rounded.

    ``rows`` are the B_i and A_i, and ``factors`` [n] the f_i on the CPU in float64, in the order of the stack.
    """

    rows: Stack
    factors: Tensor

    @classmethod
    def of(cls, rows: Stack) -> ScaledStack:
        """Updates that ``rows`` have all of: every f_i is 1."""
        return cls(rows, torch.ones(len(rows.adapters), dtype=torch.float64))

    @property
    def adapters(self) -> tuple[int, ...]:
        """The caller's number of each adapter."""
        return self.rows.adapters

    def select(self, wanted: set[int]) -> ScaledStack:
        """The sub-stack of the adapters whose numbers are in ``wanted``."""
        kept = torch.tensor([adapter in wanted for adapter in self.adapters], dtype=torch.bool)
        return ScaledStack(self.rows.select(wanted), self.factors[kept])

    def scaled(self, factors: Tensor) -> Stack:
        """The stack of f_i D_i in float32, for ``factors`` f [n] in the order of the stack."""
        return self.rows.to(torch.float32).scaled(self.factors * factors)

    def exact(self) -> Stack:
        """The D_i in float64."""
        return self.rows.to(torch.float64).scaled(self.factors)

    def captured(self, u: Tensor, v: Tensor) -> Tensor:
        """‖U_cᵀ D_i V_c‖² for bases U [c, d_out, k] and V [c, d_in, l] in float32, of shape [n, c] in float64."""
        rows = self.rows.to(torch.float32)
        return rows.captured(u, v) * self.factors.square().to(u.device)[:, None]


def _groups(ranks: Sequence[int]) -> tuple[Group, ...]:
    """The groups of a sequence of ranks in ascending order."""
    groups = []
    position = row = 0
    for rank, same in groupby(ranks):
        count = len(list(same))
        groups.append(Group(rank, slice(position, position + count), slice(row, row + count * rank)))
        position, row = position + count, row + count * rank
    return tuple(groups)
