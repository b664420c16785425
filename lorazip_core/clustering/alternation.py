"""Who shares a basis: adapters grouped so that Σ_i squared_error_i of the joint compression is small.

Alternation, as k-means does it for points: given the groups, fit a basis to each of them in every module; given the
bases, move each adapter to the basis of least error over all its modules. The objective never rises.

It starts from several partitions, tried on a few probe modules: k-medoids, where the distance of adapter i to adapter j
is the error of D_i in the leading singular subspaces of D_j, and random ones of equal size. The medoids of
very many adapters are sought among a part of them, so that nothing grows with n². Every quantity depends on ΔW alone,
never on how B A was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..base.progress import Progress, Silent
from ..base.threads import in_order
from ..maths.batch import Batch
from ..maths.stack import ScaledStack
from ..maths.tucker import Basis, climb_batch, hosvd_batch
from ..reading.memory import COMPARED, PROBES
from ..reading.updates import Updates
from .similarity import similarity_of_all, subspace_similarity

_STARTS = 2
_ROUNDS = 20
_TRIAL_ROUNDS, _FINALISTS = 3, 2  # of every start, and those that go on
_CLIMB = 2  # polishing rounds of every basis between two reassignments, and within each of them
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
        self.modules = updates.probes(PROBES)
        self.updates = updates.kept(self.modules)
        self._rank = rank
        # Adapters are numbered by their energy in here, so that their names decide nothing.
        self._order = updates.norms.sum(1).argsort(stable=True)
        n = len(self._order)
        count = min(n, COMPARED)
        self._compared = self._order[torch.arange(count) * n // count]
        """The adapters of which medoids are taken: all of them, or some of every energy."""
        self._similarity = self._shared(self._compared, self._compared)

    def similarity(self) -> Tensor:
        """`subspace_similarity` of all adapters, [n, n]."""
        if len(self._compared) < len(self._order):
            return similarity_of_all(self.updates, self._rank)
        position = self._order.argsort()
        return self._similarity[position][:, position]

    def cluster(self, clusters: int, *, seed: int, starts: int = _STARTS) -> Clustering:
        """The best of what alternation reaches from ``starts`` starts of each kind. After a few rounds, only the
        two best of these go on."""
        generator = torch.Generator().manual_seed(seed)
        tried = [
            alternate(self.updates, labels[self._order.argsort()].tolist(), self._rank, seed=seed, rounds=_TRIAL_ROUNDS)
            for labels in self._starts(clusters, starts, generator)
        ]
        best = sorted(tried, key=lambda clustering: clustering.objective[-1])[:_FINALISTS]
        reached = [alternate(self.updates, clustering.labels, self._rank, seed=seed) for clustering in best]
        return min(reached, key=lambda clustering: clustering.objective[-1])

    def _starts(self, clusters: int, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        n, compared = len(self._order), len(self._compared)
        if clusters in (1, n):
            yield torch.arange(n) % clusters
            return
        distance = 1 - self._similarity
        for _ in range(count):
            if clusters <= compared:
                # Groups that share much are found as they are; adapters that share little want clusters of equal size.
                yield self._around(_medoids(distance, clusters, compared, generator), n)
                yield self._around(_medoids(distance, clusters, -(-compared // clusters), generator), -(-n // clusters))
            yield torch.randperm(n, generator=generator) % clusters

    def _around(self, medoids: list[int], capacity: int) -> Tensor:
        """Labels [n] of clusters around ``medoids``, out of those that are compared, of at most ``capacity``."""
        if len(self._compared) == len(self._order):
            return _nearest(1 - self._similarity[:, medoids], medoids, capacity)
        numbers = self._compared[medoids]
        return _nearest(1 - self._shared(self._order, numbers), self._order.argsort()[numbers].tolist(), capacity)

    def _shared(self, rows: Tensor, columns: Tensor) -> Tensor:
        """`subspace_similarity` of adapters in any order."""
        (own, row), (others, column) = rows.sort(), columns.sort()
        same = rows is columns
        found = subspace_similarity(self.updates, self._rank, own, own if same else others)
        return found[row.argsort()][:, column.argsort()]


def alternate(
    updates: Updates,
    labels: Sequence[int],
    rank: int,
    *,
    seed: int,
    rounds: int = _ROUNDS,
    progress: Progress = _SILENT,
) -> Clustering:
    """Alternate bases and assignment from ``labels``, numbered from 0 without a gap, until no adapter moves."""
    current = torch.tensor(labels)
    clusters = int(current.max()) + 1
    groups = updates.modules_at_once(clusters * 3 * rank)  # what a round of climbing spans
    parts = [_Modules(updates, modules, clusters, rank, seed) for modules in groups]
    objective: list[float] = []
    for round_ in range(1, rounds + 1):
        weighted = torch.zeros(len(current), clusters, dtype=torch.float64)
        lost = torch.zeros_like(weighted)
        improve = partial(_Modules.improved, labels=current)
        with (
            progress.stage(f"clustering, round {round_}", len(updates.shapes)) as advance,
            closing(in_order(improve, parts, updates.device)) as results,
        ):
            for found in results:
                for module, errors in found:
                    weights = updates.weights[:, module, None]
                    weighted += errors
                    lost += torch.where(weights > 0, errors / weights, 0.0)
                advance(len(found))
        objective.append(float(weighted.gather(1, current[:, None]).sum()))
        moved = _reassigned(weighted, current)
        if round_ == rounds or bool((moved == current).all()):
            break
        current = moved
    order = list(dict.fromkeys(current.tolist()))
    return Clustering([order.index(label) for label in current.tolist()], updates.shares(lost)[:, order], objective)


class _Modules:
    """Some modules of one shape, and the bases of all clusters in them from one round to the next."""

    def __init__(self, updates: Updates, modules: Sequence[int], clusters: int, rank: int, seed: int) -> None:
        self._updates, self._modules, self._clusters = updates, modules, clusters
        self._rank, self._seed = rank, seed
        self._started = torch.zeros(len(modules) * clusters, dtype=torch.bool)
        shape = updates.shapes[modules[0]]
        self._u, self._v = (
            torch.zeros(len(self._started), side, min(rank, side), device=updates.device) for side in shape
        )

    def improved(self, labels: Tensor) -> list[tuple[int, Tensor]]:
        """Fit the bases to the clusters of ``labels``, from where they are; then, for each module,
        w_i (‖D_i‖² − ‖U_cᵀ D_i V_c‖²) of every adapter i in the basis of every cluster c, [n, clusters] in float64."""
        stacks = [self._updates.load(module) for module in self._modules]
        self._fit(stacks, labels)
        return [
            (module, self._lost(module, stack, slice(i * self._clusters, (i + 1) * self._clusters)))
            for i, (module, stack) in enumerate(zip(self._modules, stacks, strict=True))
        ]

    def _fit(self, stacks: list[ScaledStack], labels: Tensor) -> None:
        weights = self._updates.weights
        wanted = [labels[list(stack.adapters)] + i * self._clusters for i, stack in enumerate(stacks)]
        used = torch.unique(torch.cat(wanted))
        number = torch.zeros_like(self._started, dtype=torch.int64)
        number[used] = torch.arange(len(used))
        scales = [
            weights[list(stack.adapters), module].sqrt() for stack, module in zip(stacks, self._modules, strict=True)
        ]
        batch = Batch.of(stacks, [number[problems] for problems in wanted], len(used), scales)
        new = ~self._started[used]
        if new.any():
            first = hosvd_batch(batch.select(new.nonzero()[:, 0]), self._rank, seed=self._seed)
            self._put(used[new], first)
        here = used.to(batch.device)
        self._put(used, climb_batch(batch, Basis(self._u[here], self._v[here]), rounds=_CLIMB, small_rounds=_CLIMB))

    def _put(self, problems: Tensor, bases: Basis) -> None:
        here = problems.to(self._u.device)
        self._u[here], self._v[here] = bases
        self._started[problems] = True

    def _lost(self, module: int, stack: ScaledStack, problems: slice) -> Tensor:
        adapters = list(stack.adapters)
        lost = torch.zeros(len(self._updates.weights), self._clusters, dtype=torch.float64)
        captured = stack.captured(self._u[problems], self._v[problems]).cpu()
        # The norms are exact: in float32, factors of large condition would spoil them.
        lost[adapters] = (self._updates.norms[adapters, module, None] - captured).clamp_min(0)
        return lost * self._updates.weights[:, module, None]


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


def _medoids(distance: Tensor, clusters: int, capacity: int, generator: torch.Generator) -> list[int]:
    """The medoids of a k-medoids partition of ``distance`` [n, n] into clusters of at most ``capacity``."""
    n = len(distance)
    medoids = [int(torch.randint(n, (1,), generator=generator))]
    while len(medoids) < clusters:
        nearest = distance[:, medoids].min(dim=1).values.square()
        nearest[medoids] = 0
        nearest += (torch.arange(n).unsqueeze(1) != torch.tensor(medoids)).all(1) * 1e-12  # all at distance 0: any do
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
    return medoids


def _nearest(distance: Tensor, medoids: list[int], capacity: int) -> Tensor:
    """Labels [n] of the nearest medoid, for ``distance`` [n, k] to each, whose cluster has fewer than ``capacity``
    adapters yet; the closest pairs go first."""
    if capacity >= len(distance):
        labels = distance.argmin(1)
        labels[medoids] = torch.arange(len(medoids))
        return labels
    return _matched(distance, medoids, capacity)


def _matched(distance: Tensor, medoids: list[int], capacity: int) -> Tensor:
    """Labels [n] when the closest of all pairs of an adapter and a medoid go first, and of equal ones the earlier.

    All pairs are in one order, so that this is what deferred acceptance (Gale and Shapley 1962) ends with: whoever has
    no place asks the next nearest cluster, and a cluster keeps the closest of those who ask.
    """
    n, clusters = distance.shape
    turn = torch.empty(n * clusters, dtype=torch.int64)
    turn[distance.flatten().argsort(stable=True)] = torch.arange(n * clusters)
    turn = turn.reshape(n, clusters)
    turn[medoids] = n * clusters  # a medoid asks nobody but its own cluster, which never lets it go
    turn[medoids, torch.arange(clusters)] = -1
    choices = turn.argsort(dim=1)
    asked = torch.zeros(n, dtype=torch.int64)
    labels = torch.full((n,), -1)
    while (waiting := (labels < 0).nonzero()[:, 0]).numel():
        labels[waiting] = choices[waiting, asked[waiting]]
        asked[waiting] += 1
        rank_of = turn.gather(1, labels[:, None])[:, 0]
        order = (labels * (n * clusters + 2) + rank_of).argsort()  # by cluster, the closest first
        sizes = torch.bincount(labels, minlength=clusters)
        within = torch.arange(n) - (sizes.cumsum(0) - sizes)[labels[order]]
        labels[order[within >= capacity]] = -1
    return labels
