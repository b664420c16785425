"""The verb itself: from a directory of adapters to a bundle."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from msgspec import Struct

from .. import team
from ..adapter import Collection, open_collection
from ..assign import Probes, settle
from ..assignment import Assignment, read_assignment
from ..bundle import DTYPES, BundleWriter, Manifest, Parameters, SkippedEntry, is_bundle
from ..cluster import choose_clusters
from ..device import find_device, hold_to
from ..errors import UsageError
from ..files import Building, check_output, resumable_directory
from ..memory import Bounds, Task, agreed, room
from ..packs import Budget
from ..plan import CompressOptions, PlannedScheme, equal_groups, planned_schemes
from ..progress import Progress, Silent
from ..scan import Scan, scan
from ..summary import Summary, summarise
from ..updates import Updates
from ..workers import at_most, in_order, threads_for
from .assemble import Assembly
from .individual import Kept, individual_piece, keep_individually, stored
from .key import work_key
from .pieces import Pieces, note_left
from .shared import LABELS, Encoded, SharedJob, encode_clusters

_SILENT = Silent()


class PlanReport(Struct, frozen=True, kw_only=True):
    """What ``compress --dry-run`` prints: the collection, and the bytes of every scheme."""

    schema: Literal["lorazip.plan/1"] = "lorazip.plan/1"
    base_model: str | None
    adapters: int
    modules: int
    skipped: list[SkippedEntry]
    bytes_original: int
    schemes: list[PlannedScheme]
    left_out: dict[str, list[str]] = {}
    """By adapter, files in its folder with weights that are not its own: they will not be in the bundle."""


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
    device_peak_bytes: int | None
    """The most memory that PyTorch had taken on the GPU of the first process; null on a CPU."""
    left_out: dict[str, list[str]] = {}
    """By adapter, files in its folder with weights that are not its own, and not in the bundle."""


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
    if options.clusters == "auto":
        raise UsageError(
            "--clusters auto cannot be planned: it depends on the weights", "plan with a number, or a file"
        )
    groups: Sequence[Sequence[int]]
    if isinstance(options.clusters, Path):
        groups = _groups(_read_clusters(options.clusters, collection, may_lack=skip_bad), collection)
    else:
        groups = equal_groups(len(collection.adapters), options.clusters)
    return PlanReport(
        base_model=collection.base_model,
        adapters=len(collection.adapters),
        modules=len(collection.modules),
        skipped=[SkippedEntry(*skipped) for skipped in collection.skipped],
        bytes_original=sum(adapter.size_bytes for adapter in collection.adapters),
        schemes=planned_schemes(collection, options, groups),
        left_out={name: list(files) for name, files in collection.left_out.items()},
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

    A run that is interrupted or killed keeps the pieces that it has finished beside ``output``; the next one with the
    same inputs and options goes on from them, to the same bytes.

    Raises AdapterErrors for adapters that cannot be used (unless ``skip_bad``), OutputExists, UsageError for options
    that make no sense, LocalError for a device that is not there or a value that the dtype cannot hold, and for the
    lock of ``root`` as `read_lock` does.
    """
    started = time.monotonic()
    device = find_device(options.device)
    check_output(output, force=force, replaceable=is_bundle)
    collection = open_collection(root, allow_pickle=allow_pickle, allow_mixed_base=allow_mixed_base, skip_bad=skip_bad)
    options.check(len(collection.adapters))
    if isinstance(options.clusters, Path):
        # A mistake in it should not cost the reading of all weights. What only they can tell is bad may be missing.
        _read_clusters(options.clusters, collection, may_lack=skip_bad)
    task = Task.of(options.method, options.kept_rank or 1, options.clusters, len(collection.adapters))
    within = room(device, collection, task, Bounds(options.memory, options.device_memory))
    hold_to(device, options.device_memory)
    with (
        at_most(within.workers),
        threads_for(device),
        team.joined(),
        _building(output, force) as building,
        _heard(progress),
    ):
        budget = agreed(within).budget
        with progress.stage("reading adapters", len(team.dealt(len(collection.adapters)))) as advance:
            scanned = scan(collection, skip_bad=skip_bad, advance=advance, device=device, placement=within.placement)
        for note in scanned.collection.notes():
            progress.note(note)
        options.check(len(scanned.collection.adapters))
        pieces = team.from_first(lambda: _pieces(building, work_key(scanned, options, device, budget)))
        run = _Run(scanned, options, device, budget, pieces, progress)
        encoded, clusters = run.encode()

        def assembled() -> CompressReport:
            assert building is not None
            manifest, size = run.assemble(BundleWriter(building.path), encoded, clusters)
            return _report(output, manifest, size, time.monotonic() - started, device)

        report = team.from_first(assembled)
    return report


def _building(output: Path, force: bool) -> AbstractContextManager[Building | None]:
    """The directory that becomes the bundle, which is the affair of the first process alone."""
    if team.is_first():
        return resumable_directory(output, force=force, replaceable=is_bundle)
    return nullcontext()


def _pieces(building: Building | None, key: str) -> Pieces:
    assert building is not None
    pieces = Pieces(building.work(key))
    pieces.check()
    return pieces


@contextmanager
def _heard(progress: Progress) -> Iterator[None]:
    """An interruption that a library has turned into another failure is one all the same: steps of progress know."""
    try:
        yield
    except Exception:
        with progress.stage("stopping", 0) as advance:
            advance(0)
        raise


