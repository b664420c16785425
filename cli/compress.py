"""`lorazip compress`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.base.errors import UsageError
from lorazip_core.base.text import plain
from lorazip_core.bundle.kinds import check_adapters_path
from lorazip_core.bundle.output_path import check_output_path
from lorazip_core.report.html import compress_page, plan_page
from lorazip_core.schemes.registry import AUTO, SCHEMES, methods
from lorazip_core.schemes.scheme import Objective

from . import console
from .early import check_new
from .options import (
    AllowMixedBase,
    AllowPickle,
    Device,
    DeviceMemory,
    Directory,
    Dtype,
    Force,
    Json,
    Memory,
    Quiet,
    ReportPage,
    Seed,
    SkipBad,
    Weights,
    check_rank,
    one_of,
    require_output,
    size,
    squared_error,
)
from .options import clusters as parse_clusters
from .progress import progress
from .report_file import check_report_files, write_report_files
from .table import by_file, count, error, megabytes, saved, saving, table, times
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.compress.run import CompressReport
    from lorazip_core.planning.plan import PlanReport

_BESIDE = "files beside adapters that a bundle does not carry"


def _methods() -> list[str]:
    """What --method may be: those that share nothing first."""
    return [AUTO, *sorted(methods(), key=lambda name: bool(SCHEMES[name].shared))]


def compress(
    directory: Directory,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="BUNDLE", help="Where the bundle goes.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="|".join(_methods()),
            callback=one_of(_methods),
            autocompletion=lambda incomplete: [name for name in _methods() if name.startswith(incomplete)],
            help="Each adapter alone (coded, svd), or on shared bases with full or diagonal cores.",
        ),
    ] = AUTO,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="R", callback=check_rank, help="Rank of what is kept. Default: 16, with svd 4 on average."
        ),
    ] = None,
    clusters: Annotated[
        str,
        typer.Option(
            "--clusters", metavar="K|auto|FILE", help="Number of shared bases, or a file of `lorazip cluster`."
        ),
    ] = "1",
    dtype: Annotated[Dtype, typer.Option("--dtype", metavar="bf16|f16|f32", help="What the bundle stores.")] = "bf16",
    seed: Seed = 0,
    weights: Weights = "adapter",
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error", metavar="E", callback=squared_error, help="The most that any adapter may lose. Default: 0.1."
        ),
    ] = None,
    max_mean_error: Annotated[
        float | None,
        typer.Option(
            "--max-mean-error", metavar="E", callback=squared_error, help="The most that adapters may lose on average."
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option("--budget", metavar="SIZE", parser=size, help="The most that the bundle may take, like 500MB."),
    ] = None,
    budget_per_adapter: Annotated[
        int | None,
        typer.Option(
            "--budget-per-adapter", metavar="SIZE", parser=size, help="The same, by the adapter: 40kB on average."
        ),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(
            "--objective",
            metavar="disk|resident",
            help="Which bytes are few and count as budget: the bundle's, or those on a GPU that serves it.",
        ),
    ] = "disk",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="Lose least of outputs: moments that 'lorazip calibrate' wrote."
        ),
    ] = None,
    device: Device = "auto",
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    html: ReportPage = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    allow_pickle: AllowPickle = False,
    allow_mixed_base: AllowMixedBase = False,
    skip_bad: SkipBad = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Compress LoRA adapters of one base model into a bundle."""
    number_or_file = parse_clusters(clusters)
    require_output(output, dry_run=dry_run)
    from lorazip_core.planning.options import CompressOptions

    options = CompressOptions(
        method=method,
        rank=rank,
        clusters=number_or_file,
        dtype=dtype,
        seed=seed,
        weights=weights,
        max_error=max_error,
        max_mean_error=max_mean_error,
        budget=budget,
        budget_per_adapter=budget_per_adapter,
        objective=objective,
        calibration=calibration,
        device=device,
        memory=memory,
        device_memory=device_memory,
    )
    options.check()
    check_adapters_path(directory)
    if output is not None:
        check_output_path(output, [directory])
    reading = {"allow_pickle": allow_pickle, "allow_mixed_base": allow_mixed_base, "skip_bad": skip_bad}
    files = {"--report": html}
    check_report_files(
        files,
        inputs=[directory, *_file_of(number_or_file), *([calibration] if calibration else [])],
        force=force,
        json=json,
    )
    if html is not None and output is not None:
        _check_apart(html, output)
    if output is None or dry_run:
        from lorazip_core.planning.plan import plan

        planned = report_in_options(plan(directory, options, output=output, progress=progress(quiet), **reading))
        write_report_files(files, {"--report": lambda: plan_page(planned, options).encode()})
        console.show(planned, lambda report: _render_plan(report, output), as_json=json, quiet=False)
        return 0
    check_new(output, force=force)
    from lorazip_core.compress.run import compress_by_frontier

    made = compress_by_frontier(
        directory, output, options, predict=html is not None, force=force, progress=progress(quiet), **reading
    )
    report = report_in_options(made.report)
    write_report_files(files, {"--report": lambda: compress_page(made._replace(report=report), options).encode()})
    console.show(report, _render, as_json=json, quiet=quiet)
    if not quiet:
        console.warn_of(report.warnings)
    return 0


