"""One basis for many updates (JD-Full of "Compress then Serve", arXiv 2407.00066): Tucker-2, fitted by HOOI.

max over UᵀU = VᵀV = I of Σ_i ‖Uᵀ D_i V‖², which is min Σ_i ‖D_i − U Σ_i Vᵀ‖² with the optimal Σ_i = Uᵀ D_i V. For a
weighted sum, the caller multiplies every update by the square root of its weight.

The problem has many local optima, and plain HOOI on the d×d problem is slow. Here every search happens on small cores:
project the updates on generous bases of a few times the rank, search there from many starts, lift the best one, and
let it climb in the span of the basis and its gradient until the objective stands still.

All problems of a batch go through this together. Every subspace is found by power steps and Cholesky QR, which are
products for all problems at once, where eigenvectors would be computed one problem after another on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..base.progress import Share, part_of, unheard
from ..base.stopping import check_stop
from .batch import Batch
from .cores import Cores
from .factored import cholesky_qr
from .stack import Stack

_RANGE_ROUNDS = 3
_SMALL_RANK = 24
_LEAST_STARTS, _LARGE_RANK_ROUNDS = 3, 8  # optima get fewer, and rounds dearer, with the rank
_CLIMB_ROUNDS = 60
_SMALL_ROUNDS = 4  # of the problem within the span that a round of climbing looks at
_POWER_STEPS = 2  # a half-step of HOOI
_SAME = 0.1  # Σ sin² of the principal angles below which two bases are on the way to one optimum
_TIE = 1e-6  # of the objective: what decides between two bases is more than rounding
_TOLERANCE = 1e-7  # of the objective, per round
_ORTHONORMAL = 1e-5  # of the unit matrix: what differs more is no basis yet
# Of problems that are searched together: elements in the Gram matrices of all starts, and in the bases around them.
_SEARCHED_ON_CPU, _SEARCHED_ON_GPU = 2**21, 2**27
# About how the time of a fit is shared: all corners, in each the rounds of all starts, the finals, and the last climb.
_OF_SEARCH, _OF_STARTS, _OF_FINALS, _OF_CLIMB = 0.55, 0.8, 0.2, 0.25
_FEW = 0.7  # of the problems that still climb, and the batch goes on with these alone


class _Corner(NamedTuple):
    """The first f·R rows and columns of the cores, within bounds, more than R; and how many random starts go there."""

    wider: float
    least: int
    most: int
    starts: int

    def width(self, rank: int) -> int:
        return rank + max(self.least, min(int(self.wider * rank), self.most))


# How far the search goes. Bases that drop out on the way make room for rounds of those that are left. On 32 real
# adapters a third corner, more starts, rounds and finalists took five times as long, for at most 0.02% of the mean
# error; fewer starts than these have cost the worst adapter 5%.
_CORNERS = _Corner(1.5, 8, 48, 24), _Corner(2.5, 16, 64, 12)  # at a small rank; a large one has the first alone
_ROUNDS, _SURVIVORS = 9, 5  # of all starts, and those that go on
_SURVIVOR_ROUNDS, _CORNER_FINALISTS = 6, 2
_FINAL_ROUNDS = 12  # on all of the cores, for the finalists of all corners
_LAST_TOLERANCE = 1e-6  # of the objective, per round of the last climb


def search_size(rank: int) -> tuple[int, int]:
    """Columns a side of the cores that are searched for bases of ``rank``, and the starts there, at the most."""
    corners = _corners(rank)
    return max(corner.width(rank) for corner in corners), 1 + max(_start_count(corner, rank) for corner in corners)


def _corners(rank: int) -> tuple[_Corner, ...]:
    """Where the search for bases of ``rank`` goes: at a small rank, optima differ in the width that they need."""
    return _CORNERS if rank <= _SMALL_RANK else _CORNERS[:1]


def searched_together(rank: int, longest: int, device: torch.device) -> int:
    """How many problems of sides up to ``longest`` to give to `fit_joint_batch` at once, so that memory is bounded.

    On a CPU it is the Gram matrices of the search that take most of it, and on a GPU the bases around them.
    """
    width, starts = search_size(rank)
    if device.type == "cpu":
        return max(1, _SEARCHED_ON_CPU // (starts * width**2))
    return max(1, _SEARCHED_ON_GPU // (width * longest))


class Basis(NamedTuple):
    """U [..., d_out, R_U] and V [..., d_in, R_V] with orthonormal columns; R_U = R_V = R unless a side has fewer
    dimensions."""

    u: Tensor
    v: Tensor


def fit_joint(stack: Stack, rank: int, *, seed: int = 0) -> Basis:
    """The basis of at most ``rank`` columns a side for the updates of ``stack``, searched from many starts.

    Exact when ``rank`` reaches the stacked rank of the updates.
    """
    if is_lossless(len(stack.a), stack.bt.shape[1], stack.a.shape[1], rank):
        return hosvd(stack, rank)
    u, v = fit_joint_batch(Batch.of_stack(stack), rank, seed=seed)
    return Basis(u[0], v[0])


def is_lossless(rows: int, d_out: int, d_in: int, rank: int) -> bool:
    """Whether bases of ``rank`` columns hold whatever updates have so many ``rows`` together: no search is needed."""
    return rank >= min(rows, d_out) and rank >= min(rows, d_in)


def fit_joint_batch(batch: Batch, rank: int, *, seed: int = 0, share: Share = unheard) -> Basis:
    """What `fit_joint` finds for every problem: U [P, d_out, R_U] and V [P, d_in, R_V].

    Every problem must have more rows than ``rank``. What is found for one does not depend on the others, but for
    rounding. ``share`` is told how far it is.
    """
    generator = torch.Generator().manual_seed(seed)
    corners = _corners(rank)
    wide = _leading_basis(batch, corners[-1].width(rank), generator)
    cores = batch.chunked_cores(*wide)
    ranks = min(rank, batch.shape[0]), min(rank, batch.shape[1])
    found = []
    for corner in corners:
        with part_of(share, _OF_SEARCH / len(corners)) as own:
            found.append(_search(cores, corner, ranks, generator, own))
    u, v = (torch.cat(side, 1) for side in zip(*found, strict=True))
    with part_of(share, _OF_FINALS) as own:
        u, v, reached = _hooi(cores, u, v, _FINAL_ROUNDS, own)
    u, v = _best_distinct(u, v, reached, 1)
    best = Basis(wide.u @ u[:, 0], wide.v @ v[:, 0])
    with part_of(share, _OF_CLIMB) as own:
        best, _ = _climb(batch, best, _CLIMB_ROUNDS, _LAST_TOLERANCE, share=own)
    return Basis(*map(_completed, best))


def hosvd(stack: Stack, rank: int, *, seed: int = 0) -> Basis:
    """The leading eigenvectors of Σ D_i D_iᵀ and Σ D_iᵀ D_i: not the optimum, but `climb` is soon there from it.

    Exact, and of no more columns than there are rows, when ``rank`` reaches the stacked rank.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(stack.a) <= rank:
        return Basis(*(_exact_range(rows, rank) for rows in (stack.bt, stack.a)))
    u, v = _leading_basis(Batch.of_stack(stack), rank, generator)
    return Basis(_completed(u)[0], _completed(v)[0])


