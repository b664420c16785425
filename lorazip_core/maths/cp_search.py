"""One basis with diagonal cores (JD-Diag of "Compress then Serve"): a CP decomposition, bred from many starts.

min Σ_i ‖D_i − U diag(c_i) Vᵀ‖² over U [d_out, R], V [d_in, R] with unit columns and c_i [R]. Here the columns need not
be orthogonal. A weighted sum is made as in `tucker`.

Alternating least squares converges quickly here, but to one of very many optima, which differ by several percent. A
component is of use or not whatever the others are, nearly, so good decompositions have good components in common: a
population of them on small cores is crossed (the components of two, without the least useful half) until no child is
better. The best few are then polished on the updates themselves.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ..base.progress import Share, part_of, unheard
from .cp import als_round, captured, prune, unit
from .factored import truncated_svd
from .stack import Stack
from .tucker import Basis, climb, hosvd

_WIDER = 48  # columns of the cores to search on, more than the rank
_POPULATION = 24
_SMALL_RANK = 32  # above it the population shrinks, since its work grows with the rank
_WARM, _JOINT_ROUNDS = 4, 3  # starts from the joint solution, and rounds of climbing to it
_FIRST_ROUNDS, _CHILD_ROUNDS = 6, 4
_GENERATIONS, _PATIENCE = 40, 2
_FINALISTS, _TRIAL_ROUNDS = 3, 8
_ROUNDS = 200
_MEMORY = 5  # moves that an extrapolation of the polish looks back on
_SAME = 1e-5  # of the objective: less between two decompositions, and they are taken for the same
_TOLERANCE, _CALM = 1e-8, 3  # of the objective, per round of the polish, for some rounds
_LOST = 1e-3  # of the error, likewise: where next to nothing is lost, half of that is still to be won
_POLISH_RIDGE = 1e-10
_OF_BREEDING, _OF_POLISH = 0.7, 0.3  # about how the time of a fit is shared
_OF_REST = 0.2  # how much of what is left is told as done by a round, where it is not known how many there will be


def fit_diag(stack: Stack, rank: int, *, seed: int = 0, share: Share = unheard) -> Basis:
    """U [d_out, R] and V [d_in, R] with unit columns; R is ``rank``, or how many rows the stack has if that is less.

    ``share`` is told how far it is.
    """
    rank = min(rank, len(stack.a))
    exact = stack.to(torch.float64)
    energy = exact.squared_norms().sum()
    if not energy > 0:
        return Basis(*(unit(side.new_zeros(side.shape[1], rank)) for side in (stack.bt, stack.a)))
    exact = exact.scaled(energy.rsqrt().expand(len(stack.adapters)))
    if rank == len(stack.a):
        u, v = own_components(exact, rank)  # lossless: nothing to search
    else:
        with part_of(share, _OF_BREEDING) as own:
            start = _finalist(exact.to(stack.a.dtype), rank, seed, own)
        with part_of(share, _OF_POLISH) as own:
            u, v = polish(exact, *start, share=own)
    return Basis(u.to(stack.bt), v.to(stack.a))


def own_components(stack: Stack, rank: int) -> Basis:
    """The ``rank`` largest of all singular triplets of all updates: lossless with all, and the best for one update."""
    us, vt = [], []
    for b, a, _ in stack.factors():
        left, right = truncated_svd(b, a, a.shape[1])
        us.append(left.mT.flatten(0, 1))
        vt.append(right.flatten(0, 1))
    left, right = torch.cat(us), torch.cat(vt)
    largest = left.norm(dim=1).argsort(descending=True, stable=True)[:rank]
    return Basis(unit(left[largest].mT), unit(right[largest].mT))


def polish(stack: Stack, u: Tensor, v: Tensor, *, share: Share = unheard) -> Basis:
    """Climb from U [d_out, R] and V [d_in, R] to the optimum near them; the objective never falls.

    ALS, extrapolated from the last few rounds (Anderson 1965): the combination of their moves that leaves the least of
    them. A round whose start turns out worse than the last one's is taken back and goes without.
    """
    u, v = u[None], v[None]
    energy, plain, reached, quiet = float(stack.squared_norms().sum()), (u, v), -torch.inf, 0
    best = Basis(u[0], v[0])
    moves: deque[tuple[Tensor, Tensor]] = deque(maxlen=_MEMORY)
    last: tuple[Tensor, Tensor] | None = None
    for round_ in range(_ROUNDS):
        share(_OF_REST * (1 - _OF_REST) ** round_)
        now, next_u, next_v = als_round(stack, u, v, ridge=_POLISH_RIDGE)
        if float(now) < reached and last is not None:
            u, v = plain
            moves.clear()
            last = None
            now, next_u, next_v = als_round(stack, u, v, ridge=_POLISH_RIDGE)
        if float(now) < reached:
            break
        quiet = quiet + 1 if float(now) - reached <= min(_TOLERANCE * energy, _LOST * (energy - float(now))) else 0
        reached, best, plain = float(now), Basis(u[0], v[0]), (next_u, next_v)
        if quiet == _CALM:
            break
        arrived = torch.cat([next_u[0], next_v[0]]).flatten()
        moved = arrived - torch.cat([u[0], v[0]]).flatten()
        if last is not None:
            moves.append((moved - last[0], arrived - last[1]))
        last = moved, arrived
        guess = _extrapolate(moved, arrived, moves).reshape(-1, u.shape[2])
        u, v = unit(guess[None, : u.shape[1]]), unit(guess[None, u.shape[1] :])
    return best


def _extrapolate(moved: Tensor, arrived: Tensor, moves: deque[tuple[Tensor, Tensor]]) -> Tensor:
    if not moves:
        return arrived
    of_moves, of_arrivals = (torch.stack(each) for each in zip(*moves, strict=True))
    gram = of_moves @ of_moves.mT
    gram.diagonal().add_(1e-10 * gram.trace() + torch.finfo(gram.dtype).tiny)
    return arrived - torch.linalg.solve(gram, of_moves @ moved) @ of_arrivals


def _finalist(stack: Stack, rank: int, seed: int, share: Share) -> tuple[Tensor, Tensor]:
    """The best of the search, once the best few have had some rounds on the updates themselves."""
    wide = hosvd(stack, rank + _WIDER, seed=seed)
    small = Stack(stack.bt @ wide.u, stack.a @ wide.v, stack.adapters, stack.groups)
    u, v = _breed(small, rank, torch.Generator().manual_seed(seed), share)
    u, v = wide.u @ u[:_FINALISTS], wide.v @ v[:_FINALISTS]
    for _ in range(_TRIAL_ROUNDS):
        _, u, v = als_round(stack, u, v)
    best = int(captured(stack, u, v).argmax())
    return u[best].double(), v[best].double()


def _breed(stack: Stack, rank: int, generator: torch.Generator, share: Share) -> tuple[Tensor, Tensor]:
    """A population of decompositions U [s, d_out, R], V [s, d_in, R], the best first, when no child is better any more.

    A child has the components of two parents, but for the least useful half of them.
    """
    size = max(8, _POPULATION * _SMALL_RANK // max(rank, _SMALL_RANK))
    u, v = _starts(stack, rank, size, generator)
    for _ in range(_FIRST_ROUNDS):
        _, u, v = als_round(stack, u, v)
    reached, quiet = captured(stack, u, v), 0
    for generation in range(_GENERATIONS):
        share(_OF_REST * (1 - _OF_REST) ** generation)
        one = torch.randint(size, (size,), generator=generator)
        other = (one + torch.randint(1, size, (size,), generator=generator)) % size
        both = torch.cat([u[one], u[other]], dim=2), torch.cat([v[one], v[other]], dim=2)
        child_u, child_v = prune(stack, *both, rank)
        for _ in range(_CHILD_ROUNDS):
            _, child_u, child_v = als_round(stack, child_u, child_v)
        before = float(reached.max())
        u, v, reached = _fittest(
            torch.cat([u, child_u]),
            torch.cat([v, child_v]),
            torch.cat([reached, captured(stack, child_u, child_v)]),
            size,
        )
        quiet = quiet + 1 if float(reached[0]) - before <= _SAME * before else 0
        if quiet == _PATIENCE:
            break
    return u, v


def _fittest(u: Tensor, v: Tensor, reached: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``size``, those first that differ: a population of copies breeds nothing new."""
    order = reached.argsort(descending=True, stable=True)
    ranked = reached[order]
    copies = torch.zeros_like(order)
    copies[1:] = ranked[:-1] - ranked[1:] <= _SAME * ranked[0]
    order = order[copies.argsort(stable=True)][:size]
    return u[order], v[order], reached[order]


