"""One basis with diagonal cores (JD-Diag of "Compress then Serve"): a CP decomposition, by alternating least squares.

min Σ_i ‖D_i − U diag(c_i) Vᵀ‖² over U [d_out, R], V [d_in, R] with unit columns and c_i [R]. Here the columns need not
be orthogonal. Weights are the caller's, as in `joint`.

Searched first on the small cores of a joint basis, from several starts at once (Bro and Andersson 1998), then polished
on the updates themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .joint import Basis, climb, hosvd
from .stack import Stack

_STARTS = 8
_CORE_ROUNDS = 100
_ROUNDS = 200
_TOLERANCE = 1e-6  # of Σ‖D_i‖², per round
_RIDGE = 1e-6  # of the mean of a Gram matrix's diagonal: keeps nearly parallel columns from diverging


def fit_diag(stack: Stack, rank: int, *, seed: int = 0) -> Basis:
    """U [d_out, R] and V [d_in, R] with unit columns, R = ``rank`` or the stacked rank if that is less."""
    rank = min(rank, len(stack.a))
    generator = torch.Generator().manual_seed(seed)
    wide = climb(stack, hosvd(stack, rank + min(rank, 16), seed=seed))
    u, v = _search(stack.cores(*wide), rank, generator)
    return _polish(stack, wide.u @ u, wide.v @ v)


def solve_diag(projections: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The optimal diagonals c_i = [(UᵀU) ∘ (VᵀV)]⁻¹ p_i, for ``projections`` p_i = diag(Uᵀ D_i V), [..., n, R]."""
    return torch.linalg.solve(_ridged((u.mT @ u) * (v.mT @ v)), projections.mT).mT


def _search(cores: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The best of several starts of ALS on cores [n, k, l]: U [k, R] and V [l, R]."""
    left, right = cores.shape[1:]
    u = torch.randn(_STARTS, left, rank, generator=generator).to(cores)
    v = torch.randn(_STARTS, right, rank, generator=generator).to(cores)
    # Leading joint directions, paired: the start of Jennrich-like collections whose cores are nearly diagonal.
    u[0], v[0] = torch.eye(left, rank).to(cores), torch.eye(right, rank).to(cores)
    for _ in range(_CORE_ROUNDS):
        u, v = _unit(u), _unit(v)
        c = solve_diag(torch.einsum("nkl,skr,slr->snr", cores, u, v), u, v)
        u = _solve_side(torch.einsum("nkl,slr,snr->skr", cores, v, c), v, c)
        v = _solve_side(torch.einsum("nkl,skr,snr->slr", cores, u, c), u, c)
    u, v = _unit(u), _unit(v)
    projections = torch.einsum("nkl,skr,slr->snr", cores, u, v)
    best = int(_captured(projections, u, v).argmax())
    return u[best], v[best]


def _polish(stack: Stack, u: Tensor, v: Tensor) -> Basis:
    total, last = float(stack.squared_norms().sum()), -1.0
    for _ in range(_ROUNDS):
        u, v = _unit(u), _unit(v)
        y, x = stack.bt @ u, stack.a @ v
        projections = stack.sums(y * x)
        captured = float(_captured(projections, u, v))
        if captured - last <= _TOLERANCE * total:
            break
        last = captured
        c = solve_diag(projections, u, v)
        rows = stack.per_row(c)
        u = _solve_side(stack.bt.mT @ (x * rows), v, c)
        v = _solve_side(stack.a.mT @ (stack.bt @ u * rows), u, c)
    return Basis(_unit(u), _unit(v))


def _captured(projections: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Σ_i ‖D_i‖² − ‖D_i − U diag(c_i) Vᵀ‖² at the optimal c_i, of shape [...]."""
    return (projections * solve_diag(projections, u, v)).sum((-2, -1))


def _solve_side(target: Tensor, other: Tensor, c: Tensor) -> Tensor:
    """The best side for the other one W: target · [(WᵀW) ∘ (CᵀC)]⁻¹, with target = Σ_i D_i W diag(c_i)."""
    return torch.linalg.solve(_ridged((other.mT @ other) * (c.mT @ c)), target.mT).mT


def _ridged(gram: Tensor) -> Tensor:
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _unit(x: Tensor) -> Tensor:
    """``x`` with columns of unit norm; a column that vanished, as all do where every update is zero, becomes e₁."""
    norm = x.norm(dim=-2, keepdim=True)
    first = torch.zeros_like(x)
    first[..., 0, :] = 1
    return torch.where(norm > 0, x / norm, first)
