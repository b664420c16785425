"""What the base model answers with the originals and with what the bundle has of them, and the limits on that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from ..adapter.reader import Adapter
from ..base.errors import UsageError
from ..base.progress import Progress
from ..base.text import printable
from ..bundle.decoder import decode
from ..bundle.finding import Finding
from ..bundle.manifest import AdapterEntry, SkippedEntry
from ..bundle.reader import Bundle
from ..maths.factored import Factors
from ..model.base_model import load_base_model
from ..model.judge import Candidate, judge
from ..model.options import ModelOptions
from ..model.report import AnswersSummary, ModelReport
from ..model.rows import Rows
from .compare import open_originals


def ask(
    bundle: Bundle,
    root: Path,
    rows: Rows,
    options: ModelOptions,
    unusable: Collection[str],
    *,
    only: Collection[str] | None = None,
    allow_pickle: bool,
    device: torch.device,
    progress: Progress,
) -> tuple[ModelReport, list[Finding]]:
    """Score every adapter that has rows, and say what does not hold. The bundle has to be sound.

    ``unusable`` are the adapters whose original in ``root`` cannot be read, which are findings already. Adapters that
    are not among ``only`` are not asked. Raises UsageError if the bundle has no adapter that has rows.
    """
    entries = [entry for entry in bundle.manifest.adapters if only is None or entry.name in only]
    names = [entry.name for entry in entries]
    asked = [entry for entry in entries if rows.of(entry.name)]
    unknown = [printable(name) for name in rows.unknown([entry.name for entry in bundle.manifest.adapters])]
    if not asked:
        of = f"{', '.join(unknown[:3])}{', …' if unknown[3:] else ''}"
        raise UsageError(f"{options.rows}: none of the adapters of the bundle has rows there", f"those are of {of}")
    originals, _, _ = open_originals(root, bundle.manifest, allow_pickle)
    there = [entry for entry in asked if entry.name in originals and entry.name not in unusable]
    base = load_base_model(options.model, device, options.dtype)
    judged = judge(
        base,
        [_candidate(bundle, entry, originals[entry.name]) for entry in there],
        rows,
        prompt_tokens=options.prompt_tokens,
        progress=progress,
    )
    gone = {entry.name for entry in asked} - {entry.name for entry in there}
    report = ModelReport(
        model=printable(options.model),
        rows=printable(str(options.rows)),
        dtype=options.dtype,
        prompt_tokens=options.prompt_tokens,
        adapters=judged.adapters,
        not_scored=[*judged.not_scored, *(SkippedEntry(name, "its original cannot be read") for name in sorted(gone))],
        without_rows=[name for name in names if not rows.of(name)],
        unknown=unknown,
        summary=judged.summary,
    )
    return report, [*_unfit(judged.not_scored), *_gates(options, report)]


def _candidate(bundle: Bundle, entry: AdapterEntry, adapter: Adapter) -> Candidate:
    def original() -> dict[str, Factors]:
        return {name: adapter.factors(name) for name in adapter.parts}

    def compressed() -> dict[str, Factors]:
        return {module.name: decode(bundle, entry, module) for module in bundle.modules(entry)}

    return Candidate(entry.name, [part.module for part in adapter.parts.values()], original, compressed, _more(adapter))


def _more(adapter: Adapter) -> str | None:
    """What an adapter is besides its factors, without which its answers would be another's; None for plain LoRA."""
    if adapter.extras:
        names = list(adapter.extras)
        more = f" and {len(names) - 1} more" if names[1:] else ""
        return f"it has tensors besides its LoRA factors: {names[0]}{more}"
    return adapter.form.besides(adapter.config.raw, ())


def _unfit(not_scored: Sequence[SkippedEntry]) -> Iterator[Finding]:
    for each in not_scored:
        message = f"what the model answers with it is not known: {each.reason}"
        yield Finding("model-unknown", None, message, damage=False, adapter=each.name)


def _gates(options: ModelOptions, report: ModelReport) -> Iterator[Finding]:
    if options.max_kl is not None:
        for each in report.adapters:
            if each.kl > options.max_kl:
                message = f"KL {each.kl:.6g} from the original's answers is above the limit of {options.max_kl:g}"
                yield Finding("max-kl", None, message, damage=False, adapter=each.name)
    if options.min_kept is not None and report.summary is not None:
        yield from _kept(options.min_kept, report.summary)


def _kept(limit: float, summary: AnswersSummary) -> Iterator[Finding]:
    if summary.kept is None:
        message = "the originals answer no row exactly, so that nothing is known of what is kept"
        yield Finding("min-kept", None, message, damage=False)
    elif summary.kept < limit:
        message = f"exact match kept {summary.kept:.6g} is below the limit of {limit:g}"
        yield Finding("min-kept", None, message, damage=False)
