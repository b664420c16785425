"""A verification as GitHub-flavoured Markdown, for the summary of a CI job or a comment."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..base.text import error, megabytes, plain, saved, times
from ..bundle.finding import Finding
from ..verify.run import VerifyReport
from .answers import HEAD, answer_gates, bound, figures, largest_first, remarks, row
from .answers import found as found_by
from .outcome import gates, kept_as, limits, lost_of_outputs, made_with, verdict, worst_first

_WORST = 10
_MARKS = {True: "✅ held", False: "❌ failed", None: "❔ not known"}
_MOST_FINDINGS = 50  # GitHub takes 1 MiB a step, and nobody reads it

# All that could be Markdown or HTML. Numeric references are text to every Markdown, wherever they are.
_MARKUP = re.compile(r"[^\w\s./,:-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=\S)")


def markdown(report: VerifyReport) -> str:
    """Verdict, figures, limits, worst adapters and findings. The same report gives the same text."""
    mark = "✅" if report.ok else "❌"
    blocks = [f"### {mark} lorazip verify {name(report.bundle)}: {verdict(report)}"]
    if report.summary is not None:
        blocks += [
            _figures(report),
            *_outputs(report),
            *_made(report),
            *_gates(report),
            *_worst(report),
            *_answers(report),
        ]
    blocks += _findings(report.findings)
    return "\n\n".join(blocks) + "\n"


def escape(text: str) -> str:
    """``text`` on one line, without any meaning in Markdown or HTML."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", plain(text))


def name(text: str) -> str:
    """A name as code, in which GitHub makes no links of mentions; Markdown's own code could not hold every name."""
    return f"<code>{escape(text)}</code>"


def _figures(report: VerifyReport) -> str:
    summary = report.summary
    assert summary is not None
    how = f"measured against {name(report.against)}" if report.against is not None else "as the bundle claims"
    return (
        _table(
            ("adapters", "before", "after", "saved", "mean", "p95", "worst"),
            [
                (
                    f"{summary.adapters:,}",
                    megabytes(summary.bytes_original),
                    megabytes(summary.bytes_bundle),
                    f"{saved(summary.saved_ratio)}, {times(summary.bytes_original, summary.bytes_bundle)}",
                    error(summary.mean_squared_error),
                    error(summary.p95_squared_error),
                    error(summary.max_squared_error),
                )
            ],
            range(7),
        )
        + f"\n\nMean, p95 and worst are squared errors over adapters, {how}; 0 is lossless, 1 is all lost."
    )


def _outputs(report: VerifyReport) -> list[str]:
    lost = lost_of_outputs(report)
    return [] if lost is None else [escape(f"{lost[0].upper()}{lost[1:]}.")]


def _gates(report: VerifyReport) -> list[str]:
    rows = [
        (f"<code>{gate.option}</code>", gate.applies_to, f"{gate.limit:g}", error(gate.found), _MARKS[gate.held])
        for gate in gates(report)
    ]
    head = ("limit", "applies to the", "at most", report.errors_are, "result")
    if not (rows or answer_gates(report)):
        return [escape(limits(report))]
    return [_table(head, rows, (2, 3))] if rows else []


def _made(report: VerifyReport) -> list[str]:
    """How the bundle was made, and the warnings about it."""
    made = made_with(report)
    lines = [f"⚠️ {escape(f'{warning.message} ({warning.hint})')}" for warning in report.warnings]
    return [*([escape(f"Made with {made}")] if made else []), *lines]


def _worst(report: VerifyReport) -> list[str]:
    worst = worst_first(report)
    outputs = report.outputs is not None
    rows = [
        (
            name(adapter.name),
            error(value),
            *([error(adapter.output_squared_error)] if outputs else []),
            escape(kept_as(adapter)),
            name(adapter.worst_module.name) if adapter.worst_module else "-",
            error(adapter.worst_module.squared_error if adapter.worst_module else None),
        )
        for adapter, value in worst[:_WORST]
    ]
    if not rows:
        return []
    title = f"The worst {len(rows)} of {len(worst):,} adapters:" if len(rows) < len(worst) else "Adapters, worst first:"
    head = ("adapter", "squared error", *(["of outputs"] if outputs else []), "kept as", "worst module", "its error")
    return [title, _table(head, rows, (1, 2, 5) if outputs else (1, 4))]


def _answers(report: VerifyReport) -> list[str]:
    """What a model answered, if one was asked."""
    model = report.model
    blocks = []
    limits_of_answers = [
        (f"<code>{gate.option}</code>", bound(gate), found_by(gate), _MARKS[gate.held]) for gate in answer_gates(report)
    ]
    if limits_of_answers:
        blocks.append(_table(("limit", "on answers", "found", "result"), limits_of_answers, (2,)))
    if model is None:
        return blocks
    worst = largest_first(model)[:_WORST]
    rows = [(name(each.name), *map(escape, row(each)[1:])) for each in worst]
    blocks += [escape(line) for line in (figures(model), *remarks(model))]
    return [*blocks, *([_table(HEAD, rows, range(1, len(HEAD)))] if rows else [])]


def _findings(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return []
    lines = []
    for found in findings[:_MOST_FINDINGS]:
        about = ": ".join(name(each) for each in (found.adapter, found.path) if each is not None)
        damage = "damage, " if found.damage else ""
        lines.append(f"- {damage}{escape(found.kind)}: {f'{about}: ' if about else ''}{escape(found.message)}")
    more = len(findings) - len(lines)
    if more:
        lines.append(f"- … and {more:,} more, which the JSON report has")
    return ["Findings:", "\n".join(lines)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table whose cells are Markdown already; ``numbers`` are the columns that are flush right."""
    rule = ["---:" if column in numbers else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
