"""All adapters of one target module at once: a stack of factored updates of any mix of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from .factored import Factors

_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}  # numbers in a product with many bases, at the most


class _Group(NamedTuple):
    """Adapters of one rank: their positions in the stack, and their rows."""

    rank: int
    members: slice
    rows: slice


@dataclass(frozen=True)
class Stack:
    """n updates D_i = B_i A_i of one module, with S = Σ r_i rows in all.

    Adapters are grouped by rank, so that every step below is one matrix product over all rows or one batched product
    for each distinct rank: nothing is padded, and nothing loops over adapters. ``members`` holds the caller's number
    of each adapter in the stack.
    """

    bt: Tensor  # [S, d_out]: the columns of every B_i
    a: Tensor  # [S, d_in]: the rows of every A_i
    members: tuple[int, ...]
    groups: tuple[_Group, ...]

    @classmethod
    def of(cls, factors: Sequence[Factors], members: Sequence[int]) -> Stack:
        """Stack the factors B_i [d_out, r_i] and A_i [r_i, d_in] of the adapters numbered ``members``."""
        order = sorted(range(len(members)), key=lambda i: (factors[i][1].shape[0], members[i]))
        return cls(
            torch.cat([factors[i][0].mT for i in order]),
            torch.cat([factors[i][1] for i in order]),
            tuple(members[i] for i in order),
            _groups([factors[i][1].shape[0] for i in order]),
        )

    @classmethod
    def of_rows(cls, bt: Tensor, a: Tensor, members: Sequence[int], ranks: Sequence[int]) -> Stack:
        """A stack whose rows are there already, in the order of (rank, member)."""
        return cls(bt, a, tuple(members), _groups(ranks))

    @property
    def ranks(self) -> list[int]:
        """The rank of every adapter, in the order of the stack."""
        return [group.rank for group in self.groups for _ in range(group.members.start, group.members.stop)]

    def select(self, wanted: set[int]) -> Stack:
        """The sub-stack of the adapters whose numbers are in ``wanted``."""
        if wanted.issuperset(self.members):
            return self
        keep = [member in wanted for member in self.members]
        ranks = self.ranks
        rows = torch.repeat_interleave(torch.tensor(keep), torch.tensor(ranks)).to(self.a.device)
        return Stack(
            self.bt[rows],
            self.a[rows],
            tuple(member for member, kept in zip(self.members, keep, strict=True) if kept),
            _groups([rank for rank, kept in zip(ranks, keep, strict=True) if kept]),
        )

    def scaled(self, factors: Tensor) -> Stack:
        """The stack of f_i D_i for ``factors`` [n] in the order of the stack."""
        return Stack(self.bt * self.per_row(factors.to(self.bt))[:, None], self.a, self.members, self.groups)

    def to(self, target: torch.device | torch.dtype) -> Stack:
        """The same on another device, or in another dtype."""
        return Stack(self.bt.to(target), self.a.to(target), self.members, self.groups)

    def factors(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """For every distinct rank r: B [n_g, d_out, r], A [n_g, r, d_in] and the positions of these adapters."""
        for group, (bt, a) in zip(self.groups, self._views(self.bt, self.a), strict=True):
            yield bt.mT, a, group.members

    def squared_norms(self) -> Tensor:
        """‖D_i‖_F² = Σ (B_iᵀB_i ∘ A_iA_iᵀ), of shape [n]."""
        return torch.cat([(b @ b.mT * (a @ a.mT)).sum((-2, -1)) for b, a in self._views(self.bt, self.a)])

    def cores(self, u: Tensor, v: Tensor) -> Tensor:
        """Uᵀ D_i V for U [d_out, k] and V [d_in, l], of shape [n, k, l]."""
        return self.blocks(self.bt @ u, self.a @ v)

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

    def blocks(self, y: Tensor, x: Tensor) -> Tensor:
        """Y_iᵀ X_i for rows Y [S, k] and X [S, l], of shape [n, k, l]."""
        return torch.cat([y_g.mT @ x_g for y_g, x_g in self._views(y, x)])

    def spread(self, x: Tensor, p: Tensor) -> Tensor:
        """The rows X_i P_i, for X [S, k] and P [n, k, l], of shape [S, l]."""
        return torch.cat(
            [
                (x[group.rows].reshape(-1, group.rank, x.shape[1]) @ p[group.members]).flatten(0, 1)
                for group in self.groups
            ]
        )

    def sums(self, x: Tensor) -> Tensor:
        """Σ over the rows of each adapter of X [S, k], of shape [n, k]."""
        return torch.cat([x_g.sum(1) for (x_g,) in self._views(x)])

    def per_row(self, x: Tensor) -> Tensor:
        """``x`` [n, ...] repeated for every row of its adapter, of shape [S, ...]."""
        return torch.repeat_interleave(x, torch.tensor(self.ranks, device=x.device), dim=0)

    def times_left_gram(self, u: Tensor) -> Tensor:
        """Σ_i D_i D_iᵀ U, of shape [d_out, k]: the matrix whose leading eigenvectors are the HOSVD's U."""
        return self.bt.mT @ self._times_grams(self.a, self.bt @ u)

    def times_right_gram(self, v: Tensor) -> Tensor:
        """Σ_i D_iᵀ D_i V, of shape [d_in, k]."""
        return self.a.mT @ self._times_grams(self.bt, self.a @ v)

    def _times_grams(self, rows: Tensor, x: Tensor) -> Tensor:
        return torch.cat([(g @ g.mT @ x_g).flatten(0, 1) for g, x_g in self._views(rows, x)])

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
        return cls(rows, torch.ones(len(rows.members), dtype=torch.float64))

    @property
    def members(self) -> tuple[int, ...]:
        """The caller's number of each adapter."""
        return self.rows.members

    def select(self, wanted: set[int]) -> ScaledStack:
        """The sub-stack of the adapters whose numbers are in ``wanted``."""
        kept = torch.tensor([member in wanted for member in self.members], dtype=torch.bool)
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


def _groups(ranks: Sequence[int]) -> tuple[_Group, ...]:
    """The groups of a sequence of ranks in ascending order."""
    groups = []
    member = row = 0
    for rank, same in groupby(ranks):
        count = len(list(same))
        groups.append(_Group(rank, slice(member, member + count), slice(row, row + count * rank)))
        member, row = member + count, row + count * rank
    return tuple(groups)
