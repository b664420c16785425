"""`lorazip demo`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.base.atomic import check_output
from lorazip_core.bundle.kinds import schema_of
from lorazip_core.bundle.output_path import check_output_path
from lorazip_core.sample import sample_path

from . import console
from .options import Force, Quiet
from .progress import progress
from .report_file import write_data
from .table import error, megabytes
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.verify.run import VerifyReport

_BUNDLE, _ADAPTERS, _REPORT = "bundle", "adapters", "verify.json"
_PARTIAL = f".{_BUNDLE}.partial"
_PARTIALS = (_PARTIAL, f".{_ADAPTERS}.partial")
_REPORT_SCHEMA = "lorazip.verify/1"


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where everything goes.")] = Path(
        "lorazip-demo"
    ),
    force: Force = False,
    quiet: Quiet = False,
) -> int:
    """Compress, verify and export 16 adapters that are included."""
    check_output_path(output)
    if not _is_begun(output):
        check_output(output, force=force, not_ours=_not_of_demo)
    from lorazip_core.compress.run import compress
    from lorazip_core.export.exporter import export
    from lorazip_core.planning.options import CompressOptions
    from lorazip_core.verify.run import verify

    bundle, adapters, report_file = output / _BUNDLE, output / _ADAPTERS, output / _REPORT
    show = progress(quiet)
    show.note("compress: sixteen adapters, none of which may lose more than a tenth")
    compress(sample_path(), bundle, CompressOptions(), force=force, progress=show)
    show.note("verify: every error again, from the originals")
    report = report_in_options(verify(bundle, against=sample_path(), progress=show))
    write_data(report_file, console.json_bytes(report))
    show.note("export: back to ordinary PEFT adapters")
    export(bundle, adapters, force=force, progress=show)
    _render(report, output)
    return report.exit_code


def _not_of_demo(folder: Path) -> str | None:
    """Why a directory may not be replaced as a demo, in words; None for one that has nothing but what one wrote."""
    from lorazip_core.bundle.writer import not_of_bundle
    from lorazip_core.export.exporter import not_of_export

    for entry in sorted(folder.iterdir()):
        if entry.name in (_BUNDLE, _ADAPTERS):
            why = (not_of_bundle if entry.name == _BUNDLE else not_of_export)(entry) if entry.is_dir() else "a file"
            if why is not None:
                return f"{entry.name}: {why}"
        elif entry.name == _REPORT:
            if schema_of(entry) != _REPORT_SCHEMA:
                return f"{_REPORT} is no report of 'lorazip verify'"
        elif entry.name not in _PARTIALS:
            return f"a demo has no {entry.name}"
    return None


def _is_begun(folder: Path) -> bool:
    """Whether there is nothing but what an interrupted demo left, which the next one goes on from."""
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} == {_PARTIAL}


def _render(report: VerifyReport, output: Path) -> None:
    summary = report.summary
    assert summary is not None
    program, sample, bundle = _program(), _shown(sample_path()), output / _BUNDLE
    for text in (
        "",
        f"  adapters            {summary.adapters}, of HuggingFaceTB/SmolLM2-135M-Instruct",
        f"  before              {megabytes(summary.bytes_original)}",
        f"  after               {megabytes(summary.bytes_bundle)}",
        f"  times smaller       {summary.bytes_original / summary.bytes_bundle:.1f}",
        f"  squared error       mean {error(summary.mean_squared_error)}, worst {error(summary.max_squared_error)}"
        " (0 is lossless, 1 is all lost)",
        f"  verified            {'yes: the errors are what the bundle claims' if report.ok else 'NO'}",
        "",
        f"  originals           {sample}",
        f"  bundle              {bundle}",
        f"  report of verify    {output / _REPORT}",
        f"  exported adapters   {output / _ADAPTERS}, ready for PEFT",
        "",
        "Try next:",
        f"  {program} info {bundle}",
        f"  {program} compress {sample} -o smaller --budget 100kB",
        f"  {program} compress {sample} -o closer --max-error 0.05",
        f"  {program} compress YOUR_ADAPTERS -o YOUR_BUNDLE --dry-run",
    ):
        console.line(text)
    for finding in report.findings:
        console.error(finding.message)


def _program() -> str:
    """How to call lorazip from here: by its name, or by its path in a virtual environment that is not active."""
    return "lorazip" if shutil.which("lorazip") else _shown(Path(sys.executable).with_name("lorazip"))


def _shown(path: Path) -> str:
    """Relative to the current directory if it is inside."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
