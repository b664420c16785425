"""`lorazip verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.base.errors import UsageError
from lorazip_core.bundle.kinds import check_adapters_path, check_bundle_path
from lorazip_core.model.options import ModelOptions
from lorazip_core.model.prompts import DEFAULT
from lorazip_core.report.html import verify_page

from . import console
from .options import (
    AllowPickle,
    Bundle,
    Device,
    ForceFiles,
    Json,
    MaxMeanError,
    MaxRows,
    ModelDtype,
    PromptTokens,
    Quiet,
    ReportPage,
    not_negative,
    squared_error,
)
from .progress import progress
from .report_file import check_report_files, write_report_files
from .table import count, error, megabytes, saving, table, times
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.model.report import ModelReport
    from lorazip_core.verify.run import AdapterReport, VerifyReport


def verify(
    bundle: Bundle,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="Recompute every error from the original adapters.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="Compare only this adapter, or all like 'fv_*'; may be given again.",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", metavar="E", callback=squared_error, help="Fail if any adapter is above E."),
    ] = None,
    max_mean_error: MaxMeanError = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the JSON report here, also.")
    ] = None,
    html: ReportPage = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE.xml", help="Write JUnit XML, a test for each adapter.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", metavar="FILE.md", help="Write Markdown, for the summary of a CI job.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="Say what outputs lose: moments of 'lorazip calibrate'."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="BASE", help="Ask this base model, a directory or of the Hub.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", metavar="FILE", help="What to ask: JSON lines of input and output.")
    ] = None,
    min_kept: Annotated[
        float | None,
        typer.Option(
            "--min-kept", metavar="K", callback=not_negative, help="Fail if less of the exact match than K is kept."
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl", metavar="X", callback=not_negative, help="Fail if any adapter's answers diverge by more."
        ),
    ] = None,
    model_dtype: ModelDtype = "f32",
    prompt_tokens: PromptTokens = DEFAULT,
    max_rows: MaxRows = None,
    allow_pickle: AllowPickle = False,
    device: Device = "auto",
    force: ForceFiles = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check a bundle, and its errors against the originals.

    A squared error is the lost share of an adapter's update, 0 is lossless. Exits with 1 if a limit or a claim does not
    hold, with 4 if the bundle is damaged; the files are written then too.
    """
    files = {"-o": output, "--report": html, "--junit": junit_file, "--summary": summary}
    check_bundle_path(bundle)
    if against is not None:
        check_adapters_path(against, may_be_empty=True)
    answers = None
    if model is not None and rows is not None:
        answers = ModelOptions(model, rows, min_kept, max_kl, model_dtype, prompt_tokens, max_rows)
    _check_answers(answers, against, {"--model": model, "--rows": rows, "--min-kept": min_kept, "--max-kl": max_kl})
    inputs = [bundle, *([against] if against else []), *([rows] if rows else [])]
    inputs += [calibration] if calibration else []
    check_report_files(files, inputs=inputs, force=force, json=json)
    from lorazip_core.report.junit import junit
    from lorazip_core.report.markdown import markdown
    from lorazip_core.report.outcome import finding_lines
    from lorazip_core.verify.run import verify_by_module

    result = verify_by_module(
        bundle,
        against=against,
        adapters=adapter or (),
        max_error=max_error,
        max_mean_error=max_mean_error,
        allow_pickle=allow_pickle,
        device=device,
        calibration=calibration,
        answers=answers,
        progress=progress(quiet),
    )
    report = report_in_options(result.report)
    write_report_files(
        files,
        {
            "-o": lambda: console.json_bytes(report),
            "--report": lambda: verify_page(result._replace(report=report)).encode(),
            "--junit": lambda: junit([report]),
            "--summary": lambda: markdown(report).encode(),
        },
    )
    console.show(report, _render, as_json=json, quiet=quiet)
    for text in finding_lines(report):
        console.error(text)
    if not quiet:
        console.warn_of(report.warnings)
    return report.exit_code


def _check_answers(answers: ModelOptions | None, against: Path | None, given: Mapping[str, object]) -> None:
    """Refuse options that make no sense without others, and what is no model or has no rows."""
    if answers is None:
        named = [option for option, value in given.items() if value is not None]
        if named:
            *others, last = (each for each in ("--model", "--rows", "--against") if each != named[0])
            raise UsageError(f"{named[0]} needs {', '.join(others)} and {last}", "what to ask, of which model")
        return
    if against is None:
        raise UsageError("--model: answers are compared with the original adapters'", "name these with --against")
    answers.read()


def _render(report: VerifyReport) -> None:
    from lorazip_core.report.outcome import kept_as, verdict

    console.say(f"{report.bundle}: {verdict(report)}")
    summary = report.summary
    if summary is None:
        return
    console.say(
        f"{count(summary.adapters, 'adapter')}, {megabytes(summary.bytes_original)} to"
        f" {megabytes(summary.bytes_bundle)}: {saving(summary.saved_ratio)},"
        f" {times(summary.bytes_original, summary.bytes_bundle)}"
    )
    console.say(
        f"squared error, {report.errors_are}: mean {error(summary.mean_squared_error)},"
        f" p95 {error(summary.p95_squared_error)}, worst {error(summary.max_squared_error)}"
    )
    if (outputs := report.outputs) is not None:
        console.say(
            f"squared error of outputs: mean {error(outputs.mean_squared_error)},"
            f" worst {error(outputs.max_squared_error)} ({outputs.worst_adapter})"
        )
    worst = sorted(report.adapters, key=lambda adapter: -_squared_error(adapter))[: console.LISTED]
    rows = [
        (
            adapter.name,
            error(_squared_error(adapter)),
            kept_as(adapter),
            adapter.worst_module.name if adapter.worst_module else "-",
            error(adapter.worst_module.squared_error if adapter.worst_module else None),
        )
        for adapter in worst
    ]
    console.say()
    console.say(table(("adapter", "squared error", "kept as", "worst module", "its error"), rows))
    if len(report.adapters) > console.LISTED:
        console.say(f"(the worst {console.LISTED} of {len(report.adapters)}; --json has them all)")
    if report.model is not None:
        _render_answers(report.model)


def _render_answers(model: ModelReport) -> None:
    from lorazip_core.report.answers import HEAD, figures, largest_first, remarks, row

    console.say()
    for text in (figures(model), *remarks(model)):
        console.say(text)
    shown = largest_first(model)[: console.LISTED]
    if shown:
        console.say()
        console.say(table(HEAD, map(row, shown)))
    if len(model.adapters) > len(shown):
        console.say(f"(those of the largest KL, {len(shown)} of {len(model.adapters)}; --json has them all)")


def _squared_error(adapter: AdapterReport) -> float:
    """As measured, else as claimed."""
    return adapter.claimed_squared_error if adapter.squared_error is None else adapter.squared_error
