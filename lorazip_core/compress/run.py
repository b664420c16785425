"""The verb itself: from a directory of adapters to a bundle."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from msgspec import UNSET, Struct

from ..adapter.collection import Collection, open_collection
from ..adapter.notes import notes
from ..base.atomic import check_output, resumable_directory
from ..base.device import find_device
from ..base.errors import UsageError
from ..base.filesystem import check_space
from ..base.progress import Progress, Silent
from ..base.stopping import stop_unmasked
from ..bundle.kinds import check_adapters_path
from ..bundle.manifest import Manifest, Parameters, SkippedEntry
from ..bundle.output_path import check_output_path
from ..bundle.quality import QualityWarning, quality_warnings
from ..bundle.reader import Bundle
from ..bundle.size import bundle_bytes, equal_groups
from ..bundle.summary import Summary, summarise
from ..bundle.tensor_file import DTYPES
from ..bundle.writer import BundleWriter, not_of_bundle
from ..clustering.alternation import Probes, alternate
from ..clustering.choose import choose_clusters
from ..clustering.clusters_file import read_clusters
from ..model.calibration import Calibration, calibration_for
from ..planning.frontier import Frontier, frontier
from ..planning.options import CompressOptions
from ..planning.spectra import Spectra, planned_step
from ..reading.memory import Bounds, Task, working_within
from ..reading.packs import Budget
from ..reading.scan import Scan, scan_for
from ..reading.updates import Updates
from ..schemes.registry import shared_scheme
from ..serving.resident_size import ResidentSize, resident_size
from .alone import Alone
from .assemble import Assembly
from .attempt import Attempt, Taken, first_attempt
from .individual import stored
from .key import work_key
from .pieces import Pieces
from .shared import LABELS, Encoded, SharedJob, encode_clusters

_SILENT = Silent()


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
    warnings: list[QualityWarning] = []
    device_peak_bytes: int | None
    """The most memory that PyTorch had taken on the GPU; null on a CPU."""
    left_out: dict[str, list[str]] = {}
    """By adapter, files in its folder with weights that are not its own, and not in the bundle."""
    bytes_resident: int | None = None
    """What a device holds to serve it; null where the objective is "disk"."""


class Compression(NamedTuple):
    """The report, and the figures behind it that are too many for its JSON."""

    report: CompressReport
    manifest: Manifest
    frontier: Frontier | None
    """What was predicted; None where nobody asked for it, or no singular values say how much is kept."""


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
    that make no sense, LocalError for a device that is not there, and for the lock of ``root`` as `read_lock` does.
    """
    return compress_by_frontier(
        root,
        output,
        options,
        predict=False,
        allow_pickle=allow_pickle,
        allow_mixed_base=allow_mixed_base,
        skip_bad=skip_bad,
        force=force,
        progress=progress,
    ).report


def compress_by_frontier(
    root: Path,
    output: Path,
    options: CompressOptions,
    *,
    predict: bool = True,
    allow_pickle: bool = False,
    allow_mixed_base: bool = False,
    skip_bad: bool = False,
    force: bool = False,
    progress: Progress = _SILENT,
) -> Compression:
    """As `compress`, with the figures of every adapter and, to ``predict``, the frontier that ``plan`` would give.

    For a frontier singular values are computed, but where a budget or a mean error has to be met: then they are in any
    case. With a calibration, all adapters are read once more for that.
    """
    started = time.monotonic()
    device = find_device(options.device)
    check_adapters_path(root)
    check_output_path(output, [root])
    check_output(output, force=force, not_ours=not_of_bundle)
    collection = open_collection(root, allow_pickle=allow_pickle, allow_mixed_base=allow_mixed_base, skip_bad=skip_bad)
    options.check(len(collection.adapters))
    for note in notes(collection):
        progress.note(note)
    if isinstance(options.clusters, Path):
        # A mistake in it should not cost the reading of all weights. What only they can tell is bad may be missing.
        read_clusters(options.clusters, collection, may_lack=skip_bad)
    calibration = calibration_for(options.calibration, collection, progress)
    check_space(output, _bytes_needed(collection, options))
    task = Task.of(options.chosen, options.kept_rank or 1, options.clusters, len(collection.adapters))
    with (
        working_within(device, collection, task, Bounds(options.memory, options.device_memory)) as within,
        resumable_directory(output, force=force, not_ours=not_of_bundle) as building,
        stop_unmasked(),
    ):
        singular = options.reads_spectra(predict=predict)
        scanned = scan_for(collection, within, skip_bad=skip_bad, device=device, progress=progress, singular=singular)
        options.check(len(scanned.collection.adapters))
        pieces = Pieces(
            building.work(
                work_key(scanned, options, device, within.budget, None if calibration is None else calibration.sha256)
            )
        )
        pieces.check()
        run = _Run(scanned, options, device, within.budget, pieces, progress, calibration)
        writer = BundleWriter(building.path)
        predicted, attempt = _planned(scanned, options, device, calibration, progress, predict=predict)
        while True:
            encoded, clusters, told = run.encode(attempt)
            manifest, size = run.assemble(writer, attempt, encoded, clusters)
            held = resident_size(Bundle(building.path)) if options.objective == "resident" else None
            following = attempt and attempt.following(manifest, _taken(manifest, size, held, options.chosen))
            if following is None:
                break
            attempt = following
            writer.clear()
        for note in told:
            progress.note(note)
        report = _report(scanned, output, manifest, size, time.monotonic() - started, device, held)
    return Compression(report, manifest, predicted)


