"""The true errors of a bundle, from the original adapters and the decoder; the encoder has no part in it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .adapter import Adapter
from .bundle import AdapterEntry, Bundle, ModuleError
from .errors import AdapterError
from .linalg import Factors, squared_norm_and_distance
from .progress import Advance
from .reading import Files, Pick, by_layout
from .reconstruct import decode, decode_shared
from .workers import in_order, threads_for

_CPU = torch.device("cpu")
# Numbers in the factors of one batch: 32 MiB of float64, on a GPU 256 MiB.
_BATCH_NUMBERS = {"cpu": 2**22, "cuda": 2**25}


class Pair(NamedTuple):
    """An adapter in the bundle and the original that it came from, with the same modules."""

    entry: AdapterEntry
    original: Adapter


class Measured:
    """The errors of one adapter, from ‖ΔW‖² and ‖ΔW−ΔŴ‖² of each of its modules."""

    def __init__(self) -> None:
        self.norms: dict[str, float] = {}
        self.distances: dict[str, float] = {}

    @property
    def squared_norm(self) -> float:
        """Σ‖ΔW‖² over modules."""
        return math.fsum(self.norms.values())

    @property
    def squared_distance(self) -> float:
        """Σ‖ΔW−ΔŴ‖² over modules."""
        return math.fsum(self.distances.values())

    @property
    def squared_error(self) -> float:
        """Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖² over modules; 0 for an adapter whose updates are all zero."""
        return self.squared_distance / self.squared_norm if self.squared_norm > 0 else 0.0

    @property
    def mean_module_squared_error(self) -> float:
        """Mean over modules of ‖ΔW−ΔŴ‖² / ‖ΔW‖²; a zero module counts 0."""
        return math.fsum(self.ratio(module) for module in self.norms) / len(self.norms)

    @property
    def worst_module(self) -> ModuleError:
        """The module of largest ‖ΔW−ΔŴ‖² / ‖ΔW‖²."""
        worst = max(self.norms, key=self.ratio)
        return ModuleError(worst, self.ratio(worst))

    def ratio(self, module: str) -> float:
        """‖ΔW−ΔŴ‖² / ‖ΔW‖² of one module; 0 for a zero module."""
        return self.distances[module] / self.norms[module] if self.norms[module] > 0 else 0.0


class _Error(NamedTuple):
    """‖ΔW‖² and ‖ΔW−ΔŴ‖² of one module of one adapter, by its name in the bundle."""

    adapter: str
    module: str
    squared_norm: float
    squared_distance: float


def measure(
    bundle: Bundle, pairs: list[Pair], advance: Advance, device: torch.device = _CPU
) -> tuple[dict[str, Measured], list[AdapterError]]:
    """The errors of every pair by the adapter's name, in float64, and the originals that turned out unreadable.

    What shares bases goes module by module on ``device``; adapters kept individually go one by one, on the CPU. Memory
    does not grow with the collection. ``advance`` is told 1 for each module of each pair.
    """
    measured = {pair.entry.name: Measured() for pair in pairs}
    unusable: dict[str, AdapterError] = {}

    def take(found: Iterable[_Error | AdapterError]) -> None:
        for each in found:
            if isinstance(each, AdapterError):
                unusable.setdefault(each.adapter, each)
                continue
            errors = measured[each.adapter]
            errors.norms[each.module] = each.squared_norm
            errors.distances[each.module] = each.squared_distance
            if not math.isfinite(each.squared_norm):
                reason = f"module {each.module}: its update has NaN or Inf"
                unusable.setdefault(each.adapter, AdapterError(each.adapter, reason))

    shared = _Shared(bundle, [pair for pair in pairs if pair.entry.cluster is not None], device)
    with threads_for(device), closing(in_order(shared.module, shared.modules, device)) as results:
        for module, found in zip(shared.modules, results, strict=True):
            take(found)
            advance(sum(len(pick.chosen) for pick in shared.modules[module]))
    alone = [pair for pair in pairs if pair.entry.cluster is None]
    with closing(in_order(partial(_measure_alone, bundle), alone, _CPU)) as results:
        for pair, found in zip(alone, results, strict=True):
            take(found)
            advance(len(pair.original.parts))
    return {name: errors for name, errors in measured.items() if name not in unusable}, list(unusable.values())


class _Shared:
    """Adapters in clusters, those of one shard next to each other, so that their cores are decoded together."""

    def __init__(self, bundle: Bundle, pairs: list[Pair], device: torch.device) -> None:
        self._bundle = bundle
        self._device = device
        self._pairs = sorted(pairs, key=lambda pair: bundle.shard(pair.entry).path)
        originals = [pair.original for pair in self._pairs]
        self._files = Files(originals, device)
        kinds = {id(original.parts): original.parts for original in originals}.values()
        modules = {name: part.module for parts in kinds for name, part in parts.items()}
        self.modules: defaultdict[str, list[Pick]] = defaultdict(list)
        """For each module, of every layout that has it, all adapters."""
        for group in by_layout(originals, list(modules.values())):
            for column, part in enumerate(group.parts):
                everyone = np.arange(len(group.adapters))
                self.modules[part.module.name].append(Pick(group, column, everyone))

    def module(self, name: str) -> list[_Error | AdapterError]:
        """The errors of all adapters in one module; an AdapterError for each that cannot be read."""
        found: list[_Error | AdapterError] = []
        for pick in self.modules[name]:
            while True:
                try:
                    found += list(self._errors(name, pick))
                    break
                except AdapterError as error:  # once more, without this one
                    others = [self._pairs[number].original.name != error.adapter for number in pick.adapters]
                    (broken,) = pick.adapters[np.logical_not(others)]
                    found.append(AdapterError(self._pairs[broken].entry.name, error.reason))
                    pick = pick._replace(chosen=pick.chosen[others])
        return found

    def _errors(self, module: str, pick: Pick) -> Iterator[_Error]:
        """Raises AdapterError for an original whose factors cannot be read."""
        part = pick.group.parts[pick.column]
        step = max(1, _BATCH_NUMBERS[self._device.type] // (2 * part.parameters))
        scales = torch.from_numpy(pick.group.scales[pick.chosen, pick.column])[:, None, None].to(self._device)
        pairs = [self._pairs[number] for number in pick.adapters]
        bases: dict[str, tuple[Tensor, Tensor]] = {}
        for some, own_b, own_a in self._files.factors(pick):
            own_b = own_b.reshape(-1, part.module.d_out, part.rank)
            own_a = own_a.reshape(-1, part.rank, part.module.d_in)
            for start, stop in self._runs(pairs[some], step):
                names = [pair.entry.name for pair in pairs[some][start:stop]]
                decoded = self._decoded(module, [pair.entry for pair in pairs[some][start:stop]], bases)
                x = own_b[start:stop].double() * scales[some][start:stop], own_a[start:stop].double()
                norms, distances = torch.stack(squared_norm_and_distance(x, decoded)).tolist()
                yield from map(_Error, names, [module] * len(names), norms, distances)

    def _runs(self, pairs: list[Pair], most: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of at most so many neighbours of one shard."""
        stop = 0
        for _, same in groupby(pairs, key=lambda pair: self._bundle.shard(pair.entry).path):
            start, stop = stop, stop + len(list(same))
            for first in range(start, stop, most):
                yield first, min(first + most, stop)

    def _decoded(self, module: str, entries: list[AdapterEntry], bases: dict[str, tuple[Tensor, Tensor]]) -> Factors:
        """B̂ [k, d_out, R] and Â [R, d_in] of adapters in one shard; ``bases`` are those that were read before."""
        assert entries[0].cluster is not None
        cluster = self._bundle.manifest.clusters[entries[0].cluster]
        if cluster.basis not in bases:
            u, v = (basis.to(self._device).double() for basis in self._bundle.basis(cluster, module))
            bases[cluster.basis] = u, v
        cores = self._bundle.cores(entries, module).to(self._device).double()
        return decode_shared(cluster.method, *bases[cluster.basis], cores)


