"""The encoder: what a bundle stores for one module, and what it costs.

Bases are rounded to the bundle's dtype first; cores are then solved by least squares against the rounded bases; every
squared error is of what is stored, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .cp import solve_diag
from .diag import fit_diag
from .errors import LocalError
from .joint import fit_joint
from .linalg import Factors, squared_distance, truncated_svd
from .stack import Stack

_CANCELLED = 1e-9  # share of ‖D‖² below which the sum of _squared_errors has lost half of its digits


@dataclass(frozen=True)
class Shared:
    """One module of one cluster as it is stored; rows follow ``members``, the numbers of the adapters."""

    u: Tensor  # [d_out, R_U]
    v: Tensor  # [d_in, R_V]
    cores: Tensor  # [n, R_U, R_V], or [n, R] for diag
    members: tuple[int, ...]
    squared_errors: Tensor  # [n], float64: ‖D_i − D̂_i‖²

    def only(self, wanted: set[int]) -> Shared:
        """The same for the adapters whose numbers are in ``wanted``."""
        rows = [row for row, member in enumerate(self.members) if member in wanted]
        members = tuple(self.members[row] for row in rows)
        return Shared(self.u, self.v, self.cores[rows], members, self.squared_errors[rows])


def encode_shared(
    stack: Stack, weights: Tensor, *, method: Literal["joint", "diag"], rank: int, dtype: torch.dtype, seed: int
) -> Shared:
    """Fit a basis to the updates D_i with ``weights`` [n] w_i, and store it: min Σ w_i ‖D_i − U Σ_i Vᵀ‖²."""
    weighted = stack.scaled(weights.sqrt())
    basis = (fit_joint if method == "joint" else fit_diag)(weighted, rank, seed=seed)
    u, v = (side.to(dtype) for side in basis)
    exact, exact_u, exact_v = stack.to(torch.float64), u.double(), v.double()
    solve = _joint_cores if method == "joint" else _diag_cores
    cores = _stored(solve(exact, exact_u, exact_v), dtype)
    errors = _squared_errors(exact, exact_u, exact_v, cores.double())
    order = sorted(range(len(stack.members)), key=stack.members.__getitem__)
    members = tuple(stack.members[i] for i in order)
    return Shared(u.cpu(), v.cpu(), cores[order].cpu(), members, errors[order].cpu())


def encode_individual(b: Tensor, a: Tensor, rank: int, dtype: torch.dtype) -> tuple[Factors, Tensor]:
    """Truncated SVDs of a batch of updates as stored: (B̂ [..., d_out, k], Â [..., k, d_in]) and ‖D − B̂ Â‖² [...]."""
    _, vt = truncated_svd(b, a, rank)
    stored_a = _stored(vt, dtype)
    a64 = stored_a.double()
    # B̂ = D Âᵀ (Â Âᵀ)⁻¹, through D = B A; a direction without energy has a row of Â all the same, so this is solvable.
    b64 = torch.linalg.solve(a64 @ a64.mT, (b.double() @ (a.double() @ a64.mT)).mT).mT
    stored_b = _stored(b64, dtype)
    return (stored_b, stored_a), squared_distance((b, a), (stored_b, stored_a))


def _joint_cores(stack: Stack, u: Tensor, v: Tensor) -> Tensor:
    """Σ_i = (UᵀU)⁻¹ Uᵀ D_i V (VᵀV)⁻¹, of shape [n, R_U, R_V]; rounding left the bases not quite orthonormal."""
    left = torch.linalg.solve(u.mT @ u, stack.cores(u, v))
    return torch.linalg.solve(v.mT @ v, left.mT).mT


def _diag_cores(stack: Stack, u: Tensor, v: Tensor) -> Tensor:
    """The diagonals of the optimal Σ_i, of shape [n, R]."""
    return solve_diag(stack.sums((stack.bt @ u) * (stack.a @ v)), u, v)


def _squared_errors(stack: Stack, u: Tensor, v: Tensor, cores: Tensor) -> Tensor:
    """‖D_i − U Σ_i Vᵀ‖² = ‖D_i‖² − 2⟨Uᵀ D_i V, Σ_i⟩ + ⟨UᵀU Σ_i, Σ_i VᵀV⟩, in float64, of shape [n]."""
    norms = stack.squared_norms()
    full = torch.diag_embed(cores) if cores.ndim == 2 else cores
    inner = (stack.cores(u, v) * full).sum((1, 2))
    errors = norms - 2 * inner + ((u.mT @ u @ full) * (full @ (v.mT @ v))).sum((1, 2))
    close = errors <= _CANCELLED * norms
    if close.any():
        for b, a, members in stack.factors():
            wanted = close[members]
            if wanted.any():
                approximate = u @ full[members][wanted], v.mT.expand(int(wanted.sum()), -1, -1)
                errors[torch.arange(len(errors), device=errors.device)[members][wanted]] = squared_distance(
                    (b[wanted], a[wanted]), approximate
                )
    return errors


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    stored = x.to(dtype)
    if not torch.isfinite(stored).all():
        raise LocalError(f"a value of {float(x.abs().max()):.3g} does not fit in {dtype}", "use --dtype bf16 or f32")
    return stored
