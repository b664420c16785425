"""The verb ``add``: a bundle with more adapters, each on a shared basis that is there, or on its own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

from msgspec import UNSET, Struct

from ..adapter.collection import Collection, Company, open_collection
from ..adapter.notes import notes
from ..base.atomic import check_output, resumable_directory
from ..base.device import find_device
from ..base.errors import AdapterError, AdapterErrors
from ..base.filesystem import check_space
from ..base.progress import Progress, Silent
from ..base.stopping import stop_unmasked
from ..base.text import megabytes
from ..bundle.contradictions import refuse_contradictions
from ..bundle.kinds import check_adapters_path
from ..bundle.manifest import AdapterEntry, Manifest, SkippedEntry
from ..bundle.names import Names
from ..bundle.output_path import check_output_path
from ..bundle.reader import Bundle
from ..bundle.refit import reasons_to_refit
from ..bundle.size import bundle_bytes
from ..bundle.writer import BundleWriter, not_of_bundle
from ..compress.pieces import Pieces
from ..reading.memory import Bounds, Task, working_within
from ..reading.scan import scan_for
from ..serving.resident_size import resident_size
from .addition import Addition
from .carry import Staying
from .manner import check_limit, individual_options

_SILENT = Silent()


class AddedAdapter(Struct, frozen=True, kw_only=True):
    """An adapter that was added, or would be."""

    name: str
    scheme: str
    cluster: int | None
    """In the new bundle; null for one that is kept on its own."""
    squared_error: float | None
    """Null for one that would be kept on its own: that is found out when it is."""
    cluster_squared_error: float | None
    """What it would lose, or does, on the shared basis that serves it best; null if there is none that could."""
    replaces: bool
    """Whether the bundle had an adapter of this name."""


class AddReport(Struct, frozen=True, kw_only=True):
    """What ``add`` did, or would do."""

    schema: Literal["lorazip.add/1"] = "lorazip.add/1"
    bundle: str
    output: str | None
    """The bundle that was written; null if none was."""
    base_model: str | None
    added: list[AddedAdapter]
    skipped: list[SkippedEntry]
    """What of the directory was left out."""
    adapters: int
    """How many there are, those that were added included."""
    bytes_added: int
    """Of the files of the adapters that were added, before."""
    bytes_before: int
    bytes_after: int | None
    """Null if nothing was written."""
    refit: list[str]
    """Why compressing all adapters again would pay; empty if it would not, or if nothing was written."""
    seconds: float


class AddOptions(Struct, frozen=True):
    """How to add. ``max_error`` is the most that any of them may lose, by default as the bundle's own do.

    With ``replace``, adapters may have names that are in the bundle, and take their places.
    """

    max_error: float | None = None
    replace: bool = False
    device: str = "auto"
    allow_pickle: bool = False
    allow_mixed_base: bool = False
    skip_bad: bool = False


def add(
    path: Path,
    root: Path,
    output: Path | None,
    options: AddOptions,
    *,
    force: bool = False,
    progress: Progress = _SILENT,
) -> AddReport:
    """Write the bundle at ``path`` with the adapters below ``root`` added to ``output``, whole or not at all.

    Bases stay as they are, and so do all files of adapters that are there already. One that is added goes to the
    cluster that serves it best, if it loses little enough there (`projection.hosts`), and else is kept on its own as
    those are that the bundle was made with (`manner.individual_options`). Without an ``output`` nothing is written,
    and the report says what would be.

    Names are those that `compress` gives; but an adapter in ``root`` itself is called as that directory is, and those
    below it by their paths from there.

    Raises AdapterErrors for adapters that cannot be used, of another base model or with modules of other shapes (unless
    ``options.skip_bad``), or of names that the bundle has (unless ``options.replace``); UsageError for a limit above
    that of the bundle; OutputExists, LocalError, BundleDamaged and Unsupported as `compress` and opening a bundle do.
    """
    started = time.monotonic()
    device = find_device(options.device)
    check_adapters_path(root)
    if output is not None:
        check_output_path(output, [path, root])
        check_output(output, force=force, not_ours=not_of_bundle)
    bundle = Bundle(path)
    refuse_contradictions(path, bundle.manifest)
    check_limit(bundle.manifest.parameters, options.max_error)
    collection = open_collection(
        root,
        allow_pickle=options.allow_pickle,
        allow_mixed_base=options.allow_mixed_base,
        skip_bad=options.skip_bad,
        company=_company(bundle.manifest),
    )
    names = Names.below(root)
    collection = _by_name(collection, names)
    if not options.replace:
        collection = _without_known(collection, names, bundle.manifest, skip_bad=options.skip_bad)
    for note in notes(collection):
        progress.note(note)
    alone = individual_options(bundle.manifest, options.max_error, options.device)
    task = Task.of(alone.chosen, alone.kept_rank or 1, 1, len(collection.adapters))
    if output is not None:
        joining = bundle_bytes(collection, alone.chosen, alone.kept_rank, [], alone.dtype)
        staying = Staying.without(bundle, {names.of(adapter.name) for adapter in collection.adapters})
        check_space(output, joining + staying.written_bytes(output))
    with working_within(device, collection, task, Bounds()) as within, stop_unmasked():
        scan = scan_for(collection, within, skip_bad=options.skip_bad, device=device, progress=progress)
        addition = Addition(bundle, scan, names, alone, options.max_error, device, within.budget, progress)
        if output is None:
            return _report(addition, None, None, None, started)
        # Nothing of it outlives an interruption: most of the work is to read the adapters, as the next run has to.
        with resumable_directory(output, force=force, not_ours=not_of_bundle, resumable=False) as building:
            writer = BundleWriter(building.path)
            manifest = addition.write(writer, Pieces(building.work("add")))
            size = writer.finish(manifest)
            above = _above_budget(manifest, size, building.path)
    if above:
        progress.note(above)
    return _report(addition, output, manifest, size, started)


def _above_budget(manifest: Manifest, size: int, path: Path) -> str | None:
    """That the bundle at ``path``, of so many bytes, takes more than it was made for, in words; None if it does not.

    What a device holds of it is found out by reading it: nothing does that for a bundle that has no budget for it.
    """
    budget, where = manifest.parameters.budget, ""
    if budget is UNSET:
        return None
    if manifest.parameters.objective == "resident":
        size, where = resident_size(Bundle(path)).nbytes, " on a device"
    if size <= budget:
        return None
    return f"it takes {megabytes(size)}{where} now, more than the «budget» of {megabytes(budget)} that it was made for"


def _company(manifest: Manifest) -> Company:
    modules = {entry.name: entry.module for entry in manifest.modules}
    return Company("the bundle", manifest.base_model, modules)


def _by_name(collection: Collection, names: Names) -> Collection:
    """The adapters in the order of their names in the bundle, as files of several and shards have them.

    It is another one than that of their names below the directory: "-x" comes before ".", but "dir" before "dir/-x".
    """
    adapters = sorted(collection.adapters, key=lambda adapter: names.of(adapter.name).encode())
    return replace(collection, adapters=tuple(adapters))


def _without_known(collection: Collection, names: Names, manifest: Manifest, *, skip_bad: bool) -> Collection:
    """Raise AdapterErrors for adapters of names that the bundle has, or leave them out: they may be newer ones."""
    there = {adapter.name for adapter in manifest.adapters}
    known = [adapter.name for adapter in collection.adapters if names.of(adapter.name) in there]
    if not known:
        return collection
    reason, hint = "the bundle has one of that name", "rename it, or «replace» the one that is there"
    if skip_bad and len(known) < len(collection.adapters):
        return collection.without([AdapterError(name, reason, hint) for name in known])
    raise AdapterErrors([AdapterError(names.of(name), reason, hint) for name in known])


def _report(
    addition: Addition, output: Path | None, manifest: Manifest | None, size: int | None, started: float
) -> AddReport:
    """What was done, or without a ``manifest`` would be."""
    before = addition.bundle.manifest
    there = {adapter.name for adapter in before.adapters}
    entries = {} if manifest is None else {entry.name: entry for entry in manifest.adapters}
    return AddReport(
        bundle=str(addition.bundle.path),
        output=None if output is None else str(output),
        base_model=before.base_model,
        added=[
            _added(addition, number, entries.get(name), replaces=name in there)
            for number, name in enumerate(addition.called)
        ],
        skipped=[SkippedEntry(addition.names.of(each.name), each.reason) for each in addition.scan.collection.skipped],
        adapters=len(addition.staying.indices) + len(addition.called),
        bytes_added=sum(file.size_bytes for files in addition.scan.files for file in files),
        bytes_before=addition.bundle.size_bytes,
        bytes_after=size,
        refit=[] if manifest is None else reasons_to_refit(manifest),
        seconds=time.monotonic() - started,
    )


def _added(addition: Addition, number: int, entry: AdapterEntry | None, *, replaces: bool) -> AddedAdapter:
    nearest, host = addition.nearest[number], addition.joining.get(number)
    on_basis = None if nearest is None else nearest.squared_error
    planned = addition.alone.chosen if host is None else host.entry.method
    return AddedAdapter(
        name=addition.called[number],
        scheme=planned if entry is None else entry.scheme,
        cluster=None if host is None else addition.staying.clusters.index(host.number),
        squared_error=(on_basis if host else None) if entry is None else entry.squared_error,
        cluster_squared_error=on_basis,
        replaces=replaces,
    )