def _exact_range(rows: Tensor, width: int) -> Tensor:
    if rows.shape[1] <= width:
        return torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.linalg.qr(rows.mT).Q


def hosvd_batch(batch: Batch, rank: int, *, seed: int = 0) -> Basis:
    """`hosvd` of every problem of a batch, always of ``rank`` columns or as many as the side has dimensions."""
    return _leading_basis(batch, rank, torch.Generator().manual_seed(seed))


def climb(stack: Stack, basis: Basis, *, rounds: int = _CLIMB_ROUNDS) -> Basis:
    """Climb from ``basis`` to the optimum near it; the objective never falls.

    Each round solves the problem within the span of the basis, of its image under one power step (the gradient) and of
    the last round's move, as LOBPCG does for eigenvectors.
    """
    found, _ = _climb(Batch.of_stack(stack), Basis(basis.u[None], basis.v[None]), rounds)
    return Basis(found.u[0], found.v[0])


def climb_batch(batch: Batch, basis: Basis, *, rounds: int = _CLIMB_ROUNDS, small_rounds: int = _SMALL_ROUNDS) -> Basis:
    """`climb` for every problem of a batch; each of its rounds does ``small_rounds`` of HOOI within its span."""
    return _climb(batch, basis, rounds, small_rounds=small_rounds)[0]


def _leading_basis(batch: Batch, width: int, generator: torch.Generator) -> Basis:
    """Bases of ``width`` columns by randomised HOSVD (range finder of Halko, Martinsson and Tropp 2011, alg. 4.4)."""
    sides = []
    for size, times_gram in zip(batch.shape, (batch.times_left_gram, batch.times_right_gram), strict=True):
        if size <= width:
            basis = torch.eye(size, dtype=batch.dtype, device=batch.device).expand(batch.problems, -1, -1)
        else:
            basis = torch.randn(size, width, generator=generator).to(batch.device, batch.dtype)
            basis = basis.expand(batch.problems, -1, -1)
            for _ in range(_RANGE_ROUNDS):
                basis = cholesky_qr(times_gram(basis))
        sides.append(basis)
    return Basis(*sides)


