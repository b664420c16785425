"""What a compression would take on disk, from shapes alone: no weight is read."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from .adapter import Collection
from .bundle import DTYPES, Dtype, Method, Weights
from .errors import UsageError

DEFAULT_RANK = {"joint": 16, "diag": 16, "svd": 4}

_METHODS: tuple[Method, ...] = ("joint", "diag", "svd")

# Measured on real bundles: what a tensor adds to a safetensors header, and an adapter or a module to the manifest.
_HEADER_BYTES = 110
_ADAPTER_BYTES = 900
_MODULE_BYTES = 100


class CompressOptions(Struct, frozen=True):
    """What to do. ``rank`` None means the method's default; ``clusters`` is a number or a file of the assignment."""

    method: Method = "joint"
    rank: int | None = None
    clusters: int | Path = 1
    dtype: Dtype = "bf16"
    seed: int = 0
    weights: Weights = "adapter"
    max_error: float | None = None
    device: str = "auto"

    @property
    def kept_rank(self) -> int | None:
        """The rank asked for or the method's default; None for an svd that only has to meet ``max_error``."""
        if self.rank is None and self.method == "svd" and self.max_error is not None:
            return None
        return self.rank if self.rank is not None else DEFAULT_RANK[self.method]

    def check(self, adapters: int) -> None:
        """Raise UsageError for options that make no sense, alone or for this many adapters."""
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank}: must be at least 1")
        if self.max_error is not None and not 0 <= self.max_error <= 1:
            raise UsageError(f"--max-error {self.max_error}: a squared error is between 0 and 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if self.method == "svd" and self.clusters != 1:
            raise UsageError("--clusters: svd keeps every adapter on its own", "use --method joint or diag")
        if isinstance(self.clusters, int) and not 1 <= self.clusters <= adapters:
            raise UsageError(f"--clusters {self.clusters}: must be between 1 and the number of adapters, {adapters}")


class PlannedScheme(Struct, frozen=True):
    """A way to compress the collection, and about what it would take."""

    method: Method
    rank: int | None
    clusters: int
    bytes_bundle: int
    saved_ratio: float
    chosen: bool


def planned_schemes(collection: Collection, options: CompressOptions, clusters: int) -> list[PlannedScheme]:
    """Every method with the rank that ``options`` asks for or the method's default; the chosen one first.

    Clusters count as equally large and as having every module. Which adapters ``max_error`` would keep individually
    cannot be known from shapes.
    """
    original = sum(adapter.size_bytes for adapter in collection.adapters)
    schemes = []
    for method in sorted(_METHODS, key=lambda method: method != options.method):
        chosen = method == options.method
        rank = options.kept_rank if chosen else options.rank or DEFAULT_RANK[method]
        count = 0 if method == "svd" else clusters
        size = _bundle_bytes(collection, method, rank, count, options.dtype)
        schemes.append(PlannedScheme(method, rank, count, size, 1 - size / original, chosen))
    return schemes


def _bundle_bytes(collection: Collection, method: Method, rank: int | None, clusters: int, dtype: Dtype) -> int:
    adapters = collection.adapters
    extras = sum(info.size_bytes for adapter in adapters for info in adapter.extras.values())
    configs = sum(len(adapter.config_text) for adapter in adapters)
    if rank is None or method == "svd":
        numbers, tensors = _individual_numbers(collection, rank)
    else:
        numbers, tensors = _shared_numbers(collection, method, rank, clusters)
    manifest = len(adapters) * _ADAPTER_BYTES + len(collection.modules) * _MODULE_BYTES
    return numbers * DTYPES[dtype].itemsize + extras + configs + manifest + tensors * _HEADER_BYTES


def _individual_numbers(collection: Collection, rank: int | None) -> tuple[int, int]:
    """Numbers and tensors of truncated SVDs; without a rank, of the full ones."""
    parts = [part for adapter in collection.adapters for part in adapter.parts.values()]
    sizes = (min(rank or part.rank, part.rank) * (part.module.d_out + part.module.d_in) for part in parts)
    return sum(sizes), 2 * len(parts)


def _shared_numbers(collection: Collection, method: Method, rank: int, clusters: int) -> tuple[int, int]:
    """Numbers and tensors of shared bases and their cores."""
    numbers = 0
    for module in collection.modules:
        ranks = [a.parts[module.name].rank for a in collection.adapters if module.name in a.parts]
        stacked = -(-sum(ranks) // clusters)
        if method == "diag":
            width = min(rank, stacked)
            numbers += clusters * width * (module.d_out + module.d_in) + len(ranks) * width
        else:
            left, right = (min(rank, side, stacked) for side in (module.d_out, module.d_in))
            numbers += clusters * (left * module.d_out + right * module.d_in) + len(ranks) * left * right
    return numbers, 3 * clusters * len(collection.modules)