def _measure_alone(bundle: Bundle, pair: Pair) -> list[_Error | AdapterError]:
    """The errors of an adapter that is kept individually, in batches of modules of equal shapes and ranks."""
    found: list[_Error | AdapterError] = []
    try:
        for modules, x, y in _batches(bundle, pair):
            norms, distances = torch.stack(squared_norm_and_distance(x, y)).tolist()
            found += map(_Error, [pair.entry.name] * len(modules), modules, norms, distances)
    except AdapterError as error:
        return [AdapterError(pair.entry.name, error.reason)]
    return found


def _batches(bundle: Bundle, pair: Pair) -> Iterator[tuple[list[str], Factors, Factors]]:
    """(modules, stacked original factors, stacked decoded factors)."""
    open_batches: defaultdict[tuple[torch.Size, ...], list[tuple[str, Factors, Factors]]] = defaultdict(list)
    for module in pair.original.parts:
        x = pair.original.factors(module, torch.float64)
        y = decode(bundle, pair.entry, module, torch.float64)
        batch = open_batches[tuple(z.shape for z in (*x, *y))]
        batch.append((module, x, y))
        if len(batch) * sum(z.numel() for z in (*x, *y)) > _BATCH_NUMBERS["cpu"]:
            yield _stack(batch)
            batch.clear()
    for batch in open_batches.values():
        if batch:
            yield _stack(batch)


def _stack(batch: list[tuple[str, Factors, Factors]]) -> tuple[list[str], Factors, Factors]:
    modules, originals, decoded = zip(*batch, strict=True)
    return list(modules), _stacked(originals), _stacked(decoded)


def _stacked(factors: tuple[Factors, ...]) -> Factors:
    return torch.stack([b for b, _ in factors]), torch.stack([a for _, a in factors])
