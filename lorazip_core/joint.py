"""One basis for many updates (JD-Full of "Compress then Serve", arXiv 2407.00066): Tucker-2, fitted by HOOI.

max over UᵀU = VᵀV = I of Σ_i ‖Uᵀ D_i V‖², which is min Σ_i ‖D_i − U Σ_i Vᵀ‖² with the optimal Σ_i = Uᵀ D_i V. Weights
are the caller's: he scales the updates by their square roots.

The problem has many local optima, and plain HOOI on the d×d problem is slow. Here every search happens on small cores:
project the updates on generous bases of a few times the rank, search there from many starts, lift the best ones, and
let each climb in the span of the basis and its gradient until the objective stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import orthonormal
from .stack import Stack

# Cores to search on have f·R columns more than R, within bounds. At a small rank optima differ in what they need.
_CORE_WIDTHS = ((1.5, 8, 48), (2.5, 16, 64), (5.0, 32, 80))
_SMALL_RANK = 24
_POWER_ROUNDS, _SURVIVORS = 10, 8
_HOOI_ROUNDS, _FINALISTS = 8, 5
_TRIAL_ROUNDS = 2  # of climbing for every finalist, before the best few of them climb on
_SMALL_ROUNDS = 30
_CLIMB_ROUNDS = 40
_SAME = 0.1  # Σ sin² of the principal angles below which two bases are on the way to one optimum
_TOLERANCE = 1e-7  # of the objective, per round


class Basis(NamedTuple):
    """U [d_out, R_U] and V [d_in, R_V] with orthonormal columns; R_U = R_V = R unless a side has fewer dimensions."""

    u: Tensor
    v: Tensor


def fit_joint(stack: Stack, rank: int, *, seed: int = 0) -> Basis:
    """The basis of at most ``rank`` columns a side for the updates of ``stack``, searched from many starts.

    Exact when ``rank`` reaches the stacked rank of the updates.
    """
    generator = torch.Generator().manual_seed(seed)
    if rank >= min(stack.bt.shape) and rank >= min(stack.a.shape):
        return _leading_basis(stack, rank, generator)  # lossless: nothing to search
    found = []
    for factor, least, most in _CORE_WIDTHS if rank <= _SMALL_RANK else _CORE_WIDTHS[:1]:
        wide = _leading_basis(stack, rank + max(least, min(int(factor * rank), most)), generator)
        rank_u, rank_v = min(rank, wide.u.shape[1]), min(rank, wide.v.shape[1])
        small = _search(stack.cores(*wide), rank_u, rank_v, generator)
        found += [climb(stack, Basis(wide.u @ u, wide.v @ v), rounds=_TRIAL_ROUNDS) for u, v in small]
    for rounds in (_TRIAL_ROUNDS, _CLIMB_ROUNDS):
        u, v = (torch.stack(side) for side in zip(*found, strict=True))
        reached = torch.tensor([objective(stack.cores(*basis)) for basis in found])
        found = [climb(stack, found[i], rounds=rounds) for i in _best_distinct(u, v, reached, _FINALISTS)]
    return max(found, key=lambda basis: objective(stack.cores(*basis)))


def hosvd(stack: Stack, rank: int, *, seed: int = 0) -> Basis:
    """The leading eigenvectors of Σ D_i D_iᵀ and Σ D_iᵀ D_i, to which `climb` adds the rest quickly."""
    return _leading_basis(stack, rank, torch.Generator().manual_seed(seed))


def objective(cores: Tensor) -> float:
    """Σ_i ‖Σ_i‖_F², what HOOI maximises."""
    return float(cores.double().square().sum())


def _leading_basis(stack: Stack, width: int, generator: torch.Generator) -> Basis:
    """Bases of ``width`` columns by randomised HOSVD (range finder of Halko, Martinsson and Tropp 2011, alg. 4.4)."""
    return Basis(
        _range(stack.bt, stack.times_left_gram, width, generator),
        _range(stack.a, stack.times_right_gram, width, generator),
    )


def _range(rows: Tensor, times_gram: Callable[[Tensor], Tensor], width: int, generator: torch.Generator) -> Tensor:
    count, size = rows.shape
    if size <= width:
        return torch.eye(size, dtype=rows.dtype, device=rows.device)
    if count <= width:
        return orthonormal(rows.mT)
    basis = torch.randn(size, width, generator=generator).to(rows)
    for _ in range(3):
        basis = orthonormal(times_gram(orthonormal(basis)))
    return basis


def _search(cores: Tensor, rank_u: int, rank_v: int, generator: torch.Generator) -> list[Basis]:
    """The best few bases [k, R_U], [l, R_V] of ``cores`` [n, k, l], out of the HOSVD's and many random starts.

    All climb together and the weak ones drop out on the way.
    """
    left, right = _unfolded(cores), _unfolded(cores.mT)
    count = max(1, min(24, 8192 // max(rank_u, rank_v) ** 2))  # optima get fewer, and rounds dearer, with the rank
    u, v = (_starts(side, rank, count, generator) for side, rank in ((left, rank_u), (right, rank_v)))
    for _ in range(_POWER_ROUNDS):  # the authors' iteration: cheaper a round than HOOI, and good enough to rank starts
        u = _power_step(left, v, u)
        v = _power_step(right, u, v)
    reached = (u.mT @ _half(left, v)).square().sum((1, 2))
    u, v, reached = _hooi(left, right, v[_best_distinct(u, v, reached, _SURVIVORS)], rank_u, _HOOI_ROUNDS)
    return [Basis(u[i], v[i]) for i in _best_distinct(u, v, reached, _FINALISTS)]


def _unfolded(cores: Tensor) -> Tensor:
    """``cores`` [n, k, l] as [k, n, l], so that all products with one side's basis are one matrix product."""
    return cores.transpose(0, 1).contiguous()


