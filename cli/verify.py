"""`lorazip verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.bundle.kinds import check_adapters_path, check_bundle_path
from lorazip_core.report.html import verify_page

from . import console
from .options import AllowPickle, Bundle, Device, ForceFiles, Json, MaxMeanError, Quiet, ReportPage, squared_error
from .progress import progress
from .report_file import check_report_files, write_report_files
from .table import count, error, megabytes, saving, table, times
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.verify.run import AdapterReport, VerifyReport


def verify(
    bundle: Bundle,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="DIR", help="Recompute every error from the original adapters.")
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
    check_report_files(files, inputs=[bundle, *([against] if against else [])], force=force, json=json)
    from lorazip_core.report.junit import junit
    from lorazip_core.report.markdown import markdown
    from lorazip_core.report.outcome import finding_lines
    from lorazip_core.verify.run import verify_by_module

    result = verify_by_module(
        bundle,
        against=against,
        max_error=max_error,
        max_mean_error=max_mean_error,
        allow_pickle=allow_pickle,
        device=device,
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


def _squared_error(adapter: AdapterReport) -> float:
    """As measured, else as claimed."""
    return adapter.claimed_squared_error if adapter.squared_error is None else adapter.squared_error
