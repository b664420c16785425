"""How similar adapters are: what their subspaces share, what a basis of others gives them, and who hardly differs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.device import CPU
from ..base.progress import Progress
from ..base.stopping import check_stop
from ..base.threads import in_order
from ..maths.batch import Batch
from ..maths.chunks import ELEMENTS_AT_ONCE
from ..maths.factored import TINY, Factors, leading_subspaces, squared_distance
from ..maths.tucker import climb_batch, hosvd_batch, span
from ..reading.updates import Updates

_NEAR = 0.1  # share of the larger update: two adapters that differ by less are near-duplicates
_SKETCH = 16  # test vectors a side: a module's sketch has 256 elements
_SKETCH_SLACK = 3.0  # a sketched distance is off by less, over the modules of an adapter
_NULL = 1e-5  # of the largest eigenvalue: below, an eigenvector is noise
_HELD_OUT_ROUNDS = 5
_HELD_OUT_ELEMENTS = 2**24  # in a tensor of all pairs of a cluster, at the most
_BATCH = 64  # pairs whose factors are stacked at once
_PAIRS_AT_ONCE = 1024  # adapters, with all others


class Near(NamedTuple):
    """Adapters ``first`` < ``second`` at ‖ΔW_i−ΔW_j‖² / max(‖ΔW_i‖², ‖ΔW_j‖²) over all modules."""

    first: int
    second: int
    squared_distance: float


def subspace_similarity(
    updates: Updates, rank: int, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Σ_m ‖U_jᵀ D_i V_j‖² / Σ_m ‖D_i‖², how much of adapter i the subspaces of j hold, as [rows, columns] in float64.

    U_j, V_j are the ``rank`` leading singular vectors of D_j. ``rows`` and ``columns`` are the numbers of some
    adapters, ascending; without them it is all. 1 for i = j, unless adapter i is of a higher rank.
    """
    n, modules = updates.norms.shape
    every = torch.arange(n)
    rows, columns = every if rows is None else rows, every if columns is None else columns

    def captured_in(module: int) -> Tensor:
        captured = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        wanted, others = (some[updates.ranks[some, module] > 0] for some in (rows, columns))
        if not (len(wanted) and len(others)):
            return captured
        stack = updates.load(module, wanted.tolist())
        spanning = stack if rows is columns else updates.load(module, others.tolist())
        here = torch.searchsorted(rows, torch.tensor(stack.adapters))[:, None]
        there = torch.searchsorted(columns, torch.tensor(spanning.adapters))
        for b, a, positions in spanning.rows.to(torch.float32).factors():
            most = max(1, ELEMENTS_AT_ONCE[a.device.type] // (b[0].numel() + a[0].numel()))
            pieces = (torch.split(each, most) for each in (b, a, there[positions]))
            for some_b, some_a, held_by in zip(*pieces, strict=True):
                check_stop()
                captured[here, held_by] = stack.captured(*leading_subspaces(some_b, some_a, rank)).cpu()
        return captured

    zeros = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    captured = sum(in_order(captured_in, range(modules), updates.device), zeros)
    energy = updates.norms[rows].sum(1, keepdim=True).clamp_min(TINY)
    return (captured / energy).clamp(0, 1)


def similarity_of_all(updates: Updates, rank: int) -> Tensor:
    """`subspace_similarity` of all pairs, [n, n] in float32, some columns at a time."""
    n = len(updates.norms)
    similarity = torch.empty(n, n)
    for columns in torch.split(torch.arange(n), _PAIRS_AT_ONCE):
        similarity[:, columns] = subspace_similarity(updates, rank, columns=columns).float()
    return similarity


def held_out_errors(updates: Updates, labels: Sequence[int], rank: int, *, seed: int) -> Tensor:
    """The squared error of every adapter in a basis fitted to the *other* adapters of its cluster, [n] in float64.

    1 for an adapter that is alone. Such a basis is not fitted from nothing for each: a few rounds of HOOI without the
    adapter lead there from the basis of all, within three times its width; in a large cluster, where one adapter more
    or less matters little, a single half-step.
    """
    numbers = torch.tensor(labels)

    def lost_in(module: int) -> Tensor:
        stack = updates.load(module)
        present, owner = torch.unique(numbers[list(stack.adapters)], return_inverse=True)
        weights = updates.weights[:, module]
        batch = Batch.of([stack], [owner], len(present), [weights[list(stack.adapters)].sqrt()])
        energies = (weights * updates.norms[:, module])[batch.adapters]
        lost = torch.zeros(len(labels), dtype=torch.float64)
        lost[batch.adapters] = (energies - _captured_by_others(batch, rank, seed).double().cpu()).clamp_min(0)
        return torch.where(weights > 0, lost / weights, 0.0)

    lost = in_order(lost_in, range(len(updates.shapes)), updates.device)
    return updates.shares(sum(lost, torch.zeros(len(labels), dtype=torch.float64))).clamp(0, 1)


def _captured_by_others(batch: Batch, rank: int, seed: int) -> Tensor:
    """‖Uᵀ D_i V‖² in a basis fitted to the other updates of the same problem, for every entry [T]."""
    basis = climb_batch(batch, hosvd_batch(batch, rank, seed=seed))
    wide = hosvd_batch(batch, 3 * rank, seed=seed)
    # The columns of the basis come first, so that in these coordinates they are the first unit vectors.
    u, v = (span(*pair) for pair in zip(basis, wide, strict=True))
    sizes = torch.bincount(batch.owners, minlength=batch.problems).tolist()
    cores = torch.split(batch.cores(u, v), sizes)

    def captured(own: Tensor) -> Tensor:
        return _captured_without(own, basis.u.shape[2], basis.v.shape[2])

    if u.device.type == "cpu":
        return torch.cat(list(map(captured, cores)))
    # A GPU decomposes small matrices one after another, slower than a core of the CPU does.
    return torch.cat(list(in_order(captured, [own.cpu() for own in cores], CPU)))


def _captured_without(cores: Tensor, rank_u: int, rank_v: int) -> Tensor:
    """‖Uᵀ C_i V‖² of cores [n, k, l] in a basis of the others; where they begin, the first unit vectors serve all."""
    check_stop()
    n, rank = len(cores), max(rank_u, rank_v)
    if n == 1:
        return cores.new_zeros(1)
    without_u = _leading_without(cores[:, :, :rank_v], rank_u)
    without_v = _leading_without(cores[:, :rank_u].mT, rank_v)
    if n * n * max(cores.shape[1:]) * rank <= _HELD_OUT_ELEMENTS:
        left, right = (side.transpose(0, 1).flatten(0, 1) for side in (cores, cores.mT))  # [k·n, l] and [l·n, k]
        for _ in range(_HELD_OUT_ROUNDS):
            check_stop()
            without_u = _leading_of_others(left, without_v, rank_u)
            without_v = _leading_of_others(right, without_u, rank_v)
    return (without_u.mT @ cores @ without_v).square().sum((1, 2))


def _leading_of_others(unfolded: Tensor, bases: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of Σ_{j≠i} C_j W_i W_iᵀ C_jᵀ for every i, [n, k, rank], for the bases W [n, l, r]."""
    n = len(bases)
    half = (unfolded @ bases).reshape(n, -1, n, bases.shape[2]).transpose(1, 2)  # [i, j, k, r]
    half.diagonal()[:] = 0
    return _leading(torch.einsum("ijkr,ijmr->ikm", half, half), rank)


def _leading_without(half: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of Σ_{j≠i} H_j H_jᵀ for every i, [n, k, rank], for ``half`` H [n, k, r]."""
    grams = half @ half.mT
    return _leading(grams.sum(0) - grams, rank)


def _leading(grams: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of ``grams`` [n, k, k], as [n, k, rank]; 0 in the place of those that are only noise."""
    values, vectors = torch.linalg.eigh(grams)
    values, vectors = values[:, -rank:], vectors[:, :, -rank:]
    return vectors * (values > _NULL * values[:, -1:].clamp_min(0)).to(vectors)[:, None]


def near_duplicates(updates: Updates, *, seed: int, progress: Progress) -> list[Near]:
    """For every adapter the earlier one that it is nearest to, if they are near-duplicates; nearest pairs first.

    Distances are estimated from sketches Xᵀ D_i Y with random X [d_out, s] and Y [d_in, s], whose inner products are
    those of the updates in expectation; the exact ones follow for the few pairs that look near.
    """
    n, modules = updates.norms.shape
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (modules,), generator=generator).tolist()

    def sketch(module: int) -> Tensor:
        stack = updates.load(module)
        rows = stack.rows.to(torch.float32)
        own = torch.Generator().manual_seed(seeds[module])
        x, y = (torch.randn(side.shape[1], _SKETCH, generator=own).to(side) for side in (rows.bt, rows.a))
        sketches = torch.zeros(n, _SKETCH**2)
        scaled = rows.cores(x, y).flatten(1).cpu() * stack.factors[:, None]
        sketches[list(stack.adapters)] = scaled.float() / _SKETCH
        return sketches

    gram = torch.zeros(n, n)
    blocks = [slice(start, start + _PAIRS_AT_ONCE) for start in range(0, n, _PAIRS_AT_ONCE)]

    def add(sketches: Tensor, rows: slice) -> None:
        gram[rows, : rows.stop] += sketches[rows] @ sketches[: rows.stop].mT

    with progress.stage("looking for near-duplicates", modules) as advance:
        for found in in_order(sketch, range(modules), updates.device):
            for _ in in_order(partial(add, found), blocks, CPU):
                pass
            advance(1)
    norms = updates.norms.sum(1)
    pairs = [pair for rows in blocks for pair in _nearest_before(gram, norms, rows)]
    exact = _distances(updates, pairs, progress)
    return sorted(
        (Near(*pair, found) for pair, found in zip(pairs, exact, strict=True) if found <= _NEAR),
        key=lambda near: (near.squared_distance, near.first, near.second),
    )


def _nearest_before(gram: Tensor, norms: Tensor, rows: slice) -> list[tuple[int, int]]:
    """For the adapters of ``rows`` the earlier one that looks nearest by ``gram`` [n, n], where it looks near."""
    second = torch.arange(len(norms))[rows]
    first = torch.arange(int(second[-1]) + 1)
    own = gram.diagonal()
    distance = own[second, None] + own[first] - 2 * gram[second][:, first]
    distance /= torch.maximum(norms[second, None], norms[first]).clamp_min(TINY)
    distance.masked_fill_(first >= second[:, None], torch.inf)
    least, nearest = distance.min(1)
    near = (least <= _SKETCH_SLACK * _NEAR) & (norms[second] > 0)
    return list(zip(nearest[near].tolist(), second[near].tolist(), strict=True))


def _distances(updates: Updates, pairs: list[tuple[int, int]], progress: Progress) -> list[float]:
    """‖ΔW_i−ΔW_j‖² / max(‖ΔW_i‖², ‖ΔW_j‖²) over all modules, exactly, for some pairs."""
    if not pairs:
        return []
    norms = updates.norms
    distance = torch.zeros(len(pairs), dtype=torch.float64)
    modules = range(norms.shape[1])
    with progress.stage("measuring near-duplicates", len(modules)) as advance:
        for found in in_order(lambda module: _module_distances(updates, module, pairs), modules, updates.device):
            distance += found
            advance(1)
    total = norms.sum(1)
    larger = torch.stack([torch.maximum(total[i], total[j]) for i, j in pairs])
    return (distance / larger.clamp_min(TINY)).tolist()


def _module_distances(updates: Updates, module: int, pairs: list[tuple[int, int]]) -> Tensor:
    stack = updates.load(module)
    factors = {
        stack.adapters[position]: (b_i, a_i, float(stack.factors[position]))
        for b, a, positions in stack.rows.factors()
        for position, b_i, a_i in zip(range(positions.start, positions.stop), b, a, strict=True)
    }
    distance = torch.zeros(len(pairs), dtype=torch.float64)
    by_ranks: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (i, j) in enumerate(pairs):
        if i in factors and j in factors:
            by_ranks[len(factors[i][1]), len(factors[j][1])].append(number)
        else:  # one of them has no update here, and the other differs by all of its own
            distance[number] = updates.norms[i, module] + updates.norms[j, module]
    for numbers in by_ranks.values():
        for some in (numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH)):
            check_stop()
            left, right = zip(*(pairs[number] for number in some), strict=True)
            distance[some] = squared_distance(_together(factors, left), _together(factors, right)).cpu()
    return distance


def _together(factors: dict[int, tuple[Tensor, Tensor, float]], adapters: Sequence[int]) -> Factors:
    """B [k, d_out, r] with the factor of each update multiplied in, and A [k, r, d_in], in float64."""
    b, a, own = zip(*(factors[adapter] for adapter in adapters), strict=True)
    stacked = torch.stack(b).double()
    scaled = stacked * torch.tensor(own, dtype=torch.float64, device=stacked.device)[:, None, None]
    return scaled, torch.stack(a).double()
