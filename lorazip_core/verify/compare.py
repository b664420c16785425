"""What of a bundle differs from the original adapters, and which of its claims about them are false."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from ..adapter.collection import open_collection
from ..adapter.formats.lora_bias import biased_module
from ..adapter.formats.names import CONFIG_NAME
from ..adapter.reader import Adapter
from ..base.device import free_bytes
from ..base.errors import AdapterError, AdapterErrors
from ..base.progress import Progress
from ..base.text import printable
from ..base.threads import in_order
from ..bundle.finding import Finding
from ..bundle.kinds import EXPORT_NAME, MANIFEST_NAME
from ..bundle.losses import Losses
from ..bundle.manifest import AdapterEntry, Manifest, SourceEntry
from ..bundle.names import Names
from ..bundle.reader import Bundle
from ..model.calibration import Calibration
from ..reading.placement import placement_of_one_pass
from .measure import Original, Pair, Seen, measure

_CPU = torch.device("cpu")
# A claim is true when it is this close to what is measured; the floor covers errors that are rounding themselves.
RELATIVE_TOLERANCE = 1e-4
ABSOLUTE_TOLERANCE = 1e-10


class _Difference(NamedTuple):
    """What of an adapter differs from its original, and whether its errors can be measured all the same."""

    findings: list[Finding]
    comparable: bool


class Measured(NamedTuple):
    """Errors by adapter, where they are known: of its weights, and weighted by inputs, of its outputs."""

    weights: dict[str, Losses]
    outputs: dict[str, Losses]


def compare(
    bundle: Bundle,
    root: Path,
    damaged: set[str | None],
    *,
    only: Collection[str] | None = None,
    allow_pickle: bool,
    device: torch.device = _CPU,
    calibration: Path | None = None,
    progress: Progress,
) -> tuple[Measured, list[Finding]]:
    """The true errors by adapter, where they can be known, and all that differs from the originals in ``root``.

    With a file of moments for ``calibration``, also those of outputs; raises as `Calibration.open`.

    ``damaged`` are the files of the bundle that cannot be relied on; what depends on them is left out. Adapters that
    are not among ``only`` are not compared.
    """
    originals, bad, no_adapters = open_originals(root, bundle.manifest, allow_pickle)
    entries = [entry for entry in bundle.manifest.adapters if only is None or entry.name in only]
    if not {entry.name for entry in entries} & {*originals, *bad}:
        message = f"none of the {len(entries)} adapters of the bundle is there: is it the right directory?"
        return Measured({}, {}), [Finding("source-missing", None, message, damage=False)]
    pairs = [Pair(entry, originals[entry.name]) for entry in entries if entry.name in originals]
    different = _differences(bundle, pairs, damaged, progress)
    measurable = {name for name, each in different.items() if each.comparable}
    inputs = None if calibration is None else Calibration.open(calibration, bundle.manifest.modules)
    if inputs is not None and inputs.unknown is not None:
        progress.note(inputs.unknown)
    seen = _read(bundle, pairs, measurable, device, inputs, progress)
    broken = list(_not_in_bundle(bundle, {*originals, *bad} - no_adapters))
    measured = Measured({}, {})
    for entry in entries:
        if entry.name in originals:
            own = seen[entry.name]
            losses, findings = _judged(bundle, entry, own, different[entry.name].findings)
            broken += findings
            if losses is not None:
                measured.weights[entry.name] = losses
                if isinstance(own, Original) and own.outputs is not None:
                    measured.outputs[entry.name] = own.outputs
        else:
            kind = "source-unusable" if entry.name in bad else "source-missing"
            broken.append(_source(kind, entry.name, bad.get(entry.name, "it is not there")))
    if (root / EXPORT_NAME).is_file() and any(found.kind == "source-differs" for found in broken):
        message = "these are adapters that lorazip exported from a bundle, not the originals"
        broken.insert(0, Finding("source-exported", None, message, damage=False))
    return measured, broken


def _differences(
    bundle: Bundle, pairs: list[Pair], damaged: set[str | None], progress: Progress
) -> dict[str, _Difference]:
    """By adapter, what differs besides the updates."""

    def difference(pair: Pair) -> _Difference:
        found = list(_modules(bundle, pair))
        comparable = not found
        if MANIFEST_NAME in damaged:
            return _Difference(found, False)
        try:
            found += _carried(bundle, pair, damaged)
        except AdapterError as error:
            return _Difference([*found, _source("source-unusable", pair.entry.name, error.reason)], False)
        return _Difference(found, comparable and not damaged & _needed(bundle, pair.entry))

    different = {}
    with (
        progress.stage("comparing adapters", len(pairs)) as advance,
        closing(in_order(difference, pairs, _CPU)) as results,
    ):
        for pair, found in zip(pairs, results, strict=True):
            different[pair.entry.name] = found
            advance(1)
    return different


def _read(
    bundle: Bundle,
    pairs: list[Pair],
    measurable: set[str],
    device: torch.device,
    calibration: Calibration | None,
    progress: Progress,
) -> dict[str, Seen]:
    """By adapter, what reading its original has told."""
    with progress.stage("reading originals", len(pairs)) as advance:
        sizes = [pair.original.layout.size for pair in pairs]
        placement = placement_of_one_pass(device, sum(sizes), max(sizes, default=0), free_bytes(device))
        if placement.kind == "host":
            device = _CPU  # too little of a GPU is free
        return measure(
            bundle,
            pairs,
            advance,
            measurable=measurable,
            device=device,
            placement=placement,
            calibration=calibration,
        )


def _judged(
    bundle: Bundle, entry: AdapterEntry, seen: Seen, different: list[Finding]
) -> tuple[Losses | None, list[Finding]]:
    """The errors of an adapter, if they could be measured, and all that is wrong with it."""
    if isinstance(seen, AdapterError):
        others = [finding for finding in different if finding.kind != "source-unusable"]
        return None, [_source("source-unusable", entry.name, seen.reason), *others]
    findings = [*_source_files(bundle, entry, seen.files), *different]
    losses = seen.measured
    if losses is None:
        return None, findings
    if (module := losses.not_finite()) is not None:
        reason = f"module {module}: its update has NaN or Inf"
        return None, [*findings, _source("source-unusable", entry.name, reason)]
    return losses, [*findings, *_claims(entry, losses)]


def open_originals(
    root: Path, manifest: Manifest, allow_pickle: bool
) -> tuple[dict[str, Adapter], dict[str, str], set[str]]:
    """Usable adapters by name, for each other one why it is not, and which of these are no adapters of their own.

    An adapter in ``root`` itself may have been compressed from there, or added, which gives it another name.
    """
    alone = any(entry.name == "." for entry in manifest.adapters)
    names = Names(None) if alone else Names.below(root)
    try:
        found = open_collection(root, skip_bad=True, allow_mixed_base=True, allow_pickle=allow_pickle)
    except AdapterErrors as error:  # not one of them is usable
        bad = {printable(names.of(each.adapter)): each.reason for each in error.errors if each.adapter != str(root)}
        return {}, bad, set()
    bad = {printable(names.of(skipped.name)): skipped.reason for skipped in found.skipped}
    originals = {printable(names.of(adapter.name)): adapter for adapter in found.adapters}
    return originals, bad, {printable(names.of(name)) for name in found.no_adapters}


def _not_in_bundle(bundle: Bundle, there: set[str]) -> Iterator[Finding]:
    known = {entry.name for entry in bundle.manifest.adapters} | {entry.name for entry in bundle.manifest.skipped}
    for name in sorted(there - known):
        yield _source("source-unlisted", name, "the bundle neither has it nor says that it was skipped")


def _source_files(bundle: Bundle, entry: AdapterEntry, read: list[SourceEntry]) -> Iterator[Finding]:
    """The original's files are those that the bundle was made from."""
    files = {source.path: source for source in read}
    listed = {source.path: source for source in bundle.sources(entry)}
    for name in sorted(files.keys() | listed.keys()):
        path = name if entry.name == "." else f"{entry.name}/{name}"
        if name not in listed:
            message = "the bundle was made without this file"
        elif name not in files:
            message = "the bundle was made from this file, which is not there or not used now"
        elif files[name].size_bytes != listed[name].size_bytes:
            message = f"{files[name].size_bytes} bytes, but the bundle was made from {listed[name].size_bytes}"
        elif files[name].sha256 != listed[name].sha256:
            message = f"sha256 {files[name].sha256}, but the bundle was made from {listed[name].sha256}"
        else:
            continue
        yield Finding("source-differs", path, message, damage=False, adapter=entry.name)


