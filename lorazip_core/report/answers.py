"""What the renderings of a verification say of a model's answers: limits, figures, and adapters, the worst first."""

from __future__ import annotations

from ..base.text import count
from ..model.report import AdapterAnswers, ModelReport, OfEach
from ..verify.run import VerifyReport
from .gate import Gate

HEAD = ("adapter", "KL", "exact match", "original", "base", "kept", "95%", "loss", "original", "base", "rows")
"""Of the cells of `row`; without a word before it, a figure is the compressed adapter's."""


def answer_gates(report: VerifyReport) -> list[Gate]:
    """The limits on what a model answers; not known where none was scored, or not every adapter that has rows."""
    model, limits = report.model, report.gates
    summary = model.summary if model else None
    complete = model is not None and not model.not_scored
    found: list[Gate] = []
    if limits.min_kept is not None:
        kept = summary.kept if summary else None
        low = kept is not None and kept < limits.min_kept
        held = False if low else True if kept is not None and complete else None
        found.append(Gate("--min-kept", "exact match kept", limits.min_kept, kept, held))
    if limits.max_kl is not None:
        worst = summary.max_kl if summary else None
        high = worst is not None and worst > limits.max_kl
        held = False if high else True if worst is not None and complete else None
        found.append(Gate("--max-kl", "KL of the worst adapter", limits.max_kl, worst, held))
    return found


def bound(gate: Gate) -> str:
    """``exact match kept is at least 0.99``."""
    return f"{gate.applies_to} is at {'least' if gate.option == '--min-kept' else 'most'} {gate.limit:g}"


def found(gate: Gate) -> str:
    """What came out of it, as text."""
    return kept(gate.found) if gate.option == "--min-kept" else divergence(gate.found)


def largest_first(model: ModelReport) -> list[AdapterAnswers]:
    """The adapters by their KL; those of equal KL in the order of the report."""
    return sorted(model.adapters, key=lambda each: -each.kl)


def row(each: AdapterAnswers) -> tuple[str, ...]:
    """An adapter as cells below `HEAD`."""
    exact, loss = each.exact_match, each.loss
    return (
        each.name,
        divergence(each.kl),
        *(f"{value:.3f}" for value in (exact.compressed, exact.original, exact.base)),
        kept(each.kept),
        interval(each.kept_interval),
        *(f"{value:.3f}" for value in (loss.compressed, loss.original, loss.base)),
        f"{each.rows:,}",
    )


def figures(model: ModelReport) -> str:
    """What came of all adapters, in a sentence."""
    summary = model.summary
    if summary is None:
        return f"No adapter could be scored on {model.model}."
    exact, loss = _three(summary.exact_match), _three(summary.loss)
    between = f", 95% {interval(summary.kept_interval)}" if summary.kept_interval else ""
    return (
        f"On {model.model}, {count(summary.adapters, 'adapter')} with {count(summary.rows, 'row')}:"
        f" exact match {exact}, kept {kept(summary.kept)}{between}; loss {loss};"
        f" KL mean {divergence(summary.mean_kl)}, worst {divergence(summary.max_kl)} of {summary.worst_adapter}."
    )


def remarks(model: ModelReport) -> list[str]:
    """What of adapters and rows was left out, and which prompts were cut, a line each."""
    lines = []
    if model.not_scored:
        names = [each.name for each in model.not_scored]
        lines.append(_listed(f"not scored: {count(len(names), 'adapter')}", names))
    if model.without_rows:
        lines.append(_listed(f"without rows: {count(len(model.without_rows), 'adapter')}", model.without_rows))
    if model.unknown:
        lines.append(_listed(f"rows of no adapter here: {count(len(model.unknown), 'name')}", model.unknown))
    if cut := sum(each.cut_prompts for each in model.adapters):
        lines.append(f"prompts cut to {model.prompt_tokens:,} tokens: {cut:,}")
    return lines


def kept(ratio: float | None) -> str:
    """What is kept, in percent."""
    return "-" if ratio is None else f"{100 * ratio:.1f}%"


def interval(ends: tuple[float, float] | None) -> str:
    """Two percentages."""
    return "-" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}%"


def divergence(value: float | None) -> str:
    """A KL in nats."""
    return "-" if value is None else "0" if value == 0 else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def _three(each: OfEach) -> str:
    return f"{each.compressed:.3f} (original {each.original:.3f}, base {each.base:.3f})"


def _listed(what: str, names: list[str]) -> str:
    return f"{what} ({', '.join(names[:3])}{', …' if names[3:] else ''})"
