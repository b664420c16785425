"""The page of ``verify``: is the bundle sound, what was lost, and where."""

from __future__ import annotations

import re
from itertools import groupby

import numpy

from ..base.text import count, error, megabytes, saved, times
from ..bundle.quality import LARGE_ERROR, QualityWarning
from ..model.report import ModelReport
from ..verify.run import AdapterReport, ModuleErrors, VerifyReport
from . import page as skeleton
from .adapter_errors import errors_chart, only_worst, worst_table
from .answers import HEAD, answer_gates, bound, divergence, figures, kept, largest_first, remarks, row
from .answers import found as found_by
from .charts import MOST_ROWS, Grid, Ticks, heat_map, natural_key, short
from .outcome import gates, is_good, limit_of_adapters, limits, made_with, squared_error, verdict, worst_first
from .page import Chart, Page, Table, Tile

_MOST_FINDINGS = 200
_MOST_ANSWERS = 200
_MOST_GROUPS = 12


def page(report: VerifyReport, module_errors: ModuleErrors | None) -> str:
    """The page as HTML."""
    worst = worst_first(report)
    sections: list[Table | Chart] = []
    if report.findings:
        sections.append(_findings(report))
    if report.gates.max_error is not None or report.gates.max_mean_error is not None:
        sections.append(_gates(report))
    if worst:
        sections.append(_errors(report, worst))
    if module_errors is not None and module_errors.squared_errors.size:
        sections.append(_modules(module_errors, worst))
    if worst:
        sections.append(_worst(report, worst))
    if answer_gates(report):
        sections.append(_answer_gates(report))
    if report.model is not None:
        sections.append(_answers(report.model))
    return skeleton.render(
        Page(
            kind="lorazip verify",
            title=report.bundle,
            verdict=verdict(report),
            good=is_good(report),
            lead=_lead(report, len(worst)),
            made=list(filter(None, (made_with(report), limits(report), *map(_said, report.warnings)))),
            tiles=_tiles(report),
            sections=sections,
        )
    )


def _lead(report: VerifyReport, known: int) -> str:
    if report.summary is None:
        return "The manifest cannot be read, so nothing else is known of this bundle."
    if report.against is None:
        return "The errors are those that the bundle claims; with --against they are computed from the originals."
    text = f"The errors were computed from the original adapters in {report.against}."
    missing = len(report.adapters) - known
    return text if not missing else f"{text} Those of {count(missing, 'adapter')} could not be: see the findings."


def _said(warning: QualityWarning) -> str:
    return f"Note: {warning.message} ({warning.hint})."


def _tiles(report: VerifyReport) -> list[Tile]:
    summary = report.summary
    if summary is None:
        return []
    limit = limit_of_adapters(report)
    worst, mean = summary.max_squared_error, summary.mean_squared_error
    mean_limit = limit if report.gates.max_mean_error is None else report.gates.max_mean_error
    return [
        Tile("Adapters", f"{summary.adapters:,}"),
        Tile("Size", megabytes(summary.bytes_bundle), f"before: {megabytes(summary.bytes_original)}"),
        Tile("Saved", saved(summary.saved_ratio), times(summary.bytes_original, summary.bytes_bundle)),
        Tile("Mean error", error(mean), f"squared, {report.errors_are}", mean is not None and mean > mean_limit),
        Tile("p95 error", error(summary.p95_squared_error), f"squared, {report.errors_are}"),
        Tile("Worst error", error(worst), f"squared, {report.errors_are}", worst is not None and worst > limit),
        *_output_tiles(report),
        *_answer_tiles(report),
    ]


def _output_tiles(report: VerifyReport) -> list[Tile]:
    outputs = report.outputs
    if outputs is None:
        return []
    return [
        Tile("Mean error of outputs", error(outputs.mean_squared_error), f"squared, on {outputs.calibration}"),
        Tile("Worst error of outputs", error(outputs.max_squared_error), outputs.worst_adapter),
    ]


def _answer_tiles(report: VerifyReport) -> list[Tile]:
    summary = report.model.summary if report.model else None
    if summary is None:
        return []
    failed = {gate.option for gate in answer_gates(report) if gate.held is False}
    exact = summary.exact_match
    return [
        Tile(
            "Exact match kept",
            kept(summary.kept),
            f"{exact.compressed:.3f} of {exact.original:.3f}, base {exact.base:.3f}",
            "--min-kept" in failed,
        ),
        Tile("Worst KL", divergence(summary.max_kl), summary.worst_adapter, "--max-kl" in failed),
    ]