def _modules(bundle: Bundle, pair: Pair) -> Iterator[Finding]:
    """The bundle has all modules of the original and no others."""
    kept = {(m.name, m.kind, m.d_out, m.d_in, tuple(m.kernel)) for m in bundle.modules(pair.entry)}
    there = {(m.name, m.kind, m.d_out, m.d_in, m.kernel) for m, *_ in pair.original.parts.values()}
    if names := sorted({module[0] for module in kept ^ there}):
        message = f"{len(names)} modules are not the original's, or differ in shape: {', '.join(names[:3])}"
        yield Finding("modules-differ", None, message, damage=False, adapter=pair.entry.name)


def _carried(bundle: Bundle, pair: Pair, damaged: set[str | None]) -> Iterator[Finding]:
    """Base model, configuration and extras are the original's."""
    entry, original = pair
    named = bundle.manifest.base_model_of(entry)
    if named != original.config.base_model:
        message = f"base model {named!r}, but the original has {original.config.base_model!r}"
        yield Finding("base-model-differs", None, message, damage=False, adapter=entry.name)
    if entry.config not in damaged and bundle.config_text(entry) != original.config_text:
        message = f"is not the original's {CONFIG_NAME}"
        yield Finding("config-differs", entry.config, message, damage=False, adapter=entry.name)
    if entry.extras in damaged:
        return
    kept = set() if entry.extras is None else set(bundle.names(entry.extras))
    for name in sorted(kept | original.extras.keys()):
        if name not in kept or name not in original.extras:
            message = f"tensor {name} is only in {'the bundle' if name in kept else 'the original'}"
        elif not _same(bundle.tensor(str(entry.extras), name), _expected(bundle, entry, original, name)):
            message = f"tensor {name} is not the original's"
        else:
            continue
        yield Finding("extras-differ", entry.extras, message, damage=False, adapter=entry.name)


