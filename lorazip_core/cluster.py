"""Who shares a basis: adapters grouped so that Σ_i squared_error_i of the joint compression is small.

Alternation, as k-means does it for points: given the groups, fit a basis to each of them in every module; given the
bases, move each adapter to the basis of least error over all its modules. The objective never rises.

It starts from several k-medoids partitions on a few probe modules, where the distance of adapter i to adapter j is the
error of D_i in the leading singular subspaces of D_j. Every quantity depends on ΔW alone, never on how B A was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .joint import Basis, climb, hosvd
from .linalg import orthonormal, truncated_svd
from .progress import Advance
from .stack import Stack
from .workers import in_order

_PROBES = 4
_STARTS = 6
_ROUNDS = 20
_CLIMB = 2  # polishing rounds of every basis between two reassignments
_MARGIN = 1e-6  # of the mean error: a move that gains less is noise


def assign_clusters(
    load: Callable[[int], Stack],
    weights: Tensor,
    norms: Tensor,
    clusters: int,
    rank: int,
    *,
    seed: int,
    device: torch.device,
    advance: Advance,
) -> list[int]:
    """The cluster, 0 … ``clusters`` − 1, of each of n adapters; no cluster is empty.

    ``load(m)`` gives the updates of module m as a stack whose members are numbers of adapters; ``weights`` and
    ``norms`` [n, M] hold w_im and ‖D_im‖² (0 where adapter i lacks module m). ``advance`` is called with 1 for every
    module read. Clusters are numbered by their first adapter.
    """
    n, modules = norms.shape
    if clusters == 1:
        return [0] * n
    generator = torch.Generator().manual_seed(seed)

    def weighted(module: int) -> Stack:
        stack = load(module)
        advance(1)
        return stack.scaled(weights[list(stack.members), module].sqrt())

    energy = (weights * norms).sum(0).argsort(descending=True, stable=True).tolist()
    probes = [weighted(module) for module in energy[:: max(1, modules // _PROBES)][:_PROBES]]

    def try_on_probes(labels: Tensor) -> tuple[Tensor, float]:
        return _alternate(probes.__getitem__, len(probes), labels, rank, seed, device)

    # Adapters are numbered by their energy in here, so that their names decide nothing.
    order = norms.sum(1).argsort(stable=True)
    distance = _distances(probes, rank, n, device)[order][:, order]
    # Adapters that share little are served best by clusters of equal size, groups that share much as they are.
    capacities = [n, -(-n // clusters)] * (_STARTS // 2)
    starts = [_medoids(distance, clusters, capacity, generator)[order.argsort()] for capacity in capacities]
    labels = min(map(try_on_probes, starts), key=lambda result: result[1])[0]
    labels, _ = _alternate(weighted, modules, labels, rank, seed, device)
    return _renumbered(labels.tolist())


def _alternate(
    load: Callable[[int], Stack], modules: int, labels: Tensor, rank: int, seed: int, device: torch.device
) -> tuple[Tensor, float]:
    """Alternate bases and assignment from ``labels`` [n] until no adapter moves: the labels and the objective."""
    clusters = int(labels.max()) + 1
    bases: list[dict[int, Basis]] = [{} for _ in range(modules)]
    for _ in range(_ROUNDS):
        numbers = labels.tolist()

        def module_errors(module: int, numbers: list[int] = numbers) -> Tensor:
            return _module_errors(load(module), numbers, clusters, bases[module], rank, seed)

        errors = sum(in_order(module_errors, range(modules), device), torch.zeros(len(labels), clusters))
        moved = _reassign(errors, labels)
        reached = float(errors.gather(1, moved[:, None]).sum())
        if bool((moved == labels).all()):
            break
        labels = moved
    return labels, reached


def _module_errors(
    stack: Stack, labels: list[int], clusters: int, bases: dict[int, Basis], rank: int, seed: int
) -> Tensor:
    """‖D_i‖² − ‖U_cᵀ D_i V_c‖² of every adapter i in the basis of every cluster c, [n, clusters] in float64.

    ``bases`` of this module are improved first, and started where a cluster has none, or too narrow a one.
    """
    members = list(stack.members)
    norms = stack.squared_norms().double().cpu()
    errors = torch.zeros(len(labels), clusters, dtype=torch.float64)
    for cluster in range(clusters):
        own = stack.select({i for i in members if labels[i] == cluster})
        captured = torch.zeros_like(norms)
        if own.members:
            basis = bases.get(cluster)
            if basis is None or _is_narrow(basis, own, rank):
                basis = hosvd(own, rank, seed=seed)
            bases[cluster] = basis = climb(own, basis, rounds=_CLIMB)
            captured = stack.cores(*basis).square().sum((1, 2)).double().cpu()
        errors[members, cluster] = (norms - captured).clamp_min(0)
    return errors


def _is_narrow(basis: Basis, stack: Stack, rank: int) -> bool:
    """Whether a basis has fewer columns than the stack could use, since its cluster was smaller once."""
    return basis.u.shape[1] < min(rank, *stack.bt.shape) or basis.v.shape[1] < min(rank, *stack.a.shape)


def _reassign(errors: Tensor, labels: Tensor) -> Tensor:
    """Move each adapter to its cluster of least error; an emptied cluster gets the adapter that is served worst."""
    current = errors.gather(1, labels[:, None])[:, 0]
    least, nearest = errors.min(dim=1)
    moved = torch.where(current - least > _MARGIN * current.mean(), nearest, labels)
    for cluster in range(errors.shape[1]):
        sizes = torch.bincount(moved, minlength=errors.shape[1])
        if sizes[cluster] == 0:
            left = errors.gather(1, moved[:, None])[:, 0]
            moved[int(torch.where(sizes[moved] > 1, left, -1.0).argmax())] = cluster
    return moved


def _distances(probes: Sequence[Stack], rank: int, n: int, device: torch.device) -> Tensor:
    """The share of D_i outside the leading singular subspaces of D_j, over the probe modules, of shape [n, n]."""

    def captured_and_total(stack: Stack) -> tuple[Tensor, Tensor]:
        captured, total = torch.zeros(n, n), torch.zeros(n, 1)
        members = torch.tensor(stack.members)
        total[members, 0] = stack.squared_norms().float().cpu()
        for b, a, positions in stack.factors():
            us, vt = truncated_svd(b, a, rank)
            for column, u, v in zip(members[positions].tolist(), orthonormal(us), vt.mT, strict=True):
                captured[members, column] = stack.cores(u, v).square().sum((1, 2)).cpu()
        return captured, total

    found = list(in_order(captured_and_total, probes, device))
    captured, total = (torch.stack(each).sum(0) for each in zip(*found, strict=True))
    return (1 - captured / total.clamp_min(torch.finfo(total.dtype).tiny)).clamp_min(0)


def _medoids(distance: Tensor, clusters: int, capacity: int, generator: torch.Generator) -> Tensor:
    """Labels [n] of a k-medoids partition of ``distance`` [n, n] into clusters of at most ``capacity``."""
    n = len(distance)
    medoids = [int(torch.randint(n, (1,), generator=generator))]
    while len(medoids) < clusters:
        nearest = distance[:, medoids].min(dim=1).values.square()
        nearest[medoids] = 0
        nearest += (torch.arange(n).unsqueeze(1) != torch.tensor(medoids)).all(1) * 1e-12  # all alike: any will do
        medoids.append(int(torch.multinomial(nearest, 1, generator=generator)))
    for _ in range(_ROUNDS):
        labels = _nearest(distance[:, medoids], medoids, capacity)
        better = []
        for cluster in range(clusters):
            inside = (labels == cluster).nonzero()[:, 0]
            better.append(int(inside[distance[inside][:, inside].sum(0).argmin()]))
        if better == medoids:
            break
        medoids = better
    return labels


def _nearest(distance: Tensor, medoids: list[int], capacity: int) -> Tensor:
    """Labels [n] of the nearest medoid, for ``distance`` [n, k] to each, that still has room; the closest go first."""
    labels = torch.full((len(distance),), -1)
    room = [capacity - 1] * len(medoids)
    labels[medoids] = torch.arange(len(medoids))
    for pair in distance.flatten().argsort(stable=True).tolist():
        adapter, cluster = divmod(pair, len(medoids))
        if room[cluster] and labels[adapter] < 0:
            labels[adapter] = cluster
            room[cluster] -= 1
    return labels


def _renumbered(labels: list[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]
