"""Adapters that join on shared bases that are there: with the best of own tensors that these allow.

A basis is not changed for them, so what they lose on it is not what adapters lose that it was fitted to.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from ..base.progress import Progress
from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.manifest import AdapterEntry, ClusterEntry
from ..bundle.summary import is_adapter_within, squared_error
from ..bundle.writer import BundleWriter
from ..compress.shards import SHARD_ADAPTERS
from ..reading.scan import Scan
from ..reading.updates import Updates
from ..schemes.registry import shared_scheme
from ..schemes.scheme import Solution
from .carry import Staying

_CPU = torch.device("cpu")
_TOGETHER = 64
"""Adapters whose updates of a module are in memory at a time, of each worker."""


class Host(NamedTuple):
    """A cluster that adapters may join."""

    number: int
    """In the bundle that was."""
    entry: ClusterEntry
    modules: frozenset[str]
    """Those that its basis knows."""
    limit: float
    """The most that an adapter may lose to join it."""


class Nearest(NamedTuple):
    """The cluster that serves an adapter best, and what it would lose there."""

    host: Host
    squared_error: float
    joins: bool
    """Whether that is little enough."""


def hosts(staying: Staying, max_error: float | None, alone: float) -> list[Host]:
    """The clusters that adapters may join: those that somebody stays in.

    No adapter may lose more than ``max_error``, or what the bundle promises. Where nothing is promised, it may lose
    what 95 of 100 of those do that the basis was fitted to, or as much as it would ``alone``.
    """
    manifest = staying.bundle.manifest
    limit = manifest.parameters.max_error if max_error is None else max_error
    found = []
    for number in staying.clusters:
        members = staying.members(number)
        modules = frozenset(manifest.modules[module].name for module in staying.modules(members))
        usual = _usual_error([manifest.adapters[index] for index in members])
        own = max(usual, alone) if limit is None else limit
        found.append(Host(number, manifest.clusters[number], modules, own))
    return found


def _usual_error(members: Sequence[AdapterEntry]) -> float:
    fitted = [adapter for adapter in members if not adapter.added] or members
    return float(numpy.percentile([adapter.squared_error for adapter in fitted], 95))


@dataclass(frozen=True)
class Projection:
    """Puts adapters of a scan on the bases of a bundle."""

    staying: Staying
    scan: Scan
    updates: Updates
    progress: Progress

    def nearest(self, hosts: Sequence[Host]) -> list[Nearest | None]:
        """For every adapter, the cluster that serves it best; None where each lacks a module of it, or there is none.

        An adapter whose values the dtype of the bundle cannot hold joins none.
        """
        collection, norms = self.scan.collection, self.scan.norms
        if not hosts:
            return [None] * len(collection.adapters)
        lost = torch.zeros(len(hosts), *norms.shape, dtype=torch.float64)
        with (
            self.progress.stage("comparing with shared bases", len(collection.modules)) as advance,
            closing(
                in_order(lambda module: self._lost(module, hosts), range(len(collection.modules)), self.updates.device)
            ) as results,
        ):
            for module, of_module in enumerate(results):
                lost[:, :, module] = of_module
                advance(1)
        return [self._nearest(number, hosts, lost[:, number]) for number in range(len(collection.adapters))]

    def _nearest(self, number: int, hosts: Sequence[Host], lost: Tensor) -> Nearest | None:
        """From ‖ΔW−ΔŴ‖² [K, M] of one adapter on each of the ``hosts``, infinite where these lack a module."""
        norms = self.scan.norms[number].tolist()
        errors = [squared_error(own, norms) if max(own) < math.inf else math.inf for own in lost.tolist()]
        place = min(range(len(hosts)), key=errors.__getitem__)
        if errors[place] == math.inf:
            return None
        return Nearest(hosts[place], errors[place], is_adapter_within(lost[place].tolist(), norms, hosts[place].limit))

    def _lost(self, module: int, hosts: Sequence[Host]) -> Tensor:
        """‖ΔW−ΔŴ‖² [K, n] of one module: of each adapter on each of the ``hosts``."""
        having = self.updates.ranks[:, module] > 0
        lost = torch.zeros(len(hosts), len(having), dtype=torch.float64)
        name = self.scan.collection.modules[module].name
        for place, host in enumerate(hosts):
            if name not in host.modules:
                lost[place, having] = math.inf
        having_it = [place for place, host in enumerate(hosts) if name in host.modules]
        for some in _blocks(having.nonzero()[:, 0].tolist()):
            stack = self.updates.load(module, some)
            for place in having_it:
                check_stop()
                host = hosts[place]
                found = shared_scheme(host.entry.method).project(stack, self._shared(host, name))
                lost[place, list(found.members)] = found.squared_errors
        return lost

    def write(
        self,
        writer: BundleWriter,
        members: Mapping[int, Host],
        name_of: Callable[[int], str],
    ) -> tuple[list[tuple[int, str, list[str]]], Tensor]:
        """Write shards for adapters, each of which joins a cluster.

        Returns cluster, path and adapters of each shard, and ‖ΔW−ΔŴ‖² [n, M]. Files of bases have to be there.
        """
        lost = torch.zeros_like(self.scan.norms)
        of_cluster: defaultdict[int, list[int]] = defaultdict(list)
        for number in sorted(members):
            of_cluster[members[number].number].append(number)
        shards = []
        with self.progress.stage("writing cores", len(members)) as advance:
            for cluster, joining in sorted(of_cluster.items()):
                for some in _blocks(joining, SHARD_ADAPTERS):
                    host = members[some[0]]
                    path = writer.free(f"cores/{cluster}-0.safetensors")
                    tensors = self._cores(host, some, lost)
                    writer.add_tensors(path, tensors, basis_sha256=writer.digest(host.entry.basis))
                    shards.append((cluster, path, [name_of(number) for number in some]))
                    advance(len(some))
        self.scan.check_unchanged(members)
        return shards, lost

    def _cores(self, host: Host, joining: Sequence[int], lost: Tensor) -> dict[str, Tensor]:
        """The own tensors of a shard; what its adapters lose is put into ``lost`` [n, M]."""
        ranks = self.updates.ranks[list(joining)]
        modules = (ranks > 0).any(0).nonzero()[:, 0].tolist()
        tensors = {}
        with closing(
            in_order(lambda m: list(self._projected(host, m, joining)), modules, self.updates.device)
        ) as found:
            for module, solutions in zip(modules, found, strict=True):
                name = self.scan.collection.modules[module].name
                for solution in solutions:
                    lost[list(solution.members), module] = solution.squared_errors
                for suffix in solutions[0].own:
                    tensors[f"{name}.{suffix}"] = torch.cat([solution.own[suffix] for solution in solutions])
        return tensors

    def _projected(self, host: Host, module: int, joining: Sequence[int]) -> Iterator[Solution]:
        """One module of those of ``joining`` that have it, some at a time."""
        name = self.scan.collection.modules[module].name
        having = [number for number in joining if self.updates.ranks[number, module] > 0]
        for some in _blocks(having):
            check_stop()
            yield shared_scheme(host.entry.method).project(self.updates.load(module, some), self._shared(host, name))

    def _shared(self, host: Host, module: str) -> dict[str, Tensor]:
        shared = self.staying.bundle.shared(host.entry, module)
        return {suffix: tensor.to(self.updates.device) for suffix, tensor in shared.items()}


def _blocks(numbers: Sequence[int], size: int = _TOGETHER) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size])