def _expected(bundle: Bundle, entry: AdapterEntry, original: Adapter, name: str) -> torch.Tensor:
    """What a bundle has of a tensor that is no factor; before 0.6, a bias with its scale was of its own dtype."""
    extra = original.extra(name)
    if biased_module(name) is not None:
        return extra.to(bundle.tensor(str(entry.extras), name).dtype)
    return extra


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal bit by bit, so that NaN equals itself."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    return torch.equal(x.reshape(-1).view(torch.uint8), y.contiguous().reshape(-1).view(torch.uint8))


def _needed(bundle: Bundle, entry: AdapterEntry) -> set[str | None]:
    """The files that an adapter is decoded from."""
    if entry.cluster is None:
        return {entry.individual}
    return {bundle.manifest.clusters[entry.cluster].basis, bundle.shard(entry).path}


def _claims(entry: AdapterEntry, measured: Losses) -> Iterator[Finding]:
    """Every number that the manifest claims of an adapter is what was measured."""

    def false(claim: str, claimed: object, truth: object) -> Finding:
        message = f"the manifest claims {claim} {claimed}, but it is {truth}"
        return Finding("claim-differs", MANIFEST_NAME, message, damage=False, adapter=entry.name)

    if abs(entry.squared_norm - measured.squared_norm) > RELATIVE_TOLERANCE * measured.squared_norm:
        yield false("squared_norm", entry.squared_norm, measured.squared_norm)
    if not _close(entry.squared_error, measured.squared_error):
        yield false("squared_error", entry.squared_error, measured.squared_error)
    if not _close(entry.mean_module_squared_error, measured.mean_module_squared_error):
        yield false("mean_module_squared_error", entry.mean_module_squared_error, measured.mean_module_squared_error)
    claimed, worst = entry.worst_module, measured.worst_module
    largest = 0.0 if worst is None else worst.squared_error
    truth = f"{largest} of {worst.name}" if worst else None
    if claimed is None:
        if largest > ABSOLUTE_TOLERANCE:
            yield false("worst_module", None, truth)
    elif not (
        _close(claimed.squared_error, largest)
        and _close(measured.ratios[claimed.name], largest)  # of a tie, either may be named, and of a zero adapter any
    ):
        yield false("worst_module", f"{claimed.squared_error} of {claimed.name}", truth)
    if measured.squared_norm == 0 and measured.squared_distance > 0:
        message = f"the original is zero, but what is stored has squared norm {measured.squared_distance}"
        yield Finding("not-zero", None, message, damage=False, adapter=entry.name)


def _close(claim: float, truth: float) -> bool:
    return abs(claim - truth) <= RELATIVE_TOLERANCE * truth + ABSOLUTE_TOLERANCE


def _source(kind: str, adapter: str, message: str) -> Finding:
    return Finding(kind, adapter, message, damage=False, adapter=adapter)
