"""The adapters of one rank in a batch: their factors in chunks, and products with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.stopping import check_stop
from .chunks import ELEMENTS_AT_ONCE, Chunks

_CANCELLED = 1e-7  # of ‖D‖²: of smaller errors, the sum of three terms loses too many digits

Store = Callable[[Tensor], Tensor]
"""Rounds cores [..., R_U, R_V] to what is kept of them, as a bundle stores them."""


@dataclass(frozen=True)
class Part:
    """All adapters of one rank r, in N chunks of c places; at a place of nobody the factors are zero."""

    rank: int
    chunks: Chunks
    bt: Tensor  # [N, c·r, d_out]: the columns of every B_i
    a: Tensor  # [N, c·r, d_in]: the rows of every A_i
    factors: Tensor  # [N, c] in float64: what each update is still to be multiplied by, see `Batch.exact`

    @property
    def chunks_at_once(self) -> int:
        """How many chunks to turn to float64 at a time."""
        return max(1, ELEMENTS_AT_ONCE[self.a.device.type] // max(1, self.bt[0].numel() + self.a[0].numel()))

    def select(self, problems: Tensor) -> Part:
        """Some of the problems [P'], ascending, numbered anew."""
        chunks, staying = self.chunks.select(problems)
        here = staying.to(self.a.device)
        return Part(self.rank, chunks.to(self.a.device), self.bt[here], self.a[here], self.factors[here])

    def per_adapter(self, rows: Tensor) -> Tensor:
        """Rows [N, c·r, k] as [N, c, r, k]."""
        return rows.reshape(len(rows), self.chunks.size, self.rank, -1)

    def cores(self, u: Tensor, v: Tensor) -> Tensor:
        """Uᵀ D_i V for U [P, d_out, k] and V [P, d_in, l], as [N, c, k, l]."""
        return self.per_adapter(self._times(self.bt, u)).mT @ self.per_adapter(self._times(self.a, v))

    def times_left_gram(self, u: Tensor) -> Tensor:
        """Σ_i D_i D_iᵀ U = Σ_i B_i (A_i A_iᵀ) B_iᵀ U of every problem, for U [P, d_out, k]."""
        return self._total(self.bt, self._times_gram(self.a, self._times(self.bt, u)))

    def times_right_gram(self, v: Tensor) -> Tensor:
        """Σ_i D_iᵀ D_i V = Σ_i A_iᵀ (B_iᵀ B_i) A_i V of every problem, for V [P, d_in, k]."""
        return self._total(self.a, self._times_gram(self.bt, self._times(self.a, v)))

    def gradients(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_i D_i V Vᵀ D_iᵀ U [P, d_out, R_U] and Σ_i D_iᵀ U Uᵀ D_i V [P, d_in, R_V]."""
        y, x = (self.per_adapter(self._times(*side)) for side in ((self.bt, u), (self.a, v)))
        core = x.mT @ y  # [N, c, R_V, R_U]
        along_u = self._total(self.bt, (x @ core).flatten(1, 2))
        return along_u, self._total(self.a, (y @ core.mT).flatten(1, 2))

    def encoded(self, bases: Bases, store: Store) -> tuple[Tensor, Tensor]:
        """`Batch.encoded` of these adapters: cores [N, c, R_U, R_V] as kept, and errors [N, c]."""
        cores, errors = [], []
        for start in range(0, len(self.bt), self.chunks_at_once):
            check_stop()
            kept, lost = _encoded(self, slice(start, start + self.chunks_at_once), bases, store)
            cores.append(kept)
            errors.append(lost)
        return torch.cat(cores), torch.cat(errors)

    def _times(self, rows: Tensor, basis: Tensor) -> Tensor:
        """The rows [N, c·r, d] times the basis [P, d, k] of their problem."""
        step = self._chunks_with(basis.shape[1] * basis.shape[2])
        if self.chunks.one_each or step >= len(rows):
            return rows @ self.chunks.spread(basis)
        # Bases are repeated for some chunks at a time: they may be larger than these.
        pieces = zip(torch.split(rows, step), torch.split(self.chunks.problems, step), strict=True)
        return torch.cat([some @ basis[problems] for some, problems in pieces])

    def _times_gram(self, rows: Tensor, x: Tensor) -> Tensor:
        """G_i X_i with G_i = R_i R_iᵀ of every adapter's rows R_i, for X [N, c·r, k]."""
        own = self.per_adapter(rows)
        return (own @ own.mT @ self.per_adapter(x)).flatten(1, 2)

    def _total(self, rows: Tensor, x: Tensor) -> Tensor:
        """Σ_i R_iᵀ X_i over the adapters of each problem, for rows R [N, c·r, d] and X [N, c·r, k], as [P, d, k]."""
        step = self._chunks_with(rows.shape[2] * x.shape[2])
        return self.chunks.total_of(lambda some: rows[some].mT @ x[some], step)

    def _chunks_with(self, elements: int) -> int:
        """For how many chunks to make so many elements each at a time; a GPU has memory for all."""
        return max(1, ELEMENTS_AT_ONCE["cpu"] // elements) if self.a.device.type == "cpu" else len(self.a)


class Bases(NamedTuple):
    """Bases of P problems in float64, with UᵀU and its inverse, and likewise for V."""

    u: Tensor
    v: Tensor
    gram_u: Tensor
    gram_v: Tensor
    inverse_u: Tensor
    inverse_v: Tensor

    @classmethod
    def of(cls, u: Tensor, v: Tensor) -> Bases:
        """U [P, d_out, R_U] and V [P, d_in, R_V], whose columns are linearly independent."""
        u, v = u.double(), v.double()
        grams = u.mT @ u, v.mT @ v
        return cls(u, v, *grams, *map(torch.linalg.inv, grams))

    def at(self, index: Tensor) -> Bases:
        """Those of some problems, or of one problem several times."""
        return Bases(*(each[index] for each in self))


def _encoded(part: Part, some: slice, bases: Bases, store: Store) -> tuple[Tensor, Tensor]:
    """`Part.encoded` for some chunks.

    ‖D − U Σ Vᵀ‖² = ‖D‖² − 2⟨Uᵀ D V, Σ⟩ + ⟨UᵀU Σ, Σ VᵀV⟩, and where that cancels, what `_small_errors` says.
    """
    own = bases.at(part.chunks.problems[some])
    bt, a, factors = part.bt[some].double(), part.a[some].double(), part.factors[some]
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
        errors[small] = _small_errors(scaled, a[small], own.at(small), kept[small], part)
    return cores, errors


def _small_errors(bt: Tensor, a: Tensor, own: Bases, cores: Tensor, part: Part) -> Tensor:
    """‖D − U Σ Vᵀ‖² [N, c], of which no digit is lost, for rows [N, c·r, d].

    With P = (UᵀU)⁻¹ Uᵀ, D − U Σ Vᵀ = (B − U P B) A + U (P B A − Σ Vᵀ). The two are orthogonal, and nothing cancels.
    """
    inside = bt @ own.u @ own.inverse_u  # the rows of (P B)ᵀ
    outside, per_a = part.per_adapter(bt - inside @ own.u.mT), part.per_adapter(a)
    rest = part.per_adapter(inside).mT @ per_a - cores @ own.v.mT[:, None]
    lost = (outside @ outside.mT * (per_a @ per_a.mT)).sum((2, 3))
    return lost + (own.gram_u[:, None] @ rest * rest).sum((2, 3))
