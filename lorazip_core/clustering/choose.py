"""How many clusters are worth it: bytes against error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from ..adapter.collection import Collection
from ..base.progress import Progress
from ..base.text import count
from ..base.threads import in_order
from ..bundle.manifest import Dtype
from ..bundle.size import bundle_bytes, equal_groups
from ..maths.factored import truncated_svd
from ..reading.updates import Updates
from .alternation import Clustering, Probes, alternate
from .clusters_file import Candidate

_PROMISING = 3  # numbers of clusters that are tried on all modules, at the most
_CLOSE = 1.1  # times the least cost on the probes: what costs more is not tried again
_STARTS = 1  # of each kind, for every number on the probes


class Choice(NamedTuple):
    """The clustering of least cost on all modules, and what was tried, in ascending order of bytes."""

    clustering: Clustering
    candidates: list[Candidate]


def choose_clusters(
    collection: Collection, updates: Updates, probes: Probes, rank: int, *, dtype: Dtype, seed: int, progress: Progress
) -> Choice:
    """The number of clusters K of least cost = mean squared error + bytes of the bundle / bytes of the originals.

    That is, another cluster is worth it if it takes away more of the error than it adds to the bytes, both as shares of
    the originals. Many K are tried on the probes, and the best few on all modules; the best of these wins.
    """
    price = _Price(collection, rank, dtype)
    alone = price.svd(updates)
    enough = min((each.cost for each in alone), default=1.0)
    on_probes = _tried_on_probes(price, probes, enough, seed=seed, progress=progress)
    promising = sorted(on_probes, key=lambda clusters: on_probes[clusters].cost)[:_PROMISING]
    on_all: dict[int, _Tried] = {}
    for clusters in promising:
        cost = on_probes[clusters].cost
        if cost <= _CLOSE * on_probes[promising[0]].cost:
            progress.note(f"{count(clusters, 'cluster')}: cost {cost:.4f} on the probes, trying all modules")
            labels = on_probes[clusters].clustering.labels
            clustering = alternate(updates, labels, rank, seed=seed, progress=progress)
            on_all[clusters] = _Tried(clustering, price.of(clustering, "all"))
    chosen = min(on_all, key=lambda clusters: on_all[clusters].cost)
    candidates = [
        msgspec.structs.replace(tried.candidate, chosen=clusters == chosen)
        for clusters, tried in (on_probes | on_all).items()
    ]
    candidates += alone
    return Choice(on_all[chosen].clustering, sorted(candidates, key=lambda candidate: candidate.bytes_bundle))


class _Tried(NamedTuple):
    """What some number of clusters gives."""

    clustering: Clustering
    candidate: Candidate

    @property
    def cost(self) -> float:
        return self.candidate.cost


def _tried_on_probes(
    price: _Price, probes: Probes, enough: float, *, seed: int, progress: Progress
) -> dict[int, _Tried]:
    """What numbers of clusters K give on the probes: K grows by steps of a quarter until the bytes alone cost more than
    the best so far, and then the numbers in the gaps beside the best are tried.

    Where that ends shows on the way; about where the bytes alone cost ``enough`` is a good guess.
    """
    tried: dict[int, _Tried] = {}

    def attempt(clusters: int) -> None:
        clustering = probes.cluster(clusters, seed=seed, starts=_STARTS)
        tried[clusters] = _Tried(clustering, price.of(clustering, "probes"))

    ladder = [(clusters, price.least(clusters)) for clusters in _ladder(len(price.collection.adapters))]
    guess = sum(least < enough for _, least in ladder)
    with progress.stage("trying numbers of clusters", guess) as advance:
        for clusters, least in ladder:
            if tried and least >= min(each.cost for each in tried.values()):
                break
            attempt(clusters)
            advance(int(len(tried) <= guess))
        advance(guess - min(guess, len(tried)))
        for clusters in _gaps(min(tried, key=lambda clusters: tried[clusters].cost), sorted(tried)):
            attempt(clusters)
    return tried


@dataclass(frozen=True)
class _Price:
    """What ways to compress a collection take and lose."""

    collection: Collection
    rank: int
    dtype: Dtype

    @property
    def _original(self) -> int:
        return sum(adapter.size_bytes for adapter in self.collection.adapters)

    def least(self, clusters: int) -> float:
        """What ``clusters`` clusters cost if nothing is lost."""
        groups = equal_groups(len(self.collection.adapters), clusters)
        return bundle_bytes(self.collection, "joint", self.rank, groups, self.dtype) / self._original

    def of(self, clustering: Clustering, measured_on: Literal["probes", "all"]) -> Candidate:
        groups: list[list[int]] = [[] for _ in range(clustering.squared_errors.shape[1])]
        for number, label in enumerate(clustering.labels):
            groups[label].append(number)
        size = bundle_bytes(self.collection, "joint", self.rank, groups, self.dtype)
        return self._candidate("joint", self.rank, len(groups), size, clustering.own_errors, measured_on)

    def svd(self, updates: Updates) -> list[Candidate]:
        """For comparison: truncated SVDs at rank 1, 2, 4, …"""
        highest = max(part.rank for adapter in self.collection.adapters for part in adapter.parts.values())
        left = _truncation_errors(updates, highest)
        return [
            self._candidate("svd", rank, 0, bundle_bytes(self.collection, "svd", rank, [], self.dtype), errors, "all")
            for rank, errors in ((2**power, left[:, 2**power]) for power in range(highest.bit_length()))
            if rank < highest
        ]

    def _candidate(
        self,
        method: Literal["joint", "svd"],
        rank: int,
        clusters: int,
        size: int,
        errors: Tensor,
        measured_on: Literal["probes", "all"],
    ) -> Candidate:
        mean = float(errors.mean())
        return Candidate(
            method=method,
            rank=rank,
            clusters=clusters,
            bytes_bundle=size,
            saved_ratio=1 - size / self._original,
            mean_squared_error=mean,
            max_squared_error=float(errors.max()),
            cost=mean + size / self._original,
            measured_on=measured_on,
            chosen=False,
        )


def _truncation_errors(updates: Updates, highest: int) -> Tensor:
    """The squared error of every adapter in truncated SVDs of rank 0 … ``highest``, [n, highest + 1] in float64."""

    def energies_in(module: int) -> Tensor:
        stack = updates.load(module)
        energies = torch.zeros(len(updates.norms), highest, dtype=torch.float64)
        adapters = torch.tensor(stack.adapters)
        for b, a, positions in stack.rows.to(torch.float32).factors():
            found = truncated_svd(b, a, highest)[0].double().square().sum(-2).cpu()
            found *= stack.factors[positions, None].square()
            energies[adapters[positions], : found.shape[1]] = found
        return energies

    energies = sum(
        in_order(energies_in, range(len(updates.shapes)), updates.device),
        torch.zeros(len(updates.norms), highest, dtype=torch.float64),
    )
    lost = torch.nn.functional.pad(energies, (0, 1)).flip(1).cumsum(1).flip(1)
    return updates.shares(lost)


def _ladder(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, … up to ``most``."""
    clusters = 1
    while clusters <= most:
        yield clusters
        clusters += max(1, clusters // 4)


def _gaps(best: int, tried: list[int]) -> list[int]:
    """The middles of the gaps between ``best`` and those tried beside it."""
    at = tried.index(best)
    beside = tried[max(0, at - 1) : at] + tried[at + 1 : at + 2]
    return sorted({(best + other) // 2 for other in beside} - set(tried))
