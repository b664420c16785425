"""The true errors of a bundle, from the original adapters and the decoder; the encoder has no part in it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .adapter import Adapter
from .bundle import AdapterEntry, Bundle, ModuleError
from .errors import AdapterError
from .linalg import Factors, squared_distance, squared_norm
from .progress import Advance
from .reconstruct import decode
from .workers import in_order

# Numbers in one batch of stacked factors: 32 MiB of float64.
_BATCH_NUMBERS = 2**22


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


def measure(bundle: Bundle, pairs: list[Pair], advance: Advance) -> tuple[dict[str, Measured], list[AdapterError]]:
    """The errors of every pair by the adapter's name, in float64, and the originals that turned out unreadable.

    Goes module by module and in batches of equal shape, so that memory does not grow with the collection. ``advance``
    is told 1 for each module of each pair.
    """
    having: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        for module in bundle.modules(pair.entry):
            having[module.name].append(pair)
    measured = {pair.entry.name: Measured() for pair in pairs}
    unusable: dict[str, AdapterError] = {}
    results = in_order(lambda module: _measure_module(bundle, module, having[module]), having, torch.device("cpu"))
    for (module_name, group), (found, broken) in zip(having.items(), results, strict=True):
        for name, norm, distance in found:
            measured[name].norms[module_name] = norm
            measured[name].distances[module_name] = distance
        for error in broken:
            unusable.setdefault(error.adapter, error)
        advance(len(group))
    return {name: errors for name, errors in measured.items() if name not in unusable}, list(unusable.values())


def _measure_module(
    bundle: Bundle, module: str, pairs: list[Pair]
) -> tuple[list[tuple[str, float, float]], list[AdapterError]]:
    """(name, ‖ΔW‖², ‖ΔW−ΔŴ‖²) of each adapter in one module, and the originals that cannot be read."""
    found: list[tuple[str, float, float]] = []
    broken: list[AdapterError] = []
    for names, x, y in _batches(bundle, module, pairs, broken):
        found += zip(names, squared_norm(*x).tolist(), squared_distance(x, y).tolist(), strict=True)
    for name, norm, _ in found:
        if not math.isfinite(norm):
            broken.append(AdapterError(name, f"module {module}: its update has NaN or Inf"))
    return found, broken


def _batches(
    bundle: Bundle, module: str, pairs: list[Pair], broken: list[AdapterError]
) -> Iterator[tuple[list[str], Factors, Factors]]:
    """(names, stacked original factors, stacked decoded factors) of pairs whose factors have equal ranks."""
    open_batches: defaultdict[tuple[int, int], list[tuple[str, Factors, Factors]]] = defaultdict(list)
    for entry, original in pairs:
        try:
            b, a = original.factors(module, torch.float64)
        except AdapterError as error:
            broken.append(error)
            continue
        decoded_b, decoded_a = decode(bundle, entry, module, torch.float64)
        batch = open_batches[a.shape[0], decoded_a.shape[0]]
        batch.append((entry.name, (b, a), (decoded_b, decoded_a)))
        if len(batch) * (b.numel() + a.numel() + decoded_b.numel() + decoded_a.numel()) > _BATCH_NUMBERS:
            yield _stack(batch)
            batch.clear()
    for batch in open_batches.values():
        if batch:
            yield _stack(batch)


def _stack(batch: list[tuple[str, Factors, Factors]]) -> tuple[list[str], Factors, Factors]:
    names, originals, decoded = zip(*batch, strict=True)
    return list(names), _stacked(originals), _stacked(decoded)


def _stacked(factors: tuple[Factors, ...]) -> Factors:
    return torch.stack([b for b, _ in factors]), torch.stack([a for _, a in factors])