def _half(unfolded: Tensor, basis: Tensor) -> Tensor:
    """All C_i W side by side, of shape [s, k, n·r], for unfolded cores [k, n, l] and bases W [s, l, r]."""
    return (unfolded.flatten(0, 1) @ basis).reshape(len(basis), len(unfolded), -1)


def _starts(unfolded: Tensor, rank: int, count: int, generator: torch.Generator) -> Tensor:
    """The HOSVD's basis of the first side of unfolded cores [k, n, l], then random ones, [1 + count, k, rank]."""
    flat = unfolded.flatten(1)
    hosvd = _leading(flat @ flat.mT, rank)
    random = torch.randn(count, len(flat), rank, generator=generator).to(flat)
    return torch.cat([hosvd[None], orthonormal(random)])


def _best_distinct(u: Tensor, v: Tensor, reached: Tensor, count: int) -> list[int]:
    """The best of the bases U [s, k, R_U], V [s, l, R_V], less those that climb the same hill as a better one."""
    alike = (_distances(u) < _SAME) & (_distances(v) < _SAME)
    best: list[int] = []
    for i in reached.argsort(descending=True, stable=True).tolist():
        if len(best) < count and not alike[i, best].any():
            best.append(i)
    return best


def _distances(bases: Tensor) -> Tensor:
    """Σ sin² of the principal angles between every two of the bases [s, k, R], of shape [s, s]."""
    count, _, rank = bases.shape
    together = bases.mT.flatten(0, 1)
    return rank - (together @ together.mT).square().reshape(count, rank, count, rank).sum((1, 3))


def _power_step(unfolded: Tensor, other: Tensor, basis: Tensor) -> Tensor:
    """orth(Σ_i C_i W Wᵀ C_iᵀ Z), for the other side's basis W [s, l, r] and this side's Z [s, k, r]."""
    half = _half(unfolded, other)
    return orthonormal(half @ (half.mT @ basis))


def _hooi(left: Tensor, right: Tensor, v: Tensor, rank_u: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """HOOI (De Lathauwer et al. 2000) on unfolded cores [k, n, l] and [l, n, k] from starts V [s, l, R_V], batched.

    Returns U [s, k, R_U], V and the objective reached [s].
    """
    last = None
    for _ in range(rounds):
        half = _half(left, v)
        u = _leading(half @ half.mT, rank_u)
        half = _half(right, u)
        values, vectors = torch.linalg.eigh(half @ half.mT)
        v = vectors[..., -v.shape[-1] :]
        reached = values[..., -v.shape[-1] :].sum(-1)
        if last is not None and bool((reached - last <= _TOLERANCE * reached).all()):
            break
        last = reached
    return u, v, reached


def _leading(gram: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(gram).eigenvectors[..., -rank:]


def climb(stack: Stack, basis: Basis, *, rounds: int = _CLIMB_ROUNDS) -> Basis:
    """Climb from ``basis`` to the optimum near it; the objective never falls.

    Each round solves the problem exactly within the span of the basis, of its image under one power step (the
    gradient) and of the last round's move, as LOBPCG does for eigenvectors.
    """
    reached = objective(stack.cores(*basis))
    last_u, last_v = basis.u[:, :0], basis.v[:, :0]
    for _ in range(rounds):
        y, x = stack.bt @ basis.u, stack.a @ basis.v
        p = stack.blocks(x, y)
        wide = Basis(
            _span(basis.u, stack.bt.mT @ stack.spread(x, p), last_u),
            _span(basis.v, stack.a.mT @ stack.spread(y, p.mT), last_v),
        )
        cores = stack.cores(*wide)
        start = (wide.v.mT @ basis.v)[None]
        u, v, _ = _hooi(_unfolded(cores), _unfolded(cores.mT), start, basis.u.shape[1], _SMALL_ROUNDS)
        better = Basis(wide.u @ u[0], wide.v @ v[0])
        now = objective(stack.cores(*better))
        if now <= reached:
            return basis
        last_u, last_v = basis.u - better.u @ (better.u.mT @ basis.u), basis.v - better.v @ (better.v.mT @ basis.v)
        basis, gained, reached = better, now - reached, now
        if gained <= _TOLERANCE * reached:
            return basis
    return basis


def _span(*columns: Tensor) -> Tensor:
    """An orthonormal basis of all columns; the identity when they fill the space anyway."""
    together = torch.cat(columns, dim=1)
    size, count = together.shape
    if count >= size:
        return torch.eye(size, dtype=together.dtype, device=together.device)
    return orthonormal(together)
