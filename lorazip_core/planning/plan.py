"""What a compression would take on disk and of memory from shapes alone, and lose, for which all weights are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from msgspec import Struct

from ..adapter.collection import Collection, open_collection
from ..base.device import find_device
from ..base.errors import LocalError, UsageError
from ..base.progress import Progress, Silent
from ..bundle.kinds import check_adapters_path
from ..bundle.manifest import Method, SkippedEntry
from ..bundle.size import bundle_bytes, equal_groups
from ..clustering.clusters_file import Assignment, read_clusters
from ..model.calibration import calibration_for
from ..reading.memory import Bounds, Task, planned_bytes, working_within
from ..reading.scan import scan_for
from ..schemes.registry import SCHEMES, methods
from .frontier import Frontier, FrontierPoint, frontier
from .options import CompressOptions
from .spectra import Spectra, planned_step

_SILENT = Silent()


class PlannedScheme(Struct, frozen=True):
    """A way to compress the collection, and about what it would take."""

    method: Method
    rank: int | None
    clusters: int
    bytes_bundle: int
    saved_ratio: float
    chosen: bool


class PlanReport(Struct, frozen=True, kw_only=True):
    """What ``compress --dry-run`` prints: the collection, and the bytes of every scheme."""

    schema: Literal["lorazip.plan/1"] = "lorazip.plan/1"
    base_model: str | None
    adapters: int
    modules: int
    skipped: list[SkippedEntry]
    bytes_original: int
    schemes: list[PlannedScheme]
    frontier: list[FrontierPoint] = []
    """By size, where the method is one whose errors can be predicted; the chosen one among them."""
    comparison: str | None = None
    """How the method that ``auto`` is compares with others at the same size, in a line; null for a named method."""
    weighted: bool = False
    """Whether the errors of ``frontier`` are weighted by inputs."""
    within_bound: bool | None = None
    """Whether the chosen one is predicted to meet the budget or mean error; null where none is asked for."""
    problems: int = 0
    """Shared bases to be found, one for each module of each cluster; 0 for svd, which decomposes each adapter alone."""
    memory_bytes: int | None = None
    """An upper bound on main memory on this machine, without ``memory``; null if the device is not there."""
    least_memory_bytes: int | None = None
    """The least that ``memory`` may be."""
    output_exists: bool | None = None
    """Whether something is where the bundle would go, which takes ``force``; null if no place was named."""
    left_out: dict[str, list[str]] = {}
    """By adapter, files in its folder with weights that are not its own: they will not be in the bundle."""


def plan(
    root: Path,
    options: CompressOptions,
    *,
    output: Path | None = None,
    allow_pickle: bool = False,
    allow_mixed_base: bool = False,
    skip_bad: bool = False,
    progress: Progress = _SILENT,
) -> PlanReport:
    """What each scheme would take on disk, and the chosen one of memory.

    From headers alone, but for a method whose errors follow from singular values: then all weights are read, once or
    twice, for `PlanReport.frontier`.

    Raises as `compress` does for what headers can tell, but not for an ``output`` that exists: the report says so.
    """
    check_adapters_path(root)
    collection = open_collection(root, allow_pickle=allow_pickle, allow_mixed_base=allow_mixed_base, skip_bad=skip_bad)
    options.check(len(collection.adapters))
    if options.clusters == "auto":
        raise UsageError(
            "«clusters» auto cannot be planned: it depends on the weights", "plan with a number, or a file"
        )
    groups: Sequence[Sequence[int]]
    if isinstance(options.clusters, Path):
        groups = _groups(read_clusters(options.clusters, collection, may_lack=skip_bad), collection)
    else:
        groups = equal_groups(len(collection.adapters), options.clusters)
    memory = _planned_memory(collection, options)
    predicted = _frontier(collection, options, skip_bad=skip_bad, progress=progress)
    return PlanReport(
        base_model=collection.base_model,
        adapters=len(collection.adapters),
        modules=len(collection.modules),
        skipped=[SkippedEntry(*skipped) for skipped in collection.skipped],
        bytes_original=sum(adapter.size_bytes for adapter in collection.adapters),
        schemes=planned_schemes(collection, options, groups),
        frontier=predicted.points if predicted else [],
        comparison=predicted.comparison(options) if predicted else None,
        weighted=options.calibration is not None,
        within_bound=_within_bound(predicted, options, len(collection.adapters)),
        problems=_problems(collection, groups) if options.scheme.shared else 0,
        memory_bytes=memory and memory[0],
        least_memory_bytes=memory and memory[1],
        output_exists=None if output is None else os.path.lexists(output),
        left_out={name: list(files) for name, files in collection.left_out.items()},
    )


def _within_bound(predicted: Frontier | None, options: CompressOptions, adapters: int) -> bool | None:
    if predicted is None or not options.planned:
        return None
    [chosen] = (point for point in predicted.points if point.chosen)
    most = options.most_bytes(adapters)
    if most is not None:
        return chosen.bytes <= most
    return chosen.mean_squared_error <= (options.max_mean_error or 0)


def _frontier(
    collection: Collection, options: CompressOptions, *, skip_bad: bool, progress: Progress
) -> Frontier | None:
    """What singular values say; None for a method of which they say nothing, without reading a weight."""
    if not options.by_spectrum:
        return None
    device = find_device(options.device)
    task = Task.of(options.chosen, 1, 1, len(collection.adapters))
    calibration = calibration_for(options.calibration, collection, progress)
    with working_within(device, collection, task, Bounds(options.memory, options.device_memory)) as within:
        singular = options.reads_spectra(predict=True)
        scanned = scan_for(collection, within, skip_bad=skip_bad, device=device, progress=progress, singular=singular)
        spectra = Spectra.of(scanned, device, progress, None if calibration is None else calibration.inputs_of)
        return frontier(spectra, scanned, planned_step(spectra, scanned, options), options)


def _planned_memory(collection: Collection, options: CompressOptions) -> tuple[int, int] | None:
    """As `planned_bytes`; None for a device that another machine may have, and this one has not."""
    try:
        device = find_device(options.device)
    except LocalError:
        return None
    task = Task.of(options.chosen, options.kept_rank or 1, options.clusters, len(collection.adapters))
    return planned_bytes(device, collection, task)


def _problems(collection: Collection, groups: Sequence[Sequence[int]]) -> int:
    """How many bases there are to be found: a cluster has one for each module that any of its adapters has."""
    return sum(len({name for number in group for name in collection.adapters[number].parts}) for group in groups)


def planned_schemes(
    collection: Collection, options: CompressOptions, groups: Sequence[Sequence[int]]
) -> list[PlannedScheme]:
    """Every method with the rank that ``options`` asks for or the method's default; the chosen one first.

    ``groups`` are the numbers of the adapters that share a basis, see `equal_groups`. Which adapters ``max_error``
    would keep individually cannot be known from shapes.
    """
    original = sum(adapter.size_bytes for adapter in collection.adapters)
    schemes = []
    for method in sorted(methods(), key=lambda method: method != options.chosen):
        chosen = method == options.chosen
        default = SCHEMES[method].default_rank
        rank = options.kept_rank if chosen else default and (options.rank or default)
        shared = groups if SCHEMES[method].shared else []
        size = bundle_bytes(collection, method, rank, shared, options.dtype)
        schemes.append(PlannedScheme(method, rank, len(shared), size, 1 - size / original, chosen))
    return schemes


def _groups(assignment: Assignment, collection: Collection) -> list[list[int]]:
    here = [i for i, adapter in enumerate(collection.adapters) if adapter.name in assignment.assignment]
    labels = assignment.labels([collection.adapters[i].name for i in here])
    groups: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for i, label in zip(here, labels, strict=True):
        groups[label].append(i)
    return groups
