"""Who shares a basis: adapters grouped so that Σ_i squared_error_i of the joint compression is small.

Alternation, as k-means does it for points: given the groups, fit a basis to each of them in every module; given the
bases, move each adapter to the basis of least error over all its modules. The objective never rises.

It starts from several partitions, tried on a few probe modules: k-medoids, where the distance of adapter i to adapter j
is the error of D_i in the leading singular subspaces of D_j, and random ones of equal size. Every quantity depends on
ΔW alone, never on how B A was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .joint import Basis, climb, hosvd
from .linalg import orthonormal
from .progress import Progress, Silent
from .similarity import subspace_similarity
from .stack import Stack
from .updates import Updates
from .workers import in_order

_PROBES = 4
_STARTS = 2
_ROUNDS = 20
_CLIMB = 2  # polishing rounds of every basis between two reassignments
_MARGIN = 1e-6  # of the mean error: a move that gains less is noise
_SILENT = Silent()


class Clustering(NamedTuple):
    """A cluster, 0 … K − 1, for each of n adapters, and what it gives over the modules looked at; none is empty.

    Clusters are numbered by their first adapter.
    """

    labels: list[int]
    squared_errors: Tensor
    """[n, K] float64: of every adapter in the basis of every cluster."""
    objective: list[float]
    """Σ_im w_im ‖D_im − D̂_im‖² after each round; it never rises."""

    @property
    def own_errors(self) -> Tensor:
        """The squared error of every adapter in its own cluster, [n]."""
        return self.squared_errors.gather(1, torch.tensor(self.labels)[:, None])[:, 0]


class Probes:
    """A few modules of a collection, kept in memory, on which partitions are tried."""

    def __init__(self, updates: Updates, rank: int) -> None:
        self.modules = updates.probes(_PROBES)
        self.updates = updates.kept(self.modules)
        self.similarity = subspace_similarity(self.updates, rank)
        self._rank = rank
        # Adapters are numbered by their energy in here, so that their names decide nothing.
        self._order = updates.norms.sum(1).argsort(stable=True)

    def cluster(self, clusters: int, *, seed: int, starts: int = _STARTS) -> Clustering:
        """The best of what alternation reaches from ``starts`` starts of each kind."""
        reached = (
            settle(self.updates, labels[self._order.argsort()].tolist(), self._rank, seed=seed)
            for labels in self._starts(clusters, starts, torch.Generator().manual_seed(seed))
        )
        return min(reached, key=lambda clustering: clustering.objective[-1])

    def _starts(self, clusters: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        n = len(self._order)
        if clusters in (1, n):
            yield torch.arange(n) % clusters
            return
        distance = (1 - self.similarity)[self._order][:, self._order]
        for _ in range(count):
            # Groups that share much are found as they are; adapters that share little want clusters of equal size.
            yield _medoids(distance, clusters, n, generator)
            yield _medoids(distance, clusters, -(-n // clusters), generator)
            yield torch.randperm(n, generator=generator) % clusters


def settle(
    updates: Updates, labels: Sequence[int], rank: int, *, seed: int, progress: Progress = _SILENT
) -> Clustering:
    """Alternate bases and assignment from ``labels``, numbered from 0 without a gap, until no adapter moves."""
    current = torch.tensor(labels)
    modules, clusters = range(updates.norms.shape[1]), int(current.max()) + 1
    bases: list[dict[int, Basis]] = [{} for _ in modules]
    objective: list[float] = []
    for round_ in range(1, _ROUNDS + 1):
        numbers = current.tolist()

        def lost_in(module: int, numbers: list[int] = numbers) -> Tensor:
            energies = updates.weights[:, module] * updates.norms[:, module]
            return _lost(updates.weighted(module), energies, numbers, clusters, bases[module], rank, seed)

        weighted = torch.zeros(len(current), clusters, dtype=torch.float64)
        lost = torch.zeros_like(weighted)
        with progress.stage(f"clustering, round {round_}", len(modules)) as advance:
            for module, found in zip(modules, in_order(lost_in, modules, updates.device), strict=True):
                weights = updates.weights[:, module, None]
                weighted += found
                lost += torch.where(weights > 0, found / weights, 0.0)
                advance(1)
        objective.append(float(weighted.gather(1, current[:, None]).sum()))
        moved = _reassigned(weighted, current)
        if round_ == _ROUNDS or bool((moved == current).all()):
            break
        current = moved
    order = list(dict.fromkeys(current.tolist()))
    return Clustering([order.index(label) for label in current.tolist()], updates.shares(lost)[:, order], objective)


def _lost(
    stack: Stack,
    energies: Tensor,
    labels: list[int],
    clusters: int,
    bases: dict[int, Basis],
    rank: int,
    seed: int,
) -> Tensor:
    """‖D_i‖² − ‖U_cᵀ D_i V_c‖² of every adapter i in the basis of every cluster c, [n, clusters] in float64.

    ``energies`` [n] are the exact ‖D_i‖²: in float32, factors of large condition would spoil them. ``bases`` of this
    module are improved first, and started or widened where a cluster has none, or too narrow a one.
    """
    members = list(stack.members)
    norms = energies[members]
    lost = torch.zeros(len(labels), clusters, dtype=torch.float64)
    for cluster in range(clusters):
        own = stack.select({i for i in members if labels[i] == cluster})
        captured = torch.zeros_like(norms)
        if own.members:
            bases[cluster] = basis = climb(own, _start(own, bases.get(cluster), rank, seed), rounds=_CLIMB)
            captured = stack.cores(*basis).square().sum((1, 2)).double().cpu()
        lost[members, cluster] = (norms - captured).clamp_min(0)
    return lost


def _start(stack: Stack, basis: Basis | None, rank: int, seed: int) -> Basis:
    """The basis to climb from: the HOSVD's, or the one there was, widened if the stack has grown beyond it."""
    wide = min(rank, *stack.bt.shape), min(rank, *stack.a.shape)
    if basis is not None and basis.u.shape[1] >= wide[0] and basis.v.shape[1] >= wide[1]:
        return basis
    fresh = hosvd(stack, rank, seed=seed)
    if basis is None:
        return fresh
    # The old columns come first: nothing that they served is lost.
    return Basis(
        orthonormal(torch.cat([basis.u, fresh.u], dim=1))[:, : wide[0]],
        orthonormal(torch.cat([basis.v, fresh.v], dim=1))[:, : wide[1]],
    )


def _reassigned(errors: Tensor, labels: Tensor) -> Tensor:
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
    if capacity >= len(distance):
        labels = distance.argmin(1)
        labels[medoids] = torch.arange(len(medoids))
        return labels
    labels = torch.full((len(distance),), -1)
    room = [capacity - 1] * len(medoids)
    labels[medoids] = torch.arange(len(medoids))
    for pair in distance.flatten().argsort(stable=True).tolist():
        adapter, cluster = divmod(pair, len(medoids))
        if room[cluster] and labels[adapter] < 0:
            labels[adapter] = cluster
            room[cluster] -= 1
    return labels
