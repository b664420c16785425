"""What a verification found, as every rendering of it tells it: the gates, the worst adapters, who kept how."""

from __future__ import annotations

from typing import NamedTuple

from ..text import count
from ..verify import AdapterReport, VerifyReport


class Gate(NamedTuple):
    """A limit that was asked for, and what came of it."""

    option: str
    applies_to: str
    limit: float
    found: float | None
    held: bool | None
    """None where errors that could break it are not known."""

    @property
    def verdict(self) -> str:
        return {True: "held", False: "failed", None: "not known"}[self.held]


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


def squared_error(report: VerifyReport, adapter: AdapterReport) -> float | None:
    """As measured if the report is about originals (then None if it could not be), else as claimed."""
    return adapter.squared_error if report.errors_are == "measured" else adapter.claimed_squared_error


def worst_first(report: VerifyReport) -> list[tuple[AdapterReport, float]]:
    """The adapters whose squared error is known, with it; those of equal error in the order of the report."""
    known = [(adapter, squared_error(report, adapter)) for adapter in report.adapters]
    return sorted(
        ((adapter, error) for adapter, error in known if error is not None), key=lambda each: (-each[1], each[0].name)
    )


def kept_as(adapter: AdapterReport) -> str:
    return adapter.scheme if adapter.cluster is None else f"{adapter.scheme}, cluster {adapter.cluster}"


def verdict(report: VerifyReport) -> str:
    return "sound" if report.ok else count(len(report.findings), "finding")
