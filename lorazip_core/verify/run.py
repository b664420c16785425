"""``verify``: is the bundle sound, are its claims true, and are its errors small enough?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec
import numpy
from msgspec import Struct

from ..base.errors import BundleDamaged, CheckFailed, UsageError
from ..base.progress import Progress, Silent
from ..base.text import count, printable
from ..bundle.choose import matching
from ..bundle.finding import Finding
from ..bundle.kinds import MANIFEST_NAME, check_adapters_path
from ..bundle.manifest import AdapterEntry, ModuleError, Parameters
from ..bundle.quality import QualityWarning, quality_warnings
from ..bundle.reader import Bundle
from ..bundle.summary import Summary, summarise
from ..model.report import ModelReport

if TYPE_CHECKING:
    from ..bundle.losses import Losses
    from ..model.options import ModelOptions
    from .compare import Measured

_SILENT = Silent()
_UNUSABLE = {"source-missing", "source-unusable"}


class AdapterReport(Struct, frozen=True, kw_only=True):
    """What is claimed and what was measured of one adapter."""

    name: str
    scheme: str
    cluster: int | None
    claimed_squared_error: float
    squared_error: float | None
    """Measured against the originals; null without them, or where they or the bundle do not allow it."""
    mean_module_squared_error: float | None
    worst_module: ModuleError | None
    """These two are claims or measured, as ``errors_are`` of the report says."""
    output_squared_error: float | None = None
    """E‖(ΔW−ΔŴ)x‖² / E‖ΔW x‖², measured; null without moments of the inputs x."""


class Gates(Struct, frozen=True):
    """The limits that were asked for."""

    max_error: float | None
    max_mean_error: float | None
    min_kept: float | None = None
    max_kl: float | None = None


class Outputs(Struct, frozen=True, kw_only=True):
    """What is lost of outputs, Σ E‖(ΔW−ΔŴ)x‖² / Σ E‖ΔW x‖² over the modules whose inputs x are known.

    The inputs of every module are scaled to entries of mean square 1.
    """

    calibration: str
    adapters: int
    """Those that could be measured."""
    mean_squared_error: float
    max_squared_error: float
    worst_adapter: str


class VerifyReport(Struct, frozen=True, kw_only=True):
    """The result of ``verify``, and what ``verify --json`` prints."""

    schema: Literal["lorazip.verify/1"] = "lorazip.verify/1"
    ok: bool
    bundle: str
    against: str | None
    errors_are: Literal["claimed", "measured"]
    gates: Gates
    adapters: list[AdapterReport]
    summary: Summary | None
    """Null when the manifest itself is damaged."""
    findings: list[Finding]
    warnings: list[QualityWarning] = []
    """About a bundle that may be sound all the same; no part of ``ok``."""
    base_model: str | None = None
    parameters: Parameters | None = None
    """What the bundle was made with, of its manifest."""
    manifest_sha256: str | None = None
    outputs: Outputs | None = None
    """What outputs lose; null where no moments of inputs were given, or nothing could be measured."""
    model: ModelReport | None = None
    """What a model answers; null if none was asked, also because the bundle is damaged."""

    @property
    def exit_code(self) -> int:
        """4 with any damage, 1 with any other finding, else 0."""
        if any(finding.damage for finding in self.findings):
            return BundleDamaged.exit_code
        return CheckFailed.exit_code if self.findings else 0


class ModuleErrors(NamedTuple):
    """The squared error of each module of each adapter, as measured."""

    adapters: list[str]
    """Those that could be measured, in the order of the report."""
    modules: list[str]
    """All modules of the bundle."""
    squared_errors: numpy.ndarray
    """[adapters, modules] of float64, ‖ΔW−ΔŴ‖²/‖ΔW‖² of one module; NaN where the adapter does not have it."""


class Verification(NamedTuple):
    """The report, and the figures behind it that are too many for its JSON."""

    report: VerifyReport
    module_errors: ModuleErrors | None
    """None without originals."""


def verify(
    path: Path,
    *,
    against: Path | None = None,
    adapters: Sequence[str] = (),
    max_error: float | None = None,
    max_mean_error: float | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    calibration: Path | None = None,
    answers: ModelOptions | None = None,
    progress: Progress = _SILENT,
) -> VerifyReport:
    """Check the bundle at ``path``, with ``against`` also every claim of its manifest against the original adapters.

    ``max_error`` bounds the squared error of the worst adapter and ``max_mean_error`` the mean, as measured if there
    are originals, else as claimed. Whatever does not hold is a finding of the report, and so is any damage. Raises
    UsageError for a path that is no directory or a limit outside of [0, 1], Unsupported for another format,
    LocalError for a ``device`` that is not there; errors are measured on it.

    With ``adapters``, names or patterns of `fnmatch`, only these are compared and held against limits, and the report
    has no others; the files of the bundle are checked all the same. Raises UsageError for what none is called.

    With ``calibration``, a file of moments, it is measured what outputs lose; that takes the originals, and raises as
    `Calibration.open` does. With ``answers`` a model says what compression did to what it answers: that takes the
    originals too, and raises as `ModelOptions.read`, `load_base_model` and `ask` do. A damaged bundle is not asked for
    answers.
    """
    return verify_by_module(
        path,
        against=against,
        adapters=adapters,
        max_error=max_error,
        max_mean_error=max_mean_error,
        allow_pickle=allow_pickle,
        device=device,
        calibration=calibration,
        answers=answers,
        progress=progress,
    ).report


def verify_by_module(
    path: Path,
    *,
    against: Path | None = None,
    adapters: Sequence[str] = (),
    max_error: float | None = None,
    max_mean_error: float | None = None,
    allow_pickle: bool = False,
    device: str = "cpu",
    calibration: Path | None = None,
    answers: ModelOptions | None = None,
    progress: Progress = _SILENT,
) -> Verification:
    """What `verify` does, with the errors of every module beside the report."""
    for limit in (max_error, max_mean_error):
        if limit is not None and not 0 <= limit <= 1:
            raise UsageError(f"a limit on the squared error is between 0 and 1, not {limit}")
    if against is not None:
        check_adapters_path(against, may_be_empty=True)
    if calibration is not None:
        if against is None:
            raise UsageError(
                "«calibration»: what outputs lose is measured against the original adapters",
                "name these with «against»",
            )
        from ..model.moments import Moments

        Moments.open(calibration)
    if adapters and against is None:
        raise UsageError("«adapters»: they are compared with the original ones", "name these with «against»")
    gates = Gates(max_error, max_mean_error)
    rows = None
    if answers is not None:
        if against is None:
            raise UsageError("«model»: answers are compared with the original adapters'", "name these with «against»")
        rows = answers.read()
        gates = Gates(max_error, max_mean_error, answers.min_kept, answers.max_kl)
    try:
        bundle = Bundle(path)
    except BundleDamaged as error:
        message = str(error).removeprefix(f"{path / MANIFEST_NAME}: ")  # the finding names the file itself
        finding = Finding("manifest", MANIFEST_NAME, message, damage=True)
        return Verification(_report(path, against, gates, [], None, [finding], None), None)
    only = set(matching(bundle.manifest, path, adapters)) if adapters else None
    from ..base.device import find_device
    from ..base.threads import one_thread
    from ..bundle.check import check_bundle  # with torch, which takes seconds: not for what is no bundle
    from .compare import compare

    where = find_device(device)
    with one_thread():
        with progress.stage("checking files", sum(entry.size_bytes for entry in bundle.manifest.files)) as advance:
            findings = check_bundle(bundle, advance)
        module_errors = outputs = None
        if against is None:
            reports = [_claimed(entry) for entry in bundle.manifest.adapters]
            errors = [report.claimed_squared_error for report in reports]
        else:
            damaged = {finding.path for finding in findings}
            measured, broken = compare(
                bundle,
                against,
                damaged,
                only=only,
                allow_pickle=allow_pickle,
                device=where,
                calibration=calibration,
                progress=progress,
            )
            findings += broken
            compared = [entry for entry in bundle.manifest.adapters if only is None or entry.name in only]
            reports = [_measured(entry, measured) for entry in compared]
            errors = [report.squared_error for report in reports if report.squared_error is not None]
            module_errors = _module_errors(bundle, measured.weights)
            outputs = _outputs(calibration, reports)
            if only is not None:
                progress.note(f"compared: {len(compared):,} of {count(len(bundle.manifest.adapters), 'adapter')}")
    model = None
    if answers is not None and rows is not None and against is not None:
        if any(finding.damage for finding in findings):
            progress.note("the bundle is damaged: the model is not asked")
        else:
            from .answers import ask

            unusable = {found.adapter for found in findings if found.kind in _UNUSABLE and found.adapter is not None}
            model, broken = ask(
                bundle,
                against,
                rows,
                answers,
                unusable,
                only=only,
                allow_pickle=allow_pickle,
                device=where,
                progress=progress,
            )
            findings += broken
    summary = _summary(bundle, errors)
    findings += _gates(gates, reports, summary, measured=against is not None)
    report = _report(path, against, gates, reports, summary, findings, bundle)
    return Verification(msgspec.structs.replace(report, outputs=outputs, model=model), module_errors)


def _report(
    path: Path,
    against: Path | None,
    gates: Gates,
    adapters: list[AdapterReport],
    summary: Summary | None,
    findings: list[Finding],
    bundle: Bundle | None,
) -> VerifyReport:
    measured = against is not None
    errors = [each.squared_error if measured else each.claimed_squared_error for each in adapters]
    known = [error for error in errors if error is not None]
    manifest = bundle.manifest if bundle else None
    warnings: list[QualityWarning] = []
    if manifest and summary:
        limit = gates.max_error if gates.max_error is not None else manifest.parameters.max_error
        warnings = quality_warnings(
            known,
            summary,
            method=manifest.parameters.method,
            max_error=limit,
            calibrated=manifest.parameters.calibration is not msgspec.UNSET,
        )
    return VerifyReport(
        ok=not findings,
        bundle=printable(str(path)),
        against=None if against is None else printable(str(against)),
        errors_are="claimed" if against is None else "measured",
        gates=gates,
        adapters=adapters,
        summary=summary,
        findings=sorted(findings, key=lambda finding: not finding.damage),
        warnings=warnings,
        base_model=manifest.base_model if manifest else None,
        parameters=manifest.parameters if manifest else None,
        manifest_sha256=bundle.digest if bundle else None,
    )


def _claimed(entry: AdapterEntry) -> AdapterReport:
    return AdapterReport(
        name=entry.name,
        scheme=entry.scheme,
        cluster=entry.cluster,
        claimed_squared_error=entry.squared_error,
        squared_error=None,
        mean_module_squared_error=entry.mean_module_squared_error,
        worst_module=entry.worst_module,
    )


def _measured(entry: AdapterEntry, of_all: Measured) -> AdapterReport:
    measured, outputs = of_all.weights.get(entry.name), of_all.outputs.get(entry.name)
    return AdapterReport(
        name=entry.name,
        scheme=entry.scheme,
        cluster=entry.cluster,
        claimed_squared_error=entry.squared_error,
        squared_error=measured.squared_error if measured else None,
        mean_module_squared_error=measured.mean_module_squared_error if measured else None,
        worst_module=measured.worst_module if measured else None,
        output_squared_error=outputs.squared_error if outputs else None,
    )


def _outputs(calibration: Path | None, adapters: list[AdapterReport]) -> Outputs | None:
    errors = {each.name: each.output_squared_error for each in adapters if each.output_squared_error is not None}
    if calibration is None or not errors:
        return None
    worst = max(errors, key=lambda name: errors[name])
    return Outputs(
        calibration=printable(str(calibration)),
        adapters=len(errors),
        mean_squared_error=math.fsum(errors.values()) / len(errors),
        max_squared_error=errors[worst],
        worst_adapter=worst,
    )


def _module_errors(bundle: Bundle, measured: dict[str, Losses]) -> ModuleErrors:
    names = [entry.name for entry in bundle.manifest.adapters if entry.name in measured]
    modules = [module.name for module in bundle.manifest.modules]
    column = {module: number for number, module in enumerate(modules)}
    errors = numpy.full((len(names), len(modules)), numpy.nan)
    for row, name in enumerate(names):
        ratios = measured[name].ratios
        errors[row, [column[module] for module in ratios]] = list(ratios.values())
    return ModuleErrors(names, modules, errors)


def _summary(bundle: Bundle, errors: list[float]) -> Summary:
    original = sum(source.size_bytes for entry in bundle.manifest.adapters for source in bundle.sources(entry))
    return summarise(len(bundle.manifest.adapters), errors, original, bundle.size_bytes)


def _gates(gates: Gates, adapters: list[AdapterReport], summary: Summary, *, measured: bool) -> Iterator[Finding]:
    source = "measured" if measured else "claimed"
    for adapter in adapters:
        error = adapter.squared_error if measured else adapter.claimed_squared_error
        if gates.max_error is not None and error is not None and error > gates.max_error:
            message = f"squared error {error:.6g} ({source}) is above the limit of {gates.max_error:g}"
            yield Finding("max-error", None, message, damage=False, adapter=adapter.name)
    mean = summary.mean_squared_error
    if gates.max_mean_error is not None and mean is not None and mean > gates.max_mean_error:
        message = f"mean squared error {mean:.6g} ({source}) is above the limit of {gates.max_mean_error:g}"
        yield Finding("max-mean-error", None, message, damage=False)