def _findings(report: VerifyReport) -> Table:
    shown = report.findings[:_MOST_FINDINGS]
    rows = [
        (found.kind, found.adapter or "-", found.path or "-", found.message, "yes" if found.damage else "no")
        for found in shown
    ]
    more = len(report.findings) - len(shown)
    caption = f"The first {len(shown)} of {len(report.findings):,}; the JSON report has them all." if more else ""
    return Table("Findings", ("kind", "adapter", "file", "what is wrong", "damage"), rows, caption=caption)


def _gates(report: VerifyReport) -> Table:
    rows = [
        (gate.option, gate.applies_to, f"{gate.limit:g}", error(gate.found), gate.verdict) for gate in gates(report)
    ]
    head = ("option", "applies to the", "limit", report.errors_are, "result")
    bad = frozenset(row for row, gate in enumerate(gates(report)) if gate.held is False)
    return Table("Limits", head, rows, frozenset({2, 3}), bad=bad)


def _answer_gates(report: VerifyReport) -> Table:
    found = answer_gates(report)
    rows = [(gate.option, bound(gate), found_by(gate), gate.verdict) for gate in found]
    bad = frozenset(number for number, gate in enumerate(found) if gate.held is False)
    return Table("Limits on answers", ("option", "limit", "found", "result"), rows, frozenset({2}), bad=bad)


def _answers(model: ModelReport) -> Table:
    shown = largest_first(model)[:_MOST_ANSWERS]
    caption = " ".join([figures(model), *(f"{line[0].upper()}{line[1:]}." for line in remarks(model))])
    rows = [row(each) for each in shown]
    more = only_worst(len(shown), len(model.adapters))
    return Table("Answers of the model", HEAD, rows, frozenset(range(1, len(HEAD))), f"{caption} {more}".strip())


def _errors(report: VerifyReport, worst: list[tuple[AdapterReport, float]]) -> Chart:
    lines = [(gate.limit, f"limit of the {gate.applies_to}: {gate.limit:g}") for gate in gates(report)]
    if not lines:
        lines = [(LARGE_ERROR, f"no limit given; tasks may suffer above {LARGE_ERROR}")]
    return errors_chart(worst, x=f"squared error, {report.errors_are}", limits=lines)


def _modules(errors: ModuleErrors, worst: list[tuple[AdapterReport, float]]) -> Chart:
    """Rows as in the chart of errors; columns by kind of module, and each kind in the order of its layers."""
    row = {name: number for number, name in enumerate(errors.adapters)}
    names = [adapter.name for adapter, _ in worst if adapter.name in row][:MOST_ROWS]
    kinds = [re.sub(r"\d+", "*", module) for module in errors.modules]
    order = sorted(range(len(kinds)), key=lambda column: (kinds[column], natural_key(errors.modules[column])))
    values = errors.squared_errors[numpy.ix_([row[name] for name in names], order)]
    grid = Grid(values, names, [errors.modules[column] for column in order])
    blocks = [(kind, list(group)) for kind, group in groupby(range(len(order)), key=lambda place: kinds[order[place]])]
    ticks = Ticks([(block[0] + block[-1]) / 2 for _, block in blocks], [_label(kind) for kind, _ in blocks])
    figure = heat_map(
        grid,
        x="modules, by kind and layer",
        y="adapters, the worst on top",
        unit="squared error",
        most=_scale(values),
        columns=ticks if len(blocks) <= _MOST_GROUPS else Ticks([], []),
    )
    for _, block in blocks[1:]:
        figure.add_shape(
            type="line",
            x0=block[0] - 0.5,
            x1=block[0] - 0.5,
            y0=-0.5,
            y1=len(names) - 0.5,
            line={"width": 2},
        )
    caption = "Each cell is one module of one adapter; drag over a part to enlarge it. "
    return Chart("Error of each module", figure, caption + only_worst(len(names), len(errors.adapters)))


def _label(kind: str) -> str:
    """All of a kind's name behind its last number: `self_attn.q_proj` of `model.layers.*.self_attn.q_proj`."""
    return short(kind.rpartition("*.")[2])


def _scale(values: numpy.ndarray) -> float:
    """The largest value, or 1 where all are zero or none is known."""
    known = values[~numpy.isnan(values)]
    return float(known.max()) if known.size and known.max() > 0 else 1.0


def _worst(report: VerifyReport, worst: list[tuple[AdapterReport, float]]) -> Table:
    measured = report.errors_are == "measured"
    return worst_table(
        worst,
        limit=limit_of_adapters(report),
        claims=[adapter.claimed_squared_error for adapter, _ in worst] if measured else None,
        outputs=None if report.outputs is None else [adapter.output_squared_error for adapter, _ in worst],
        unknown=[adapter.name for adapter in report.adapters if squared_error(report, adapter) is None],
    )
