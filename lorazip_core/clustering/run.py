"""The verb itself: from a directory of adapters to the file that says who shares a basis."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy
import torch
from msgspec import Struct
from torch import Tensor

from ..adapter.collection import open_collection
from ..adapter.notes import notes
from ..base.device import find_device
from ..base.errors import UsageError
from ..base.progress import Progress, Silent
from ..bundle.kinds import check_adapters_path
from ..bundle.manifest import Dtype, SkippedEntry, Weights
from ..reading.memory import Bounds, Task, working_within
from ..reading.scan import Scan, scan_for
from ..reading.updates import Updates
from .alternation import Clustering, Probes, alternate
from .choose import choose_clusters
from .clusters_file import (
    AssignedAdapter,
    Assignment,
    Candidate,
    ClusterFigures,
    NearDuplicate,
    Outlier,
    check_clusters,
)
from .similarity import held_out_errors, near_duplicates

_SILENT = Silent()
_ROWS = 1024  # of all pairs of adapters, looked at together
_LOST = 0.5  # squared error above which a cluster does not serve an adapter
_LITTLE = 0.2  # share of an adapter that a basis of the others holds, below which it may be a stranger …
_UNUSUAL = 0.25  # … if it is also below this part of what such a basis holds of the median adapter


class ClusterOptions(Struct, frozen=True):
    """What to do. ``dtype`` is what the bundle will store: bytes depend on it. The last two are `Bounds`, in bytes."""

    clusters: int | Literal["auto"] = "auto"
    rank: int = 16
    dtype: Dtype = "bf16"
    seed: int = 0
    weights: Weights = "adapter"
    device: str = "auto"
    memory: int | None = None
    device_memory: int | None = None


class ClusterReport(Struct, frozen=True, kw_only=True):
    """What ``cluster`` found, and what ``cluster --json`` prints: the file without the lines of single adapters."""

    schema: Literal["lorazip.cluster/1"] = "lorazip.cluster/1"
    output: str
    base_model: str | None
    adapters: int
    rank: int
    mean_squared_error: float
    max_squared_error: float
    clusters: list[ClusterFigures]
    outliers: list[Outlier]
    near_duplicates: list[NearDuplicate]
    candidates: list[Candidate]
    skipped: list[SkippedEntry]
    seconds: float


class Clustered(NamedTuple):
    """The file, what there is to say of it, and the similarity [n, n] of its adapters (`subspace_similarity`)."""

    assignment: Assignment
    report: ClusterReport
    similarity: numpy.ndarray


def cluster(
    root: Path,
    output: Path,
    options: ClusterOptions,
    *,
    allow_pickle: bool = False,
    allow_mixed_base: bool = False,
    skip_bad: bool = False,
    progress: Progress = _SILENT,
) -> Clustered:
    """Group the adapters below ``root`` for shared bases; ``output`` is where the caller will write the file.

    Raises AdapterErrors for adapters that cannot be used (unless ``skip_bad``), UsageError for options that make no
    sense, LocalError for a device that is not there, and for the lock of ``root`` as `read_lock` does.
    """
    started = time.monotonic()
    device = find_device(options.device)
    if options.rank < 1:
        raise UsageError(f"«rank» {options.rank}: must be at least 1")
    check_adapters_path(root)
    collection = open_collection(root, allow_pickle=allow_pickle, allow_mixed_base=allow_mixed_base, skip_bad=skip_bad)
    for note in notes(collection):
        progress.note(note)
    check_clusters(options.clusters, len(collection.adapters))
    task = Task.of("joint", options.rank, options.clusters, len(collection.adapters))
    with working_within(device, collection, task, Bounds(options.memory, options.device_memory)) as within:
        scanned = scan_for(collection, within, skip_bad=skip_bad, device=device, progress=progress)
        check_clusters(options.clusters, len(scanned.collection.adapters))
        updates = scanned.updates(options.weights, device, within.budget)
        assignment, similarity = _assign(scanned, updates, options, progress)
        scanned.check_unchanged()
    report = _report(output, options, assignment, scanned, time.monotonic() - started)
    return Clustered(assignment, report, similarity.numpy())


def _report(
    output: Path, options: ClusterOptions, assignment: Assignment, scanned: Scan, seconds: float
) -> ClusterReport:
    errors = [adapter.squared_error for adapter in assignment.adapters]
    return ClusterReport(
        output=str(output),
        base_model=assignment.base_model,
        adapters=len(errors),
        rank=options.rank,
        mean_squared_error=float(numpy.mean(errors)),
        max_squared_error=max(errors),
        clusters=assignment.clusters,
        outliers=assignment.outliers,
        near_duplicates=assignment.near_duplicates,
        candidates=assignment.candidates,
        skipped=[SkippedEntry(*skipped) for skipped in scanned.collection.skipped],
        seconds=seconds,
    )


def _assign(scanned: Scan, updates: Updates, options: ClusterOptions, progress: Progress) -> tuple[Assignment, Tensor]:
    collection, rank, seed = scanned.collection, options.rank, options.seed
    probes = Probes(updates, rank)
    candidates: list[Candidate] = []
    if options.clusters == "auto":
        clustering, candidates = choose_clusters(
            collection, updates, probes, rank, dtype=options.dtype, seed=seed, progress=progress
        )
    else:
        tried = probes.cluster(options.clusters, seed=seed)
        clustering = alternate(updates, tried.labels, rank, seed=seed, progress=progress)
    held_out = held_out_errors(probes.updates, clustering.labels, rank, seed=seed)
    near = near_duplicates(updates, seed=seed, progress=progress)
    names = [adapter.name for adapter in collection.adapters]
    similarity = probes.similarity()
    adapters = _adapters(names, scanned.digests(), clustering, held_out, similarity)
    assignment = Assignment(
        assignment=dict(zip(names, clustering.labels, strict=True)),
        base_model=collection.base_model,
        rank=rank,
        dtype=options.dtype,
        seed=seed,
        weights=options.weights,
        probes=[collection.modules[module].name for module in probes.modules],
        adapters=adapters,
        clusters=_clusters(clustering, similarity),
        outliers=_outliers(adapters, (scanned.norms.sum(1) > 0).tolist()),
        near_duplicates=[
            NearDuplicate(first=names[each.first], second=names[each.second], squared_distance=each.squared_distance)
            for each in near
        ],
        candidates=candidates,
        objective=clustering.objective,
    )
    return assignment, similarity


def _adapters(
    names: list[str], digests: list[str], clustering: Clustering, held_out: Tensor, similarity: Tensor
) -> list[AssignedAdapter]:
    labels = torch.tensor(clustering.labels)
    others = clustering.squared_errors.scatter(1, labels[:, None], float("inf"))
    next_error, next_cluster = others.min(1)
    share, nearest = _nearest(similarity)
    has_next, has_near = others.shape[1] > 1, len(names) > 1
    return [
        AssignedAdapter(
            name=name,
            cluster=clustering.labels[i],
            sha256=digests[i],
            squared_error=float(clustering.own_errors[i]),
            next_cluster=int(next_cluster[i]) if has_next else None,
            next_squared_error=float(next_error[i]) if has_next else None,
            held_out_squared_error=float(held_out[i]),
            nearest=names[int(nearest[i])] if has_near else None,
            similarity=float(share[i]) if has_near else None,
        )
        for i, name in enumerate(names)
    ]


def _nearest(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """How much of every adapter the one that it is most like holds, and which that is, [n] each; −1 if it is alone."""
    found = []
    for rows in torch.split(torch.arange(len(similarity)), _ROWS):
        others = similarity[rows].scatter(1, rows[:, None], -1.0)
        found.append(others.max(1))
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _clusters(clustering: Clustering, similarity: Tensor) -> list[ClusterFigures]:
    labels, errors = torch.tensor(clustering.labels), clustering.own_errors
    belongs = torch.nn.functional.one_hot(labels).to(similarity)  # [n, K]
    own = similarity.diagonal()
    sums = (belongs.mT @ similarity @ belongs).double()
    figures = []
    for number, size in enumerate(belongs.sum(0).int().tolist()):
        inside = labels == number
        within = float(sums[number, number]) - float(own[inside].sum())
        across = float(sums[number].sum() - sums[number, number])
        pairs, strangers = size * (size - 1), size * (len(labels) - size)
        figures.append(
            ClusterFigures(
                adapters=size,
                mean_squared_error=float(errors[inside].mean()),
                max_squared_error=float(errors[inside].max()),
                similarity_within=within / pairs if pairs else None,
                similarity_to_others=across / strangers if strangers else None,
            )
        )
    return figures


def _outliers(adapters: list[AssignedAdapter], has_energy: list[bool]) -> list[Outlier]:
    """As `Outlier` defines them, in the order of names; a zero adapter needs no cluster, and a single one has none."""
    if len(adapters) == 1:
        return []
    sizes: dict[int, int] = {}
    for adapter in adapters:
        sizes[adapter.cluster] = sizes.get(adapter.cluster, 0) + 1
    usual = 1 - float(numpy.median([adapter.held_out_squared_error for adapter in adapters]))
    found = []
    for adapter in (each for each, some in zip(adapters, has_energy, strict=True) if some):
        shared = 1 - adapter.held_out_squared_error
        reason: Literal["alone", "loses-most", "shares-nothing"]
        if sizes[adapter.cluster] == 1:
            reason = "alone"
        elif adapter.squared_error > _LOST:
            reason = "loses-most"
        elif shared < min(_LITTLE, _UNUSUAL * usual):
            reason = "shares-nothing"
        else:
            continue
        found.append(
            Outlier(
                name=adapter.name,
                squared_error=adapter.squared_error,
                held_out_squared_error=adapter.held_out_squared_error,
                reason=reason,
            )
        )
    return found
