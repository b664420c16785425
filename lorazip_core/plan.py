"""What a compression would take on disk, from shapes alone: no weight is read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from msgspec import Struct

from .bundle import Dtype, Method, Weights
from .errors import UsageError

if TYPE_CHECKING:
    from .adapter import Collection

DEFAULT_RANK = {"joint": 16, "diag": 16, "svd": 4}

_METHODS: tuple[Method, ...] = ("joint", "diag", "svd")
_ITEM_BYTES: dict[Dtype, int] = {"bf16": 2, "f16": 2, "f32": 4}

# Measured on real bundles, besides names: what a tensor adds to the header of its file, and what an adapter, a module,
# a file and a cluster add to the manifest.
_TENSOR_BYTES = 72
_ADAPTER_BYTES = 760
_MODULE_BYTES = 70
_FILE_BYTES = 130
_CLUSTER_BYTES = 240


class CompressOptions(Struct, frozen=True):
    """What to do. ``rank`` None means the method's default; ``clusters`` is a number, or the file of an assignment.

    ``memory`` and ``device_memory`` are `Bounds`, in bytes.
    """

    method: Method = "joint"
    rank: int | None = None
    clusters: int | Literal["auto"] | Path = 1
    dtype: Dtype = "bf16"
    seed: int = 0
    weights: Weights = "adapter"
    max_error: float | None = None
    device: str = "auto"
    memory: int | None = None
    device_memory: int | None = None

    @property
    def kept_rank(self) -> int | None:
        """The rank asked for or the method's default; None for an svd that only has to meet ``max_error``."""
        if self.rank is None and self.method == "svd" and self.max_error is not None:
            return None
        return self.rank if self.rank is not None else DEFAULT_RANK[self.method]

    def check(self, adapters: int | None = None) -> None:
        """Raise UsageError for options that make no sense, alone or for this many adapters."""
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank {self.rank}: must be at least 1")
        if self.max_error is not None and not 0 <= self.max_error <= 1:
            raise UsageError(f"--max-error {self.max_error}: a squared error is between 0 and 1")
        if self.dtype not in get_args(Dtype):
            raise UsageError(f"--dtype {self.dtype}: choose one of {', '.join(get_args(Dtype))}")
        if self.method == "svd" and self.clusters != 1:
            raise UsageError("--clusters: svd keeps every adapter on its own", "use --method joint or diag")
        check_clusters(self.clusters, adapters)


def check_clusters(clusters: int | str | Path, adapters: int | None) -> None:
    """Raise UsageError for a number of clusters that this many adapters, if it is known, do not fill."""
    if isinstance(clusters, int) and adapters is not None and not 1 <= clusters <= adapters:
        raise UsageError(f"--clusters {clusters}: must be between 1 and the number of adapters, {adapters}")


class PlannedScheme(Struct, frozen=True):
    """A way to compress the collection, and about what it would take."""

    method: Method
    rank: int | None
    clusters: int
    bytes_bundle: int
    saved_ratio: float
    chosen: bool


def planned_schemes(
    collection: Collection, options: CompressOptions, groups: Sequence[Sequence[int]]
) -> list[PlannedScheme]:
    """Every method with the rank that ``options`` asks for or the method's default; the chosen one first.

    ``groups`` are the numbers of the adapters that share a basis, see `equal_groups`. Which adapters ``max_error``
    would keep individually cannot be known from shapes.
    """
    original = sum(adapter.size_bytes for adapter in collection.adapters)
    schemes = []
    for method in sorted(_METHODS, key=lambda method: method != options.method):
        chosen = method == options.method
        rank = options.kept_rank if chosen else options.rank or DEFAULT_RANK[method]
        shared = [] if method == "svd" else groups
        size = bundle_bytes(collection, method, rank, shared, options.dtype)
        schemes.append(PlannedScheme(method, rank, len(shared), size, 1 - size / original, chosen))
    return schemes


def equal_groups(adapters: int, clusters: int) -> list[range]:
    """Clusters of equal size, to plan with while nobody knows better."""
    return [range(first, adapters, clusters) for first in range(clusters)]


def bundle_bytes(
    collection: Collection, method: Method, rank: int | None, groups: Sequence[Sequence[int]], dtype: Dtype
) -> int:
    """About the bytes of a bundle. ``groups``, empty for svd, are the numbers of the adapters that share a basis.

    Extras count for every adapter: that some are equal, and stored once, shows only when they are read.
    """
    adapters = collection.adapters
    item = _ITEM_BYTES[dtype]
    if rank is None or method == "svd":
        tensors, files = _individual_bytes(collection, rank, item), len(adapters)
    else:
        tensors = sum(_shared_bytes(collection, group, method, rank, item) for group in groups)
        files = 2 * len(groups)
    for adapter in adapters:
        tensors += sum(_tensor_bytes(key, info.size_bytes) for key, info in adapter.extras.items())
    files += len(adapters) + sum(bool(adapter.extras) for adapter in adapters)
    configs = sum(len(adapter.config_text) for adapter in adapters)
    manifest = files * _FILE_BYTES + len(groups) * _CLUSTER_BYTES
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


def _shared_bytes(collection: Collection, group: Sequence[int], method: Method, rank: int, item: int) -> int:
    """Bytes of the bases of one cluster and of its adapters' cores."""
    stacked: defaultdict[str, int] = defaultdict(int)
    having: Counter[str] = Counter()
    for number in group:
        for name, part in collection.adapters[number].parts.items():
            stacked[name] += part.rank
            having[name] += 1
    total = 0
    for module in collection.modules:
        name = module.name
        if name not in having:
            continue
        if method == "diag":
            left = right = core = min(rank, stacked[name])
        else:
            left, right = (min(rank, side, stacked[name]) for side in (module.d_out, module.d_in))
            core = left * right
        total += _tensor_bytes(name, left * module.d_out * item) + _tensor_bytes(name, right * module.d_in * item)
        total += _tensor_bytes(name, having[name] * core * item)
    return total