def _search(
    cores: Cores, corner: _Corner, ranks: tuple[int, int], generator: torch.Generator, share: Share
) -> tuple[Tensor, Tensor]:
    """The best few bases U [P, s, k, R_U] and V [P, s, l, R_V] of cores [k, l].

    HOOI runs on the first rows and columns of the cores, from the HOSVD's bases and from many random ones.
    """
    rank = max(ranks)
    rows, columns = cores.left.shape[-2:]
    small = cores.corner(min(corner.width(rank), rows), min(corner.width(rank), columns))
    count = _start_count(corner, rank)
    u = _starts(small.full_left_gram(), ranks[0], count, generator)
    v = _starts(small.full_right_gram(), ranks[1], count, generator)
    with part_of(share, _OF_STARTS) as own:
        u, v, reached = _hooi(small, u, v, _ROUNDS if rank <= _SMALL_RANK else _LARGE_RANK_ROUNDS, own)
    u, v = _best_distinct(u, v, reached, _SURVIVORS)
    u, v, reached = _hooi(small, u, v, _SURVIVOR_ROUNDS)
    u, v = _best_distinct(u, v, reached, _CORNER_FINALISTS)
    return _padded(u, rows), _padded(v, columns)


def _start_count(corner: _Corner, rank: int) -> int:
    return max(_LEAST_STARTS, min(corner.starts, 8192 // rank**2))


def _padded(basis: Tensor, size: int) -> Tensor:
    """A basis [..., k, r] of the first k coordinates, of ``size`` in all."""
    return torch.nn.functional.pad(basis, (0, 0, 0, size - basis.shape[-2]))


def _starts(gram: Tensor, rank: int, count: int, generator: torch.Generator) -> Tensor:
    """The leading subspace of ``gram`` [P, 1, k, k], then random ones, [P, 1 + count, k, rank]."""
    problems, _, size, _ = gram.shape
    leading = torch.eye(size, rank, dtype=gram.dtype, device=gram.device).expand(problems, 1, -1, -1)
    for _ in range(4):
        leading = _power(gram, leading, 3)
    random = cholesky_qr(torch.randn(count, size, rank, generator=generator).to(gram))
    return torch.cat([leading, random.expand(problems, -1, -1, -1)], 1)


def _power(gram: Tensor, basis: Tensor, steps: int = _POWER_STEPS) -> Tensor:
    """orth(Gˢ Z) for G [..., k, k] and Z [..., k, r]: it captures no less of G than Z does."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    scaled = gram / torch.where(trace > 0, trace, 1)
    for _ in range(steps):
        basis = scaled @ basis
    return cholesky_qr(basis, passes=1)


def _hooi(cores: Cores, u: Tensor, v: Tensor, rounds: int, share: Share = unheard) -> tuple[Tensor, Tensor, Tensor]:
    """HOOI (De Lathauwer et al. 2000) from U [P, s, k, R_U] and V [P, s, l, R_V], with power steps for eigenvectors.

    Returns U, V and the objective reached [P, s].
    """
    last = None
    for _ in range(rounds):
        check_stop()
        share(1 / rounds)
        u = _power(cores.left_gram(v), u)
        gram = cores.right_gram(u)
        v = _power(gram, v)
        reached = _captured(gram, v)
        if last is not None and bool((reached - last <= _TOLERANCE * reached).all()):
            break
        last = reached
    return u, v, reached


def _captured(gram: Tensor, basis: Tensor) -> Tensor:
    """tr(ZᵀGZ), of shape [...]."""
    return (gram @ basis * basis).sum((-2, -1), dtype=torch.float64)


def _best_distinct(u: Tensor, v: Tensor, reached: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The best of the bases U [P, s, k, R_U], V [P, s, l, R_V], less those that climb the same hill as a better one.

    Of bases that are equally good but for rounding it is the first, so that rounding decides nothing.
    """
    same_hill = (_distances(u) < _SAME) & (_distances(v) < _SAME)  # [P, s, s]
    open_ = reached.clone()
    picked = []
    for _ in range(min(count, u.shape[1])):
        most = open_.max(1, keepdim=True).values
        first = (open_ >= most - _TIE * most.abs()).to(torch.uint8).argmax(1)
        picked.append(first)
        hill = same_hill.gather(1, first[:, None, None].expand(-1, 1, same_hill.shape[2]))[:, 0]
        open_ = torch.where(hill, -torch.inf, open_).scatter(1, first[:, None], -torch.inf)
    best = torch.stack(picked, 1)[:, :, None, None]
    return u.gather(1, best.expand(-1, -1, *u.shape[2:])), v.gather(1, best.expand(-1, -1, *v.shape[2:]))


def _distances(bases: Tensor) -> Tensor:
    """Σ sin² of the principal angles between every two of the bases [P, s, k, R], of shape [P, s, s]."""
    problems, count, _, rank = bases.shape
    together = bases.transpose(2, 3).flatten(1, 2)
    overlaps = (together @ together.mT).square_().reshape(problems, count, rank, count, rank)
    return rank - overlaps.sum((2, 4))


def _climb(
    batch: Batch,
    basis: Basis,
    rounds: int,
    tolerance: float = _TOLERANCE,
    small_rounds: int = _SMALL_ROUNDS,
    share: Share = unheard,
) -> tuple[Basis, Tensor]:
    """`climb` for every problem, and the objective reached [P] in float64.

    Problems that stand still leave the batch now and then, when enough of them do.
    """
    best = Basis(basis.u.clone(), basis.v.clone())
    reached = torch.full((batch.problems,), -torch.inf, dtype=torch.float64, device=batch.device)
    climbing, going = batch, torch.arange(batch.problems)  # the problems that are still in, and their numbers
    moved = Basis(basis.u[..., :0], basis.v[..., :0])
    for _ in range(rounds):
        check_stop()
        share(1 / rounds)
        basis, moved, before, now = _climb_once(climbing, basis, moved, small_rounds)
        here = going.to(batch.device)
        best.u[here], best.v[here] = basis
        reached[here] = torch.maximum(now, before)
        still = now - before <= tolerance * now
        moving = (~still).nonzero()[:, 0].cpu()
        if not len(moving):
            break
        if len(moving) <= _FEW * climbing.problems:
            climbing, going = climbing.select(moving), going[moving]
            kept = moving.to(batch.device)
            basis, moved = (Basis(each.u[kept], each.v[kept]) for each in (basis, moved))
    return best, reached


class _Climbed(NamedTuple):
    """A round of climbing: where it led, the way there, and the objective [P] before and after it, in float64.

    ``moved`` is what the last basis has outside of the new one: (I − U Uᵀ) U_last, and likewise for V.
    """

    basis: Basis
    moved: Basis
    before: Tensor
    now: Tensor


def _climb_once(batch: Batch, basis: Basis, moved: Basis, small_rounds: int) -> _Climbed:
    """The best basis in the span of ``basis``, its gradient and the last round's move, by HOOI on small cores."""
    wide = Basis(*map(span, basis, batch.gradients(*basis), moved))
    cores = batch.chunked_cores(*wide)
    small_u, small_v = map(_first, wide, basis)
    before = _captured(cores.right_gram(small_u), small_v)[:, 0]
    small_u, small_v, now = _hooi(cores, small_u, small_v, small_rounds)
    now = now[:, 0]
    better = (now > before)[:, None, None]
    u = torch.where(better, wide.u @ small_u[:, 0], basis.u)
    v = torch.where(better, wide.v @ small_v[:, 0], basis.v)
    away = Basis(basis.u - u @ (u.mT @ basis.u), basis.v - v @ (v.mT @ basis.v))
    return _Climbed(Basis(u, v), away, before, now)


def _first(span: Tensor, basis: Tensor) -> Tensor:
    """A basis [P, d, r] in the coordinates of a span [P, d, k] that begins with it: the first unit vectors."""
    first = torch.eye(span.shape[2], basis.shape[2], dtype=span.dtype, device=span.device)
    return first.expand(len(span), 1, -1, -1)


def span(*columns: Tensor) -> Tensor:
    """Orthonormal columns [..., d, k] that span all ``columns`` [..., d, k_j], for k = min(Σ k_j, d). The first of them
    span the first of ``columns``."""
    together = torch.cat(columns, dim=-1)
    size, count = together.shape[-2:]
    return cholesky_qr(together) if count < size else _all_of(columns[0])


def _all_of(first: Tensor) -> Tensor:
    """An orthonormal basis [..., d, d] of everything whose first columns span those of ``first``."""
    rank = first.shape[-1]
    full: Tensor = torch.linalg.qr(first, mode="complete").Q
    full[..., :rank] = first
    return full


def _completed(basis: Tensor) -> Tensor:
    """``basis`` [P, d, R] with orthonormal columns, also where the updates span fewer than R dimensions.

    Cholesky QR leaves a zero column zero, and of a column that depends on others only what rounding made of it.
    """
    basis = cholesky_qr(basis)
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    broken = ((basis.mT @ basis - eye).abs().amax((1, 2)) > _ORTHONORMAL).nonzero()[:, 0]
    if len(broken):
        basis = basis.clone()
        basis[broken] = torch.linalg.qr(basis[broken]).Q
    return basis