def _planned(
    scanned: Scan,
    options: CompressOptions,
    device: torch.device,
    calibration: Calibration | None,
    progress: Progress,
    *,
    predict: bool,
) -> tuple[Frontier | None, Attempt | None]:
    """The frontier if it is to be predicted, and where how much to keep has to be found out, what to begin with."""
    predict = predict and options.by_spectrum
    if not (predict or options.planned):
        return None, None
    spectra = Spectra.of(scanned, device, progress, None if calibration is None else calibration.inputs_of)
    step = planned_step(spectra, scanned, options)
    attempt = None
    if options.planned:
        assert isinstance(step, float)
        attempt = first_attempt(spectra, scanned, step, options)
    return frontier(spectra, scanned, step, options) if predict else None, attempt


def _taken(manifest: Manifest, size: int, held: ResidentSize | None, scheme: str) -> Taken:
    """What is counted of a bundle: the bytes of its files, or what is ``held`` of it."""
    if held is not None:
        own = sum(held.own_bytes)
        return Taken(held.nbytes, own, held.nbytes - own)
    updates = _bytes_of_individual(manifest)
    return Taken(size, _bytes_of_individual(manifest, scheme), size - updates)


def _bytes_of_individual(manifest: Manifest, *schemes: str) -> int:
    """Of the files with the own tensors of adapters, of all or of those in ``schemes``."""
    own = {adapter.individual for adapter in manifest.adapters if not schemes or adapter.scheme in schemes}
    return sum(file.size_bytes for file in manifest.files if file.path in own)


def _bytes_needed(collection: Collection, options: CompressOptions) -> int:
    """About the least that a run takes on disk: its bundle, and the pieces of what is shared, which are copied into it.

    An adapter on its own is a piece that becomes a file of the bundle as it is.
    """
    count = len(collection.adapters)
    if not options.scheme.shared:
        rank = options.kept_rank or (1 if options.scheme.default_rank else None)
        return bundle_bytes(collection, options.chosen, rank, [], options.dtype)
    groups = equal_groups(count, options.clusters if isinstance(options.clusters, int) else 1)
    return 2 * bundle_bytes(collection, options.chosen, options.kept_rank, groups, options.dtype)


