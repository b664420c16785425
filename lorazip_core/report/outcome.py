"""What all renderings of a verification share: its verdict, limits, worst adapters, and findings in lines."""

from __future__ import annotations

from typing import Protocol

from ..base.text import count, error
from ..bundle.finding import Finding
from ..bundle.manifest import ModuleError
from ..bundle.quality import LARGE_ERROR, above
from ..verify.run import AdapterReport, VerifyReport
from .answers import answer_gates
from .gate import Gate

_ALL, _FEW = 10, 3  # so many findings of one kind are all shown; of more, so few
# What else differs where the files are not those that the bundle was made from.
_CONSEQUENCES = {
    "base-model-differs",
    "claim-differs",
    "config-differs",
    "extras-differ",
    "modules-differ",
    "not-zero",
    "source-differs",
}


def gates(report: VerifyReport) -> list[Gate]:
    """The limits of ``verify`` on the squared errors, measured if there are originals, else claimed."""
    errors = [squared_error(report, adapter) for adapter in report.adapters]
    known = bool(errors) and None not in errors
    summary = report.summary
    worst, mean = (summary.max_squared_error, summary.mean_squared_error) if summary else (None, None)
    found = [
        ("--max-error", "worst adapter", report.gates.max_error, worst),
        ("--max-mean-error", "mean", report.gates.max_mean_error, mean),
    ]
    return [
        Gate(option, meaning, limit, value, False if value is not None and value > limit else known or None)
        for option, meaning, limit, value in found
        if limit is not None
    ]


def all_gates(report: VerifyReport) -> list[Gate]:
    """The limits on squared errors, and those on what a model answers."""
    return [*gates(report), *answer_gates(report)]


def squared_error(report: VerifyReport, adapter: AdapterReport) -> float | None:
    """As measured if the report is about originals (then None if it could not be), else as claimed."""
    return adapter.squared_error if report.errors_are == "measured" else adapter.claimed_squared_error


def worst_first(report: VerifyReport) -> list[tuple[AdapterReport, float]]:
    """The adapters whose squared error is known, with it; those of equal error in the order of the report."""
    known = [(adapter, squared_error(report, adapter)) for adapter in report.adapters]
    return sorted(
        ((adapter, value) for adapter, value in known if value is not None), key=lambda each: (-each[1], each[0].name)
    )


class KeptAdapter(Protocol):
    """An adapter of a bundle, of a report or of the manifest."""

    @property
    def name(self) -> str: ...
    @property
    def scheme(self) -> str: ...
    @property
    def cluster(self) -> int | None: ...
    @property
    def worst_module(self) -> ModuleError | None: ...


def kept_as(adapter: KeptAdapter) -> str:
    """The scheme, and the cluster of one that shares a basis."""
    return adapter.scheme if adapter.cluster is None else f"{adapter.scheme}, cluster {adapter.cluster}"


def verdict(report: VerifyReport) -> str:
    """Sound or not, and for a sound bundle in the same breath what says how good it is: the limits, or what is lost."""
    if not report.ok:
        return count(len(report.findings), "finding")
    if held := [f"{gate.option} {gate.limit:g}" for gate in all_gates(report) if gate.held]:
        return f"sound, within {' and '.join(held)}"
    if not _loses_much(report):
        return "sound"
    large = above([error for _, error in worst_first(report)])
    return f"sound, but {count(large, 'adapter')} with a squared error above {LARGE_ERROR}"


def is_good(report: VerifyReport) -> bool | None:
    """What the verdict says at a glance: None for a sound bundle that loses much, where no limit was set."""
    return None if report.ok and _loses_much(report) else report.ok


def _loses_much(report: VerifyReport) -> bool:
    """Whether it is warned of large errors, as it is where neither ``verify`` nor ``compress`` had a limit on them."""
    return any(warning.kind == "large-errors" for warning in report.warnings)


def made_with(report: VerifyReport) -> str:
    """How the bundle was made and which one it is, in a line; empty where its manifest cannot be read."""
    parameters = report.parameters
    if parameters is None:
        return ""
    words: list[str] = [parameters.method]
    if parameters.rank is not None:
        words.append(f"rank {parameters.rank}")
    if parameters.clusters:
        words.append(count(parameters.clusters, "cluster"))
    words += [parameters.dtype, *parameters.aims]
    return f"{', '.join(words)}; base model {report.base_model or 'not named'}; manifest {report.manifest_sha256}"


def limits(report: VerifyReport) -> str:
    """Which limits the errors had to keep, in a sentence."""
    found = all_gates(report)
    if not found:
        return "No limit was given, so none was checked (--max-error, --max-mean-error)."
    return f"Limits: {', '.join(f'{gate.option} {gate.limit:g}: {gate.verdict}' for gate in found)}."


def limit_of_adapters(report: VerifyReport) -> float:
    """Above what an adapter's error stands out: the limit that was given, or that the bundle was made with, else where
    tasks begin to suffer.
    """
    made_with = report.parameters.max_error if report.parameters else None
    return next(limit for limit in (report.gates.max_error, made_with, LARGE_ERROR) if limit is not None)


def finding_lines(report: VerifyReport) -> list[str]:
    """The findings in lines for people: all of a kind while they are few, and one cause once, whatever follows from it.

    Where no adapter has the files that the bundle was made from, it does not matter what else of them differs.
    """
    findings, lines = list(report.findings), []
    differing = {found.adapter for found in findings if found.kind == "source-differs"}
    if len(findings) > _ALL and differing == {adapter.name for adapter in report.adapters}:
        rest = [found for found in findings if found.kind not in _CONSEQUENCES]
        lines.append(
            f"{report.against}: none of the {count(len(differing), 'adapter')} has the files that the bundle was made"
            f" from: is it the right directory? ({len(findings) - len(rest):,} findings; --json has them all)"
        )
        findings = rest
    for kind in dict.fromkeys(found.kind for found in findings):
        own = [found for found in findings if found.kind == kind]
        shown = own if len(own) <= _ALL else own[:_FEW]
        lines += [_line(found) for found in shown]
        if len(own) > len(shown):
            lines.append(f"{kind}: {len(own) - len(shown):,} more; --json has them all")
    return lines


def _line(found: Finding) -> str:
    about = ": ".join(filter(None, (found.adapter, found.path)))
    return f"{about}: {found.message}" if about else found.message


def lost_of_outputs(report: VerifyReport) -> str | None:
    """What outputs lose, in words; None where it was not measured."""
    outputs = report.outputs
    if outputs is None:
        return None
    return (
        f"squared error of outputs, {count(outputs.adapters, 'adapter')} on the inputs of {outputs.calibration}:"
        f" mean {error(outputs.mean_squared_error)}, worst {error(outputs.max_squared_error)} ({outputs.worst_adapter})"
    )
