"""`lorazip add`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.base.text import plain
from lorazip_core.bundle.contradictions import refuse_contradictions
from lorazip_core.bundle.kinds import check_adapters_path, check_bundle_path
from lorazip_core.bundle.manifest import read_manifest
from lorazip_core.bundle.output_path import check_output_path

from . import console
from .early import check_new
from .options import (
    AllowMixedBase,
    AllowPickle,
    Bundle,
    Device,
    Directory,
    DryRun,
    Force,
    Json,
    NewBundle,
    Quiet,
    SkipBad,
    require_output,
    squared_error,
)
from .progress import progress
from .table import count, error, megabytes
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.maintain.add import AddedAdapter, AddReport


def add(
    bundle: Bundle,
    directory: Directory,
    output: NewBundle = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            metavar="E",
            callback=squared_error,
            help="The most that any of them may lose. Default: as those in the bundle do.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put them in the place of adapters that have their names.")
    ] = False,
    device: Device = "auto",
    dry_run: DryRun = False,
    allow_pickle: AllowPickle = False,
    allow_mixed_base: AllowMixedBase = False,
    skip_bad: SkipBad = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Add adapters to a bundle; all else stays as it is."""
    require_output(output, dry_run=dry_run)
    check_bundle_path(bundle)
    check_adapters_path(directory)
    refuse_contradictions(bundle, read_manifest(bundle, ("read",)))
    if output is not None:
        check_output_path(output, [bundle, directory])
    if output is not None and not dry_run:
        check_new(output, force=force)
    from lorazip_core.maintain.add import AddOptions
    from lorazip_core.maintain.add import add as add_to

    options = AddOptions(
        max_error=max_error,
        replace=replace,
        device=device,
        allow_pickle=allow_pickle,
        allow_mixed_base=allow_mixed_base,
        skip_bad=skip_bad,
    )
    report = report_in_options(
        add_to(bundle, directory, None if dry_run else output, options, force=force, progress=progress(quiet))
    )
    console.show(report, _render_plan if dry_run else _render, as_json=json, quiet=quiet and not dry_run)
    return 0


def _render(report: AddReport) -> None:
    console.say(
        f"{count(len(report.added), 'adapter')} added to {report.bundle}{_replaced(report)}:"
        f" {count(report.adapters, 'adapter')} in {report.output},"
        f" {megabytes(report.bytes_after or 0)}, which were {megabytes(report.bytes_before)}"
    )
    errors = {each.name: each.squared_error for each in report.added if each.squared_error is not None}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        mean = math.fsum(errors.values()) / len(errors)
        console.say(f"squared error of those: mean {error(mean)}, worst {error(errors[worst])} ({plain(worst)})")
    alone = [each for each in report.added if each.cluster is None and _had_choice(report)]
    console.listing("served by no shared basis, and kept on their own", list(map(_why_alone, alone)))
    for reason in report.refit:
        console.say(f"compressing all adapters again would pay: {reason}")


def _had_choice(report: AddReport) -> bool:
    """Whether the bundle has shared bases at all."""
    return any(each.cluster is not None or each.cluster_squared_error is not None for each in report.added)


def _why_alone(adapter: AddedAdapter) -> str:
    if adapter.cluster_squared_error is None:
        return f"{adapter.name}: no basis knows all of its modules"
    return f"{adapter.name}: it would lose {error(adapter.cluster_squared_error)} on the one that serves it best"


def _render_plan(report: AddReport) -> None:
    console.line(
        f"{count(len(report.added), 'adapter')} to add to {report.bundle}{_replaced(report)}:"
        f" {megabytes(report.bytes_added)} as they are, {count(report.adapters, 'adapter')} then"
    )
    for adapter in report.added:
        if adapter.cluster is None:
            where = f"{adapter.scheme}, on its own"
        else:
            where = f"{adapter.scheme}, cluster {adapter.cluster}, squared error {error(adapter.squared_error)}"
        console.line(f"  {adapter.name}: {where}")
    for skipped in report.skipped:
        console.line(f"left out: {skipped.name}: {skipped.reason}")


def _replaced(report: AddReport) -> str:
    number = sum(each.replaces for each in report.added)
    return f", {number:,} of them in the place of older ones" if number else ""