@dataclass(frozen=True)
class _Run:
    """One compression. Between its two steps there is nothing but pieces, and what they tell."""

    scanned: Scan
    options: CompressOptions
    device: torch.device
    budget: Budget
    pieces: Pieces
    progress: Progress
    calibration: Calibration | None = None

    def encode(self, attempt: Attempt | None) -> tuple[Encoded | None, int, list[str]]:
        """Make all pieces that are not there yet.

        What shares bases, in how many clusters, and a note on each adapter that is not kept as it was asked for.
        """
        encoded, clusters = None, 0
        alone = list(range(len(self.scanned.collection.adapters)))
        options = self.options
        if options.scheme.shared:
            assert options.kept_rank is not None
            updates = self.scanned.updates(options.weights, self.device, self.budget)
            labels = self._labels(updates, options.kept_rank)
            clusters = len(set(labels))
            dtype = DTYPES[options.dtype]
            ranks = [options.kept_rank] * len(updates.shapes)
            scheme = shared_scheme(options.chosen)
            job = SharedJob(updates, self.scanned.check_unchanged, scheme, ranks, dtype, options.seed)
            too_small = self.scanned.too_small(dtype).tolist()
            shared = [None if small else label for label, small in zip(labels, too_small, strict=True)]
            encoded = encode_clusters(job, shared, options.max_error, self.pieces, self.progress)
            alone = [number for number, label in enumerate(encoded.labels) if label is None]
        individually = Alone(self.scanned, options, self.device, self.pieces, self.progress, self.calibration)
        return encoded, clusters, individually.keep(alone, attempt)

    def assemble(
        self, writer: BundleWriter, attempt: Attempt | None, encoded: Encoded | None, clusters: int
    ) -> tuple[Manifest, int]:
        """Write the bundle from its pieces; its manifest, and the bytes of all."""
        options = self.options
        parameters = Parameters(
            method=options.chosen,
            rank=options.kept_rank,
            clusters=clusters,
            dtype=options.dtype,
            seed=options.seed,
            weights=options.weights,
            max_error=options.max_error,
            max_mean_error=UNSET if options.max_mean_error is None else options.max_mean_error,
            budget=options.most_bytes(len(self.scanned.collection.adapters)) or UNSET,
            objective=UNSET if options.objective == "disk" else options.objective,
            calibration=UNSET if self.calibration is None else self.calibration.sha256,
        )
        assembly = Assembly(writer, self.scanned, self.scanned.ranks > 0, self.pieces)
        if encoded is not None:
            assembly.add_clusters(encoded, shared_scheme(options.chosen))
        numbers = range(len(self.scanned.collection.adapters))
        alone = [number for number in numbers if encoded is None or encoded.labels[number] is None]
        count = attempt.number if attempt else 0
        kept = {number: own for number in alone if (own := stored(number, count, self.pieces))}
        assembly.add_individual(kept, count)
        return assembly.finish(parameters)

    def _labels(self, updates: Updates, rank: int) -> list[int]:
        """The cluster of every adapter, numbered from 0 without a gap; what took long to find is a piece."""
        if self.options.clusters == 1 or isinstance(self.options.clusters, Path):
            return _assigned(self.scanned, updates, self.options, rank, self.progress)
        if LABELS not in self.pieces:
            found = _assigned(self.scanned, updates, self.options, rank, self.progress)
            self.scanned.check_unchanged()
            self.pieces.write(LABELS, {LABELS: torch.tensor(found, dtype=torch.int64)})
            return found
        labels: list[int] = self.pieces.load(LABELS)[LABELS].tolist()
        return labels


def _assigned(scanned: Scan, updates: Updates, options: CompressOptions, rank: int, progress: Progress) -> list[int]:
    """The cluster of every adapter, numbered from 0 without a gap."""
    collection, seed = scanned.collection, options.seed
    names = [adapter.name for adapter in collection.adapters]
    if isinstance(options.clusters, Path):
        read = read_clusters(options.clusters, collection)
        if changed := read.differences(dict(zip(names, scanned.digests(), strict=True))):
            raise UsageError(
                f"«clusters» {options.clusters}: it was made for other weights of {changed[0]!r}", "cluster again"
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
    return alternate(updates, tried.labels, rank, seed=seed, progress=progress).labels


def _report(
    scanned: Scan,
    output: Path,
    manifest: Manifest,
    size: int,
    seconds: float,
    device: torch.device,
    held: ResidentSize | None,
) -> CompressReport:
    adapters = manifest.adapters
    worst = max(adapters, key=lambda adapter: adapter.squared_error)
    original = sum(file.size_bytes for files in scanned.files for file in files)
    errors = [adapter.squared_error for adapter in adapters]
    summary = summarise(len(adapters), errors, original, size)
    parameters = manifest.parameters
    return CompressReport(
        bundle=str(output),
        base_model=manifest.base_model,
        method=parameters.method,
        rank=parameters.rank,
        clusters=[sum(len(shard.adapters) for shard in cluster.shards) for cluster in manifest.clusters],
        individual=[adapter.name for adapter in adapters if adapter.cluster is None],
        skipped=[SkippedEntry(*each) for each in scanned.collection.skipped],
        zero=[adapter.name for adapter in adapters if adapter.squared_norm == 0],
        summary=summary,
        worst=WorstAdapter(worst.name, worst.squared_error),
        seconds=seconds,
        warnings=quality_warnings(
            errors,
            summary,
            method=parameters.method,
            max_error=parameters.max_error,
            calibrated=parameters.calibration is not UNSET,
        ),
        device_peak_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        left_out={adapter.name: adapter.left_out for adapter in adapters if adapter.left_out},
        bytes_resident=None if held is None else held.nbytes,
    )
