"""The pages of ``compress``: the sizes and errors that there were to choose from, and what came of the choice."""

from __future__ import annotations

from collections.abc import Sequence

from ..base.text import count, error, megabytes, saved, times
from ..bundle.manifest import SkippedEntry
from ..bundle.quality import LARGE_ERROR, above
from ..compress.run import Compression
from ..planning.options import CompressOptions
from ..planning.plan import PlanReport
from ..schemes.registry import AUTO, stepped_schemes
from . import page as skeleton
from .adapter_errors import errors_chart, worst_table
from .frontier import frontier_sections
from .page import Chart, Page, Table, Tile


def page(compression: Compression, options: CompressOptions) -> str:
    """The page of a run as HTML."""
    report, predicted = compression.report, compression.frontier
    summary = report.summary
    worst = sorted(
        ((adapter, adapter.squared_error) for adapter in compression.manifest.adapters),
        key=lambda each: (-each[1], each[0].name),
    )
    limit = _limit_of_adapters(options)
    sections: list[Table | Chart] = []
    if predicted is not None:
        sections += frontier_sections(
            predicted.points,
            summary.bytes_original,
            method=report.method,
            written=summary,
            bytes_resident=report.bytes_resident,
            weighted=options.calibration is not None,
        )
    sections += [
        errors_chart(worst, x="squared error, measured", limits=_limits(options)),
        worst_table(worst, limit=limit),
        *_tables(options, report.skipped),
    ]
    loses_much = any(warning.kind == "large-errors" for warning in report.warnings)
    large = above([value for _, value in worst])
    return skeleton.render(
        Page(
            kind="lorazip compress",
            title=report.bundle,
            verdict=f"{count(large, 'adapter')} with a squared error above {LARGE_ERROR}"
            if loses_much
            else "compressed",
            good=None if report.warnings else True,
            lead=(
                f"{count(summary.adapters, 'adapter')} of {report.base_model or 'an unnamed base model'}. Errors"
                " were measured while they were compressed; verify --against measures what is in the bundle."
            ),
            made=[
                *_said_of(predicted.comparison(options) if predicted else None, known=predicted is not None),
                *(f"Note: {warning.message} ({warning.hint})." for warning in report.warnings),
            ],
            tiles=[
                Tile("Adapters", f"{summary.adapters:,}"),
                Tile("Size", megabytes(summary.bytes_bundle), f"before: {megabytes(summary.bytes_original)}"),
                Tile("Saved", saved(summary.saved_ratio), times(summary.bytes_original, summary.bytes_bundle)),
                Tile("Mean error", error(summary.mean_squared_error), "squared, measured"),
                Tile("p95 error", error(summary.p95_squared_error), "squared, measured"),
                Tile("Worst error", error(report.worst.squared_error), "squared", report.worst.squared_error > limit),
            ],
            sections=sections,
        )
    )


def plan_page(report: PlanReport, options: CompressOptions) -> str:
    """The page of a plan as HTML."""
    chosen = next((point for point in report.frontier if point.chosen), None)
    size = chosen.bytes if chosen else next(each.bytes_bundle for each in report.schemes if each.chosen)
    tiles = [
        Tile("Adapters", f"{report.adapters:,}"),
        Tile("Size", megabytes(size), f"before: {megabytes(report.bytes_original)}"),
        Tile("Saved", saved(1 - size / report.bytes_original), times(report.bytes_original, size)),
    ]
    sections: list[Table | Chart] = []
    predicted = "squared, weighted by inputs, predicted" if report.weighted else "squared, predicted"
    if chosen is not None:
        tiles += [
            Tile("Mean error", error(chosen.mean_squared_error), predicted),
            Tile("Worst error", error(chosen.max_squared_error), predicted),
        ]
        sections += frontier_sections(
            report.frontier, report.bytes_original, method=chosen.method, weighted=report.weighted
        )
    return skeleton.render(
        Page(
            kind="lorazip compress --dry-run",
            title=f"Plan for {count(report.adapters, 'adapter')}",
            verdict="planned; nothing was written",
            good=None,
            lead=f"Adapters of {report.base_model or 'an unnamed base model'} with {count(report.modules, 'module')}.",
            made=_said_of(report.comparison, known=chosen is not None),
            tiles=tiles,
            sections=[*sections, _schemes(report), *_tables(options, report.skipped)],
        )
    )


def _said_of(comparison: str | None, *, known: bool) -> list[str]:
    """What there is to say of predictions, ``known`` or not."""
    if known:
        return [f"Of method auto: {comparison}."] if comparison else []
    able = " and ".join(scheme.name for scheme in stepped_schemes())
    return [f"Sizes and errors are predicted for {able} only, and not where a rank says how much is kept."]


def _limits(options: CompressOptions) -> list[tuple[float, str]]:
    """Lines across errors: what was asked for, or else where tasks may suffer."""
    worst = options.max_error if options.max_error is not None else options.largest_error
    asked = ((worst, "worst adapter"), (options.max_mean_error, "mean"))
    lines = [(limit, f"limit of the {of}: {limit:g}") for limit, of in asked if limit is not None]
    return lines or [(LARGE_ERROR, f"no limit given; tasks may suffer above {LARGE_ERROR}")]


def _limit_of_adapters(options: CompressOptions) -> float:
    """Above what an adapter's error stands out."""
    return LARGE_ERROR if options.max_error is None else options.max_error


def _schemes(report: PlanReport) -> Table:
    rows = [
        (
            each.method,
            "chosen" if each.chosen else "",
            "-" if each.rank is None else str(each.rank),
            str(each.clusters or "-"),
            megabytes(each.bytes_bundle),
            saved(each.saved_ratio),
        )
        for each in report.schemes
    ]
    head = ("method", "", "rank", "clusters", "bundle", "saved")
    return Table(
        "Methods", head, rows, frozenset({2, 3, 4, 5}), "What each method takes at the rank asked for, or its own."
    )


def _tables(options: CompressOptions, skipped: Sequence[SkippedEntry]) -> list[Table]:
    """What was asked for, and adapters that were left out, if any."""
    given = {
        "--method": f"{options.chosen} ({AUTO})" if options.method == AUTO else options.method,
        "--rank": options.kept_rank,
        "--clusters": options.clusters if options.scheme.shared else None,
        "--dtype": options.dtype,
        "--seed": options.seed,
        "--weights": options.weights if options.scheme.shared else None,
        "--max-error": options.max_error if options.max_error is not None else options.largest_error,
        "--max-mean-error": options.max_mean_error,
        "--budget": None if options.budget is None else f"{options.budget:,} bytes",
        "--budget-per-adapter": None if options.budget_per_adapter is None else f"{options.budget_per_adapter:,} bytes",
        "--objective": None if options.objective == "disk" else options.objective,
        "--calibration": options.calibration,
    }
    rows = [(option, str(value)) for option, value in given.items() if value is not None]
    tables = [
        Table(
            "Settings",
            ("option", "value"),
            rows,
            caption="Those that were given, and defaults that bear on the result.",
        )
    ]
    if skipped:
        left_out = [(each.name, each.reason) for each in skipped]
        tables.append(Table("Left out", ("adapter", "why"), left_out))
    return tables
