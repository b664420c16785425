"""Alternating least squares for CP decompositions of a stack, many of them at once (Harshman 1970; Bro 1998).

A decomposition is D_i ≈ U diag(c_i) Vᵀ with unit columns; U is [..., d_out, R], V is [..., d_in, R], and the c_i
[..., n, R] are always the best ones for U and V, so they are no state. Large products run in the dtype of the stack,
and everything R×R in float64, since Gram matrices of nearly parallel columns have small eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.stopping import check_stop
from .stack import Stack

# Of the mean of a Gram matrix's diagonal. It keeps nearly parallel columns from being used with large coefficients that
# cancel, which costs more in rounding than it gains: bf16 coefficients have an error of about 10⁻⁶ of their square.
RIDGE = 1e-6


def solve_diag(projections: Tensor, u: Tensor, v: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """The optimal diagonals c_i = [(UᵀU) ∘ (VᵀV)]⁻¹ p_i, for ``projections`` p_i = diag(Uᵀ D_i V), [..., n, R]."""
    return _solve(_gram(u) * _gram(v), projections, ridge)


def project(stack: Stack, u: Tensor, v: Tensor) -> Tensor:
    """diag(Uᵀ D_i V) for U [s, d_out, R] and V [s, d_in, R], of shape [s, n, R]."""
    return _apart(stack.sums(_times(stack.bt, u) * _times(stack.a, v)), len(u))


def captured(stack: Stack, u: Tensor, v: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """Σ_i ‖D_i‖² − ‖D_i − U diag(c_i) Vᵀ‖² at the optimal c_i, for s decompositions at once, of shape [s]."""
    projections = project(stack, u, v)
    return (projections.double() * solve_diag(projections, u, v, ridge=ridge)).sum((1, 2))


def als_round(stack: Stack, u: Tensor, v: Tensor, *, ridge: float = RIDGE) -> tuple[Tensor, Tensor, Tensor]:
    """One round of ALS from unit columns U [s, d_out, R] and V [s, d_in, R]: what these capture [s], and better U, V.

    U = (Σ D_i V diag(c_i)) [(VᵀV) ∘ (CᵀC)]⁻¹, then V likewise with the new U.
    """
    check_stop()
    count = len(u)
    y, x = _times(stack.bt, u), _times(stack.a, v)
    projections = _apart(stack.sums(y * x), count)
    c = solve_diag(projections, u, v, ridge=ridge)
    reached = (projections.double() * c).sum((1, 2))
    rows, shared = stack.per_row(_together(c)), _gram(c)
    u = unit(_solve(_gram(v) * shared, _apart(stack.bt.mT @ (x * rows), count), ridge))
    v = unit(_solve(_gram(u) * shared, _apart(stack.a.mT @ (_times(stack.bt, u) * rows), count), ridge))
    return reached, u, v


def prune(stack: Stack, u: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` most useful columns of U [s, d_out, M] and V [s, d_in, M], by backward elimination.

    Without component j the error grows by ‖c_j‖² / (G⁻¹)_jj, G = (UᵀU) ∘ (VᵀV). The least useful one goes, and G⁻¹
    and all c are those of the others by a rank-1 update, so that a step costs no solve.
    """
    starts = torch.arange(len(u), device=u.device)
    gram = _gram(u) * _gram(v)
    inverse = torch.linalg.inv(_ridged(gram, RIDGE))
    c = inverse @ project(stack, u, v).double().mT  # [s, M, n]
    gone = torch.zeros(gram.shape[:2], dtype=gram.dtype, device=u.device)
    for _ in range(u.shape[2] - rank):
        check_stop()
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        worst = (c.square().sum(2) / diagonal + gone).argmin(1)
        column = inverse[starts, worst]
        share = column / column[starts, worst][:, None]
        c = c - share[:, :, None] * c[starts, worst][:, None]
        inverse = inverse - column[:, :, None] * share[:, None]
        inverse[starts, worst, worst] = 1  # its row and column are zero now
        gone[starts, worst] = torch.inf
    kept = gone.argsort(dim=1, stable=True)[:, None, :rank]
    return u.gather(2, kept.expand(-1, u.shape[1], -1)), v.gather(2, kept.expand(-1, v.shape[1], -1))


def unit(x: Tensor) -> Tensor:
    """``x`` with columns of unit norm; a column that vanished, as all do where every update is zero, becomes e₁."""
    norm = x.norm(dim=-2, keepdim=True)
    first = torch.zeros_like(x)
    first[..., 0, :] = 1
    return torch.where(norm > 0, x / norm, first)


def _solve(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    """T G⁻¹ for T [..., m, R], in the dtype of T."""
    return (target.double() @ torch.linalg.inv(_ridged(gram, ridge))).to(target.dtype)


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    """G + λ I with λ = ``ridge`` · mean diagonal of G [..., R, R], or a tiny number where G is zero."""
    size = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    return gram + size[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _gram(x: Tensor) -> Tensor:
    """XᵀX in float64, [..., R, R]."""
    x = x.double()
    return x.mT @ x


def _times(rows: Tensor, x: Tensor) -> Tensor:
    """One product for all decompositions: rows [S, d] times X [s, d, R], as [S, s·R]."""
    return rows @ _together(x)


def _together(x: Tensor) -> Tensor:
    """[s, m, R] as [m, s·R]."""
    return x.permute(1, 0, 2).flatten(1)


def _apart(x: Tensor, count: int) -> Tensor:
    """[m, s·R] as [s, m, R]."""
    return x.reshape(len(x), count, -1).permute(1, 0, 2)
