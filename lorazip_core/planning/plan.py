"""What a compression would take on disk, from shapes alone: no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from msgspec import Struct

from ..base.errors import UsageError
from ..bundle.manifest import Dtype, Method, Weights
from ..bundle.size import bundle_bytes
from ..clustering.clusters_file import check_clusters

if TYPE_CHECKING:
    from ..adapter.collection import Collection

DEFAULT_RANK = {"joint": 16, "diag": 16, "svd": 4}

_METHODS: tuple[Method, ...] = ("joint", "diag", "svd")


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
