"""The verb itself: from a directory of adapters to a bundle."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Literal

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from ..adapter import Collection, open_collection
from ..bundle import DTYPES, BundleWriter, Manifest, Parameters, SkippedEntry, is_bundle
from ..cluster import assign_clusters
from ..errors import LocalError, UsageError
from ..files import atomic_directory, check_output
from ..plan import CompressOptions, PlannedScheme, planned_schemes
from ..progress import Progress, Silent
from ..stack import Stack
from ..summary import Summary, summarise
from ..workers import in_order
from .assemble import Assembly
from .individual import Individual, keep_individually
from .scan import Scan, scan
from .shared import SharedJob, encode_clusters

_SILENT = Silent()


class _ClusterFile(Struct):
    schema: Literal["lorazip.clusters/1"]
    assignment: dict[str, int]


class PlanReport(Struct, frozen=True, kw_only=True):
    """What ``compress --dry-run`` prints: the collection, and the bytes of every scheme."""

    schema: Literal["lorazip.plan/1"] = "lorazip.plan/1"
    base_model: str | None
    adapters: int
    modules: int
    skipped: list[SkippedEntry]
    bytes_original: int
    schemes: list[PlannedScheme]


class WorstAdapter(Struct, frozen=True):
    """The adapter of largest squared error."""

    name: str
    squared_error: float


class CompressReport(Struct, frozen=True, kw_only=True):
    """What ``compress`` did."""

    schema: Literal["lorazip.compress/1"] = "lorazip.compress/1"
    bundle: str
    base_model: str | None
    method: str
    rank: int | None
    clusters: list[int]
    """The number of adapters in each cluster."""
    individual: list[str]
    """The adapters that are kept individually."""
    skipped: list[SkippedEntry]
    zero: list[str]
    """The adapters whose updates are all zero."""
    summary: Summary
    worst: WorstAdapter
    seconds: float


def plan(
    root: Path,
    options: CompressOptions,
    *,
    allow_pickle: bool = False,
    allow_mixed_base: bool = False,
    skip_bad: bool = False,
) -> PlanReport:
    """What each scheme would take on disk, from headers alone. Raises as `compress` does for what headers can tell."""
    collection = open_collection(root, allow_pickle=allow_pickle, allow_mixed_base=allow_mixed_base, skip_bad=skip_bad)
    options.check(len(collection.adapters))
    labels = _labels_of_file(options.clusters, collection) if isinstance(options.clusters, Path) else None
    clusters = options.clusters if isinstance(options.clusters, int) else len(set(labels or []))
    return PlanReport(
        base_model=collection.base_model,
        adapters=len(collection.adapters),
        modules=len(collection.modules),
        skipped=[SkippedEntry(*skipped) for skipped in collection.skipped],
        bytes_original=sum(adapter.size_bytes for adapter in collection.adapters),
        schemes=planned_schemes(collection, options, clusters),
    )


def compress(
    root: Path,
    output: Path,
    options: CompressOptions,
    *,
    allow_pickle: bool = False,
    allow_mixed_base: bool = False,
    skip_bad: bool = False,
    force: bool = False,
    progress: Progress = _SILENT,
) -> CompressReport:
    """Compress the adapters below ``root`` into a bundle at ``output``, which appears whole or not at all.

    Raises AdapterErrors for adapters that cannot be used (unless ``skip_bad``), OutputExists, UsageError for options
    that make no sense, and LocalError for a device that is not there or a value that the dtype cannot hold.
    """
    started = time.monotonic()
    device = find_device(options.device)
    check_output(output, force=force, replaceable=is_bundle)
    collection = open_collection(root, allow_pickle=allow_pickle, allow_mixed_base=allow_mixed_base, skip_bad=skip_bad)
    options.check(len(collection.adapters))
    if isinstance(options.clusters, Path):
        _labels_of_file(options.clusters, collection)  # a mistake in it should not cost the reading of all weights
    with atomic_directory(output, force=force, replaceable=is_bundle) as folder:
        with progress.stage("reading adapters", len(collection.adapters)) as advance:
            scanned = scan(collection, skip_bad=skip_bad, advance=advance)
        for skipped in scanned.collection.skipped:
            progress.note(f"left out {skipped.name}: {skipped.reason}")
        options.check(len(scanned.collection.adapters))
        manifest = _encode(scanned, options, device, BundleWriter(folder), progress)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return _report(output, manifest, size, time.monotonic() - started)


def find_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu`` or ``cuda[:N]``. Raises UsageError, or LocalError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if wanted is None:
        raise UsageError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(wanted[1] or 0) >= torch.cuda.device_count():
        raise LocalError(f"--device {name}: not there ({torch.cuda.device_count()} CUDA devices)", "use --device cpu")
    return torch.device(name)


def _encode(
    scanned: Scan, options: CompressOptions, device: torch.device, writer: BundleWriter, progress: Progress
) -> Manifest:
    collection, rank, dtype = scanned.collection, options.kept_rank, DTYPES[options.dtype]
    adapters, modules = collection.adapters, collection.modules

    def load(module: int) -> Stack:
        name = modules[module].name
        members = [number for number, adapter in enumerate(adapters) if name in adapter.parts]
        return Stack.of([adapters[number].factors(name) for number in members], members).to(device)

    labels: list[int | None] = [None] * len(adapters)
    clusters = 0
    assembly = Assembly(writer, scanned)
    if options.method != "svd":
        assert rank is not None
        weights = _weights(scanned.norms, options.weights)
        if isinstance(options.clusters, Path):
            assigned = _labels_of_file(options.clusters, collection)
        elif options.clusters == 1:
            assigned = [0] * len(adapters)
        else:
            with progress.stage("clustering", len(modules)) as advance:
                assigned = assign_clusters(
                    load,
                    weights,
                    scanned.norms,
                    options.clusters,
                    rank,
                    seed=options.seed,
                    device=device,
                    advance=advance,
                )
        clusters = len(set(assigned))
        job = SharedJob(load, weights, scanned.norms, options.method, rank, dtype, options.seed, device)
        with progress.stage("fitting bases", len(modules)) as advance:
            encoded, labels = encode_clusters(job, list(assigned), options.max_error, advance)
        assembly.add_clusters(encoded, options.method)
    alone = [number for number, label in enumerate(labels) if label is None]
    with progress.stage("keeping adapters individually", len(alone)) as advance:

        def keep(number: int) -> Individual:
            return keep_individually(
                adapters[number],
                rank if options.method == "svd" else None,
                options.max_error,
                squared_norm=float(scanned.norms[number].sum()),
                dtype=dtype,
                device=device,
            )

        for number, kept in zip(alone, in_order(keep, alone, device), strict=True):
            assembly.add_individual(number, kept)
            if options.method != "svd":
                how = "as it was" if kept.rank is None else f"at rank {kept.rank}"
                progress.note(f"kept {adapters[number].name} {how}: it would exceed --max-error {options.max_error}")
            advance(1)
    parameters = Parameters(
        method=options.method,
        rank=rank,
        clusters=clusters,
        dtype=options.dtype,
        seed=options.seed,
        weights=options.weights,
        max_error=options.max_error,
    )
    return assembly.finish(parameters)


def _weights(norms: Tensor, per: Literal["adapter", "module"]) -> Tensor:
    """w_im = 1/Σ_m‖ΔW_im‖², or 1/‖ΔW_im‖² per module, of shape [n, M]; 0 for an update that is all zero."""
    energy = norms.sum(1, keepdim=True).expand_as(norms) if per == "adapter" else norms
    return torch.where(energy > 0, 1 / energy, 0.0)


def _labels_of_file(path: Path, collection: Collection) -> list[int]:
    """The clusters of a file ``{"schema": "lorazip.clusters/1", "assignment": {adapter: number}}``, numbered from 0."""
    try:
        assignment = msgspec.json.decode(path.read_bytes(), type=_ClusterFile).assignment
    except FileNotFoundError:
        raise UsageError(f"--clusters {path}: neither a number nor a file") from None
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"--clusters {path}: not an assignment of adapters to numbers: {error}") from None
    here = {adapter.name for adapter in collection.adapters}
    left_out = {skipped.name for skipped in collection.skipped}
    for name in sorted(here.symmetric_difference(assignment) - left_out):
        where = "is not in it" if name in here else "is not in the collection"
        raise UsageError(f"--clusters {path}: it was made for other adapters: {name!r} {where}")
    numbers: dict[int, int] = {}
    return [numbers.setdefault(assignment[adapter.name], len(numbers)) for adapter in collection.adapters]


def _report(output: Path, manifest: Manifest, size: int, seconds: float) -> CompressReport:
    adapters = manifest.adapters
    worst = max(adapters, key=lambda adapter: adapter.squared_error)
    original = sum(file.size_bytes for adapter in adapters for file in adapter.files)
    return CompressReport(
        bundle=str(output),
        base_model=manifest.base_model,
        method=manifest.parameters.method,
        rank=manifest.parameters.rank,
        clusters=[sum(len(shard.adapters) for shard in cluster.shards) for cluster in manifest.clusters],
        individual=[adapter.name for adapter in adapters if adapter.cluster is None],
        skipped=manifest.skipped,
        zero=[adapter.name for adapter in adapters if adapter.squared_norm == 0],
        summary=summarise(len(adapters), [adapter.squared_error for adapter in adapters], original, size),
        worst=WorstAdapter(worst.name, worst.squared_error),
        seconds=seconds,
    )
