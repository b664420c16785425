"""What a compression would take on disk, from shapes alone: no weight is read."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from .adapter import Collection
from .bundle import DTYPES, Dtype, Method, Weights
from .errors import UsageError

DEFAULT_RANK = {"joint": 16, "diag": 16, "svd": 4}

_METHODS: tuple[Method, ...] = ("joint", "diag", "svd")

# Measured on real bundles, besides names: what a tensor adds to the header of its file, and what an adapter, a module,
# a file and a cluster add to the manifest.
_TENSOR_BYTES = 72
_ADAPTER_BYTES = 760
_MODULE_BYTES = 70
_FILE_BYTES = 130
_CLUSTER_BYTES = 240


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
    item = DTYPES[dtype].itemsize
    if rank is None or method == "svd":
        tensors, files = _individual_bytes(collection, rank, item), len(adapters)
    else:
        tensors, files = _shared_bytes(collection, method, rank, clusters, item), 2 * clusters
    for adapter in adapters:
        tensors += sum(_tensor_bytes(key, info.size_bytes) for key, info in adapter.extras.items())
    files += len(adapters) + sum(bool(adapter.extras) for adapter in adapters)
    configs = sum(len(adapter.config_text) for adapter in adapters)
    manifest = files * _FILE_BYTES + clusters * _CLUSTER_BYTES
    manifest += sum(_ADAPTER_BYTES + len(adapter.name) for adapter in adapters)
    manifest += sum(_MODULE_BYTES + len(module.name) for module in collection.modules)
    return tensors + configs + manifest


def _tensor_bytes(name: str, data: int) -> int:
    return data + _TENSOR_BYTES + len(name)


def _individual_bytes(collection: Collection, rank: int | None, item: int) -> int:
    """Bytes of truncated SVDs; without a rank, of the full ones."""
    total = 0
    for adapter in collection.adapters:
        for name, part in adapter.parts.items():
            kept = min(rank or part.rank, part.rank)
            total += _tensor_bytes(name, kept * part.module.d_out * item)
            total += _tensor_bytes(name, kept * part.module.d_in * item)
    return total


def _shared_bytes(collection: Collection, method: Method, rank: int, clusters: int, item: int) -> int:
    """Bytes of shared bases and their cores."""
    total = 0
    for module in collection.modules:
        ranks = [a.parts[module.name].rank for a in collection.adapters if module.name in a.parts]
        stacked = -(-sum(ranks) // clusters)
        if method == "diag":
            left = right = core = min(rank, stacked)
        else:
            left, right = (min(rank, side, stacked) for side in (module.d_out, module.d_in))
            core = left * right
        total += clusters * _tensor_bytes(module.name, left * module.d_out * item)
        total += clusters * _tensor_bytes(module.name, right * module.d_in * item)
        total += clusters * _tensor_bytes(module.name, 0) + len(ranks) * core * item
    return total