def _starts(stack: Stack, rank: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One start from the updates' own singular vectors, some from the joint solution, and random ones.

    A mixture Σ g_i Σ_i of the joint cores is diagonal in its own singular vectors; these are the right ones for all
    cores where one pair of rotations makes all of them diagonal.
    """
    u, v = (_random(side, count, rank, generator) for side in (stack.bt, stack.a))
    own = own_components(stack, rank)  # fewer than the rank where adapters have a higher one than a side has dimensions
    u[0, :, : own.u.shape[1]], v[0, :, : own.v.shape[1]] = own
    joint = climb(stack, hosvd(stack, rank), rounds=_JOINT_ROUNDS)
    cores = stack.cores(*joint)
    mixtures = torch.randn(_WARM, len(cores), generator=generator).to(cores)
    left, _, right = torch.linalg.svd(torch.einsum("sn,nkl->skl", mixtures, cores), full_matrices=False)
    width = left.shape[2]  # less than the rank where a side has fewer dimensions
    u[1 : 1 + _WARM, :, :width], v[1 : 1 + _WARM, :, :width] = joint.u @ left, joint.v @ right.mT
    return u, v


def _random(rows: Tensor, count: int, rank: int, generator: torch.Generator) -> Tensor:
    return unit(torch.randn(count, rows.shape[1], rank, generator=generator).to(rows))
