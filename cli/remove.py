"""`lorazip remove`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.bundle.choose import matching
from lorazip_core.bundle.contradictions import refuse_contradictions
from lorazip_core.bundle.kinds import check_bundle_path
from lorazip_core.bundle.manifest import read_manifest
from lorazip_core.bundle.output_path import check_output_path

from . import console
from .early import check_new
from .options import Bundle, DryRun, Force, Json, NewBundle, Quiet, require_output
from .progress import progress
from .table import count, megabytes
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.maintain.remove import RemoveReport


def remove(
    bundle: Bundle,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Adapters, or all like 'fv_*'.")],
    output: NewBundle = None,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Remove adapters from a bundle; the rest stays as it is."""
    require_output(output, dry_run=dry_run)
    check_bundle_path(bundle)
    manifest = read_manifest(bundle, ("read",))
    refuse_contradictions(bundle, manifest)
    matching(manifest, bundle, names)
    if output is not None:
        check_output_path(output, [bundle])
    if output is not None and not dry_run:
        check_new(output, force=force)
    from lorazip_core.maintain.remove import remove as remove_from

    report = report_in_options(
        remove_from(bundle, names, None if dry_run else output, force=force, progress=progress(quiet))
    )
    console.show(report, _render_plan if dry_run else _render, as_json=json, quiet=quiet and not dry_run)
    return 0


def _render(report: RemoveReport) -> None:
    console.say(
        f"{count(len(report.removed), 'adapter')} removed from {report.bundle}:"
        f" {count(report.adapters, 'adapter')} in {report.output},"
        f" {megabytes(report.bytes_after or 0)}, which were {megabytes(report.bytes_before)}"
    )
    for reason in report.refit:
        console.say(f"compressing all adapters again would pay: {reason}")


def _render_plan(report: RemoveReport) -> None:
    console.line(
        f"{count(len(report.removed), 'adapter')} to remove from {report.bundle},"
        f" {count(report.adapters, 'adapter')} left"
    )
    for name in report.removed:
        console.line(f"  {name}")
    console.line(f"files: {len(report.dropped):,} dropped, {len(report.rewritten):,} written again without them")
