"""The file that says who shares a basis: written by ``cluster``, read by ``compress``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from ..base.errors import UsageError
from ..bundle.kinds import schema_of, wrote
from ..bundle.manifest import Dtype, Weights

if TYPE_CHECKING:
    from ..adapter.collection import Collection


class AssignedAdapter(Struct, frozen=True, kw_only=True):
    """One adapter: where it is served, how well, and who is like it. Errors are squared errors over all modules."""

    name: str
    cluster: int
    sha256: str
    """Of the names and digests of its files, as `Scan.digests` gives it."""
    squared_error: float
    """In the basis of its own cluster."""
    next_cluster: int | None
    """The other cluster that would serve it best; null with one cluster."""
    next_squared_error: float | None
    held_out_squared_error: float
    """In a basis fitted to the others of its cluster alone, on the probe modules; 1 for an adapter on its own."""
    nearest: str | None
    """The other adapter whose subspaces hold most of this one's updates; null for a single adapter."""
    similarity: float | None
    """That share, on the probe modules."""


class ClusterFigures(Struct, frozen=True, kw_only=True):
    """One cluster. Similarities are means over pairs of different adapters, null where there is no pair."""

    adapters: int
    mean_squared_error: float
    max_squared_error: float
    similarity_within: float | None
    similarity_to_others: float | None


class Outlier(Struct, frozen=True, kw_only=True):
    """An adapter that no cluster serves.

    Its cluster has no other member (``alone``), it loses more than half of its update there (``loses-most``), or it
    is served only by what its cluster spends on it alone: a basis of the others would hold less than a fifth of it,
    and less than a quarter of what it would hold of the median adapter (``shares-nothing``).
    """

    name: str
    squared_error: float
    held_out_squared_error: float
    reason: Literal["alone", "loses-most", "shares-nothing"]


class NearDuplicate(Struct, frozen=True, kw_only=True):
    """Two adapters that hardly differ: ‖ΔW_i−ΔW_j‖² / max(‖ΔW_i‖², ‖ΔW_j‖²) over all modules is small."""

    first: str
    second: str
    squared_distance: float


class Candidate(Struct, frozen=True, kw_only=True):
    """A number of clusters that was tried (or, with ``method`` svd, a rank, for comparison), and what it gives.

    ``cost`` = mean squared error + bytes of the bundle / bytes of the originals: what is lost plus what is kept.
    """

    method: Literal["joint", "svd"]
    rank: int
    clusters: int
    bytes_bundle: int
    saved_ratio: float
    mean_squared_error: float
    max_squared_error: float
    cost: float
    measured_on: Literal["probes", "all"]
    chosen: bool


class Assignment(Struct, frozen=True, kw_only=True):
    """The whole file. Only ``schema`` and ``assignment`` are needed to compress by it."""

    schema: Literal["lorazip.clusters/1"] = "lorazip.clusters/1"
    assignment: dict[str, int]
    """The cluster of every adapter, by name."""
    base_model: str | None = None
    rank: int | None = None
    dtype: Dtype | None = None
    seed: int | None = None
    weights: Weights | None = None
    probes: list[str] = []
    """The modules on which starts and numbers of clusters were tried."""
    adapters: list[AssignedAdapter] = []
    clusters: list[ClusterFigures] = []
    outliers: list[Outlier] = []
    near_duplicates: list[NearDuplicate] = []
    candidates: list[Candidate] = []
    """What ``auto`` chose from, in ascending order of bytes; empty for a given number."""
    objective: list[float] = []
    """Σ of squared errors over adapters after each round of the alternation on all modules; it never rises."""

    def labels(self, names: list[str]) -> list[int]:
        """The cluster of each of ``names`` in it, numbered from 0 without a gap, in the order of first appearance."""
        numbers: dict[int, int] = {}
        assigned = (self.assignment[name] for name in names if name in self.assignment)
        return [numbers.setdefault(cluster, len(numbers)) for cluster in assigned]

    def differences(self, digests: Mapping[str, str]) -> list[str]:
        """The adapters, of ``digests`` by name, whose files are not those that this was made from."""
        return [
            adapter.name for adapter in self.adapters if digests.get(adapter.name, adapter.sha256) != adapter.sha256
        ]


def check_clusters(clusters: int | str | Path, adapters: int | None) -> None:
    """Raise UsageError for a number of clusters that this many adapters, if it is known, do not fill."""
    if isinstance(clusters, int) and adapters is not None and not 1 <= clusters <= adapters:
        raise UsageError(f"«clusters» {clusters}: must be between 1 and the number of adapters, {adapters}")


def read_assignment(path: Path, names: set[str], left_out: set[str], *, may_lack: bool = False) -> Assignment:
    """The assignment in a file, for adapters called ``names``; those ``left_out`` as bad may be in it, or not.

    With ``may_lack`` it may lack others too, which may yet turn out bad. Raises UsageError, by the name of the first
    that is wrong, when it was made for other adapters.
    """
    schema = schema_of(path)
    if schema is not None and schema.startswith("lorazip.") and not schema.startswith("lorazip.clusters/"):
        raise UsageError(f"«clusters» {path}: a file of {wrote(schema)}", "name the one that 'lorazip cluster' wrote")
    try:
        read = msgspec.json.decode(path.read_bytes(), type=Assignment)
    except FileNotFoundError:
        raise UsageError(f"«clusters» {path}: neither a number nor a file") from None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"«clusters» {path}: not an assignment of adapters to numbers: {error}") from None
    for name in sorted(names.symmetric_difference(read.assignment) - left_out):
        if may_lack and name in names:
            continue
        where = "is not in it" if name in names else "is not in the collection"
        raise UsageError(f"«clusters» {path}: it was made for other adapters: {name!r} {where}")
    return read


def read_clusters(path: Path, collection: Collection, *, may_lack: bool = False) -> Assignment:
    """As `read_assignment`, for a collection."""
    names = {adapter.name for adapter in collection.adapters}
    return read_assignment(path, names, {skipped.name for skipped in collection.skipped}, may_lack=may_lack)
