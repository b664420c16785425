"""The encoder: what a bundle stores for one module, and what it costs.

Bases are rounded to the bundle's dtype first; cores are then solved by least squares against the rounded bases; every
squared error is of what is stored, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.progress import Share, part_of, unheard
from .batch import Batch
from .cp import solve_diag
from .cp_search import fit_diag
from .factored import Factors, squared_distance, truncated_svd
from .stack import ScaledStack, Stack
from .tucker import Basis, fit_joint_batch, hosvd, is_lossless, searched_together

_CANCELLED = 1e-9  # share of ‖D‖² below which the sum of _squared_errors has lost half of its digits


@dataclass(frozen=True)
class Shared:
    """One module of one cluster as it is stored; rows follow ``members``, the numbers of the adapters."""

    u: Tensor  # [d_out, R_U]
    v: Tensor  # [d_in, R_V]
    cores: Tensor  # [n, R_U, R_V], or [n, R] for diag
    members: tuple[int, ...]
    squared_errors: Tensor  # [n], float64: ‖D_i − D̂_i‖², infinite where the core does not fit in the dtype


def encode_joint(
    stacks: Sequence[ScaledStack],
    owners: Sequence[Tensor],
    weights: Sequence[Tensor],
    problems: int,
    *,
    rank: int,
    dtype: torch.dtype,
    seed: int,
    share: Share = unheard,
) -> list[Shared]:
    """Fit and store a basis for each of several problems: min Σ w_i ‖D_i − U Σ_i Vᵀ‖² over the updates D_i of each.

    For modules of one shape, all their updates that matter, ``owners`` [n] says which problem each belongs to (−1:
    none), and ``weights`` [n] holds the w_i; both in the order of the stacks. ``share`` is told how far it is.
    """
    if not problems:
        return []
    rows = torch.zeros(problems, dtype=torch.int64)
    for stack, owner in zip(stacks, owners, strict=True):
        kept = owner >= 0
        rows.index_add_(0, owner[kept], torch.tensor(stack.rows.ranks)[kept])
    d_out, d_in = stacks[0].rows.bt.shape[1], stacks[0].rows.a.shape[1]
    plain = torch.tensor([is_lossless(count, d_out, d_in, rank) for count in rows.tolist()])
    encoded: dict[int, Shared] = {}
    scales = [weight.sqrt() for weight in weights]
    device = stacks[0].rows.a.device
    for chosen in torch.split((~plain).nonzero()[:, 0], searched_together(rank, max(d_out, d_in), device)):
        if not len(chosen):
            break
        own = [_renumbered(owner, chosen, problems) for owner in owners]
        # Neither batch has a name here: only one of them is held at a time.
        with part_of(share, len(chosen) / problems) as of_chosen:
            basis = fit_joint_batch(Batch.of(stacks, own, len(chosen), scales), rank, seed=seed, share=of_chosen)
        shared = _encode_batch(Batch.exact(stacks, own, len(chosen)), Basis(*basis), dtype)
        encoded |= zip(chosen.tolist(), shared, strict=True)
    for problem in plain.nonzero()[:, 0].tolist():
        [(stack, owner)] = [each for each in zip(stacks, owners, strict=True) if (each[1] == problem).any()]
        stack = stack.select(
            {member for member, own in zip(stack.adapters, owner.tolist(), strict=True) if own == problem}
        )
        u, v = hosvd(stack.rows.to(torch.float32), rank)  # of the span alone, whatever the factors are
        encoded[problem] = project_joint(stack, u.to(dtype), v.to(dtype))
    return [encoded[problem] for problem in range(problems)]


def _renumbered(owner: Tensor, chosen: Tensor, problems: int) -> Tensor:
    """``owner`` with the ``chosen`` problems numbered anew, and −1 for the others."""
    number = torch.full((problems + 1,), -1)  # the last is that of −1
    number[chosen] = torch.arange(len(chosen))
    return number[owner]


def _encode_batch(batch: Batch, basis: Basis, dtype: torch.dtype) -> list[Shared]:
    u, v = (side.to(dtype) for side in basis)
    cores, errors = batch.encoded(u, v, lambda exact: exact.to(dtype))
    u, v, cores, errors = (each.cpu() for each in (u, v, cores, errors))
    cores, errors = _without_overflow(cores, errors)
    sizes = torch.bincount(batch.owners, minlength=batch.problems).tolist()
    pieces = (torch.split(each, sizes) for each in (batch.adapters, cores, errors))
    return [
        Shared(u[problem], v[problem], core, tuple(members.tolist()), error)
        for problem, (members, core, error) in enumerate(zip(*pieces, strict=True))
    ]


def encode_diag(
    stack: ScaledStack, weights: Tensor, *, rank: int, dtype: torch.dtype, seed: int, share: Share = unheard
) -> Shared:
    """Fit a basis with diagonal cores to the updates D_i with ``weights`` [n] w_i, and store it."""
    fitted = fit_diag(stack.scaled(weights.sqrt()), rank, seed=seed, share=share)
    u, v = (side.to(dtype) for side in fitted)
    return project_diag(stack, u, v)


def project_joint(stack: ScaledStack, u: Tensor, v: Tensor) -> Shared:
    """The full cores that fit given bases U [d_out, R_U] and V [d_in, R_V] best, stored in the dtype of these.

    Σ_i = (UᵀU)⁻¹ Uᵀ D_i V (VᵀV)⁻¹, by least squares in float64, so that U and V need not be quite orthonormal.
    """
    alone = torch.zeros(len(stack.adapters), dtype=torch.int64)
    return _encode_batch(Batch.exact([stack], [alone], 1), Basis(u[None], v[None]), u.dtype)[0]


def project_diag(stack: ScaledStack, u: Tensor, v: Tensor) -> Shared:
    """The diagonal cores that fit given bases U [d_out, R] and V [d_in, R] best, stored in the dtype of these.

    diag Σ_i = [(UᵀU) ∘ (VᵀV)]⁻¹ diag(Uᵀ D_i V), by least squares in float64.
    """
    exact, exact_u, exact_v = stack.exact(), u.double(), v.double()
    cores = _diag_cores(exact, exact_u, exact_v).to(u.dtype)
    errors = _squared_errors(exact, exact_u, exact_v, cores.double())
    cores, errors = _without_overflow(cores.cpu(), errors.cpu())
    order = sorted(range(len(stack.adapters)), key=stack.adapters.__getitem__)
    members = tuple(stack.adapters[i] for i in order)
    return Shared(u.cpu(), v.cpu(), cores[order], members, errors[order])


def encode_diag_problems(
    stacks: Sequence[ScaledStack],
    owners: Sequence[Tensor],
    weights: Sequence[Tensor],
    problems: int,
    *,
    rank: int,
    dtype: torch.dtype,
    seed: int,
    share: Share = unheard,
) -> list[Shared]:
    """`encode_diag` for each of several problems, one after another; arguments as those of `encode_joint`."""
    found: dict[int, Shared] = {}
    for stack, owner, weight in zip(stacks, owners, weights, strict=True):
        for problem in torch.unique(owner[owner >= 0]).tolist():
            own = owner == problem
            some = stack.select({stack.adapters[i] for i in own.nonzero()[:, 0].tolist()})
            with part_of(share, 1 / problems) as of_one:
                found[problem] = encode_diag(some, weight[own], rank=rank, dtype=dtype, seed=seed, share=of_one)
    return [found[problem] for problem in range(problems)]


def _without_overflow(cores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """``cores`` [n, ...] and ``errors`` [n], with zero and infinity for an update whose core the dtype cannot hold."""
    held = cores.isfinite().flatten(1).all(1)
    if held.all():
        return cores, errors
    return cores.where(held.reshape(-1, *[1] * (cores.ndim - 1)), 0), errors.where(held, torch.inf)


def encode_individual(b: Tensor, a: Tensor, rank: int, dtype: torch.dtype) -> tuple[Factors, Tensor]:
    """Truncated SVDs of a batch of updates as stored: (B̂ [..., d_out, k], Â [..., k, d_in]) and ‖D − B̂ Â‖² [...].

    The error is infinite where B̂ does not fit in ``dtype``.
    """
    _, vt = truncated_svd(b, a, rank)
    stored_a = vt.to(dtype)
    a64 = stored_a.double()
    # B̂ = D Âᵀ (Â Âᵀ)⁻¹, through D = B A; a direction without energy has a row of Â all the same, so this is solvable.
    b64 = torch.linalg.solve(a64 @ a64.mT, (b.double() @ (a.double() @ a64.mT)).mT).mT
    stored_b = b64.to(dtype)
    held = stored_b.isfinite().flatten(-2).all(-1)
    stored_b = stored_b.where(held[..., None, None], 0)
    return (stored_b, stored_a), squared_distance((b, a), (stored_b, stored_a)).where(held, torch.inf)


def _diag_cores(stack: Stack, u: Tensor, v: Tensor) -> Tensor:
    """The diagonals of the optimal Σ_i, of shape [n, R]."""
    return solve_diag(stack.sums((stack.bt @ u) * (stack.a @ v)), u, v)


def _squared_errors(stack: Stack, u: Tensor, v: Tensor, cores: Tensor) -> Tensor:
    """‖D_i − U Σ_i Vᵀ‖² = ‖D_i‖² − 2⟨Uᵀ D_i V, Σ_i⟩ + ⟨UᵀU Σ_i, Σ_i VᵀV⟩ with Σ_i = diag(cores_i), in float64, [n]."""
    norms = stack.squared_norms()
    full = torch.diag_embed(cores)
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