def _check_apart(page: Path, bundle: Path) -> None:
    """Refuse a page within the bundle, which has no room for it, or in the place of it or of a folder that it is in."""
    there, written = (Path(os.path.realpath(path)) for path in (page, bundle))
    if there.is_relative_to(written) or written.is_relative_to(there):
        raise UsageError(f"--report {page}: it is where the bundle {bundle} goes", "choose another --report")


def _file_of(clusters: int | str | Path) -> list[Path]:
    """The file of clusters, if that is what --clusters named."""
    return [clusters] if isinstance(clusters, Path) else []


def _render(report: CompressReport) -> None:
    summary = report.summary
    console.say(
        f"{count(summary.adapters, 'adapter')} of {report.base_model or 'an unnamed base model'} in {report.bundle}:"
        f" {megabytes(summary.bytes_original)} to {megabytes(summary.bytes_bundle)},"
        f" {saving(summary.saved_ratio)}, {times(summary.bytes_original, summary.bytes_bundle)}"
    )
    console.say(
        f"squared error: mean {error(summary.mean_squared_error)}, p95 {error(summary.p95_squared_error)},"
        f" worst {error(summary.max_squared_error)} ({plain(report.worst.name)})"
    )
    if report.bytes_resident is not None:
        console.say(f"on a device: {megabytes(report.bytes_resident)}")
    for names, what in ((report.individual, "kept individually"), (report.zero, "all zero")):
        if names and SCHEMES[report.method].shared:
            console.say(f"{what}: {count(len(names), 'adapter')}")
    console.listing(_BESIDE, by_file(report.left_out))


def _render_plan(report: PlanReport, output: Path | None) -> None:
    console.line(
        f"{count(report.adapters, 'adapter')} of {report.base_model or 'an unnamed base model'},"
        f" {count(report.modules, 'module')}, {megabytes(report.bytes_original)}"
    )
    rows = [
        (
            f"{scheme.method}{' (chosen)' if scheme.chosen else ''}",
            "-" if scheme.rank is None else str(scheme.rank),
            str(scheme.clusters or "-"),
            megabytes(scheme.bytes_bundle),
            saved(scheme.saved_ratio),
        )
        for scheme in report.schemes
    ]
    console.line(table(("method", "rank", "clusters", "bundle", "saved"), rows))
    if report.frontier:
        points = [
            (
                f"{point.method}{' (chosen)' if point.chosen else ''}",
                megabytes(point.bytes),
                times(report.bytes_original, point.bytes),
                error(point.mean_squared_error),
                error(point.max_squared_error),
            )
            for point in report.frontier
        ]
        weighted = ", weighted by inputs" if report.weighted else ""
        console.line(f"predicted from the singular values of all updates{weighted}, squared errors:")
        counted = "bundle" if report.frontier[0].bytes_resident is None else "on a device"
        console.line(table(("method", counted, "", "mean", "worst"), points))
    if report.comparison:
        console.line(f"compared {report.comparison}")
    for skipped in report.skipped:
        console.line(f"left out: {skipped.name}: {skipped.reason}")
    bases = (
        f" and finds {report.problems:,} shared {'basis' if report.problems == 1 else 'bases'}"
        if report.problems
        else ""
    )
    console.line(f"work     reads {megabytes(report.bytes_original)}{bases}")
    if report.memory_bytes is not None and report.least_memory_bytes is not None:
        most, least = (f"{size // 2**20:,} MiB" for size in (report.memory_bytes, report.least_memory_bytes))
        console.line(f"memory   at most {most} on this machine; the least that --memory can be is {least}")
    if report.within_bound is False:
        console.line("note     that is more than what may be: compress is likely to end with exit code 2")
    if report.output_exists:
        console.line(f"note     {output} exists: without --force, compress would end with exit code 6")
    for text in by_file(report.left_out):
        console.line(f"{_BESIDE}: {text}")