@dataclass(frozen=True)
class _Run:
    """One compression. Between its two steps there is nothing but pieces, and what they tell."""

    scanned: Scan
    options: CompressOptions
    device: torch.device
    budget: Budget
    pieces: Pieces
    progress: Progress

    def encode(self) -> tuple[Encoded | None, int]:
        """Make all pieces that are not there yet; what shares bases, and in how many clusters."""
        encoded, clusters = None, 0
        alone = list(range(len(self.scanned.collection.adapters)))
        options = self.options
        if options.method != "svd":
            assert options.kept_rank is not None
            updates = self.scanned.updates(options.weights, self.device, self.budget)
            labels = self._labels(updates, options.kept_rank)
            clusters = len(set(labels))
            dtype = DTYPES[options.dtype]
            job = SharedJob(
                updates, self.scanned.check_unchanged, options.method, options.kept_rank, dtype, options.seed
            )
            encoded = encode_clusters(job, list(labels), options.max_error, self.pieces, self.progress)
            alone = [number for number, label in enumerate(encoded.labels) if label is None]
        self._keep_individually(alone)
        return encoded, clusters

    def assemble(self, writer: BundleWriter, encoded: Encoded | None, clusters: int) -> tuple[Manifest, int]:
        """Write the bundle from its pieces; its manifest, and the bytes of all."""
        options = self.options
        parameters = Parameters(
            method=options.method,
            rank=options.kept_rank,
            clusters=clusters,
            dtype=options.dtype,
            seed=options.seed,
            weights=options.weights,
            max_error=options.max_error,
        )
        assembly = Assembly(writer, self.scanned, self.scanned.ranks > 0, self.pieces)
        if encoded is not None:
            assembly.add_clusters(encoded, parameters)
        for number in range(len(self.scanned.collection.adapters)):
            if encoded is None or encoded.labels[number] is None:
                kept = stored(number, self.pieces)
                assert kept is not None
                assembly.add_individual(number, kept)
        return assembly.finish(parameters)

    def _labels(self, updates: Updates, rank: int) -> list[int]:
        """The cluster of every adapter, numbered from 0 without a gap; what took long to find is a piece."""
        if self.options.clusters == 1 or isinstance(self.options.clusters, Path):
            return _assigned(self.scanned, updates, self.options, rank, self.progress)
        if LABELS not in self.pieces:
            found = _assigned(self.scanned, updates, self.options, rank, self.progress)
            self.scanned.check_unchanged()
            if team.is_first():
                self.pieces.write(LABELS, {LABELS: torch.tensor(found, dtype=torch.int64)})
            return found
        labels: list[int] = self.pieces.load(LABELS)[LABELS].tolist()
        return labels

    def _keep_individually(self, alone: list[int]) -> None:
        options, adapters = self.options, self.scanned.collection.adapters
        if options.method == "svd":
            note_left(self.pieces, [individual_piece(number) for number in alone], self.progress)

        def keep(number: int) -> Kept:
            if there := stored(number, self.pieces):
                return there
            kept = keep_individually(
                adapters[number],
                options.kept_rank if options.method == "svd" else None,
                options.max_error,
                squared_norm=float(self.scanned.norms[number].sum()),
                dtype=DTYPES[options.dtype],
                device=self.device,
            )
            self.scanned.check_unchanged([number])
            return kept.store(number, self.pieces)

        own = [alone[position] for position in team.dealt(len(alone))]
        notes: list[tuple[int, str]] = []
        with (
            self.progress.stage("keeping adapters individually", len(own)) as advance,
            closing(in_order(keep, own, self.device)) as results,
        ):
            for number, kept in zip(own, results, strict=True):
                if options.method != "svd":
                    how = "as it was" if kept.rank is None else f"at rank {kept.rank}"
                    reason = f"it would exceed --max-error {options.max_error}"
                    notes.append((number, f"kept {adapters[number].name} {how}: {reason}"))
                advance(1)
        self.pieces.wait()
        for _, note in sorted(chain.from_iterable(team.gathered(notes))):
            self.progress.note(note)


def _assigned(scanned: Scan, updates: Updates, options: CompressOptions, rank: int, progress: Progress) -> list[int]:
    """The cluster of every adapter, numbered from 0 without a gap."""
    collection, seed = scanned.collection, options.seed
    names = [adapter.name for adapter in collection.adapters]
    if isinstance(options.clusters, Path):
        read = _read_clusters(options.clusters, collection)
        if changed := read.differences(dict(zip(names, scanned.digests(), strict=True))):
            raise UsageError(
                f"--clusters {options.clusters}: it was made for other weights of {changed[0]!r}", "cluster again"
            )
        if read.rank not in (None, rank):
            progress.note(f"the clusters of {options.clusters} were chosen for rank {read.rank}, not {rank}")
        return read.labels(names)
    if options.clusters == 1:
        return [0] * len(names)
    probes = Probes(updates, rank)
    if options.clusters == "auto":
        choice = choose_clusters(collection, updates, probes, rank, dtype=options.dtype, seed=seed, progress=progress)
        return choice.clustering.labels
    tried = probes.cluster(options.clusters, seed=seed)
    return settle(updates, tried.labels, rank, seed=seed, progress=progress).labels


def _read_clusters(path: Path, collection: Collection, *, may_lack: bool = False) -> Assignment:
    names = {adapter.name for adapter in collection.adapters}
    return read_assignment(path, names, {skipped.name for skipped in collection.skipped}, may_lack=may_lack)


def _groups(assignment: Assignment, collection: Collection) -> list[list[int]]:
    here = [i for i, adapter in enumerate(collection.adapters) if adapter.name in assignment.assignment]
    labels = assignment.labels([collection.adapters[i].name for i in here])
    groups: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for i, label in zip(here, labels, strict=True):
        groups[label].append(i)
    return groups


def _report(output: Path, manifest: Manifest, size: int, seconds: float, device: torch.device) -> CompressReport:
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
        device_peak_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        left_out={adapter.name: adapter.left_out for adapter in adapters if adapter.left_out},
    )
