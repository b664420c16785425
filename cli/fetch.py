"""`lorazip fetch`."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.adapter.lock import LOCK_NAME, read_strictly
from lorazip_core.base.text import plain

from . import console
from .options import AllowPickle, Json, Quiet, between, size
from .progress import progress
from .table import count, megabytes, table
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.fetch.report import FetchedAdapter, FetchReport


def fetch(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the adapters go.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="owner/repo[/subfolder][@revision] or its address, collection:owner/slug, org:NAME, user:NAME,"
            " @list.txt or ./dir.",
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="ID", help="Only adapters of this base model.")
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", metavar="TEXT", help="Of org: and user:, only what matches.")
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="TAG", help="Of org: and user:, only what has this tag; may be given again."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            callback=between(1, 10**9),
            help="Of each org: and user:, only the N most downloaded.",
        ),
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option("--max-size", metavar="SIZE", parser=size, help="Leave out adapters with more (500MB, 2GiB)."),
    ] = None,
    locked: Annotated[
        bool, typer.Option("--locked", help="Have just what DIR/lorazip.lock says, or fail with exit code 1.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Look for newer commits, and say what changes.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove fetched adapters that the sources do not name.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", callback=between(1, 64), help="Requests at a time.")] = 16,
    fail_fast: Annotated[
        bool,
        typer.Option(
            "--fail-fast/--keep-going", help="Stop at the first failure, or bring what can be had (the default)."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be fetched; change nothing in DIR.")
    ] = False,
    allow_pickle: AllowPickle = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on without what cannot be used, is missing or is refused.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace fetched adapters whose files were changed.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Bring adapters from the Hub or a directory, pinned by a lock.

    DIR/lorazip.lock says from where each came and what it is, byte for byte: keep it under version control.
    """
    from lorazip_core.fetch.options import FetchOptions

    options = FetchOptions(
        base_model=base_model,
        search=search,
        tags=tuple(tag or ()),
        limit=limit,
        max_bytes=max_size,
        allow_pickle=allow_pickle,
        locked=locked,
        update=update,
        prune=prune,
        force=force,
        fail_fast=fail_fast,
        skip_bad=skip_bad,
        dry_run=dry_run,
        jobs=jobs,
    )
    if not output.is_file():
        options.check(sources or [], read_strictly(output), output)
    from lorazip_core.fetch.run import fetch as fetch_adapters

    report = report_in_options(fetch_adapters(sources or [], output, options, progress=progress(quiet)))
    if json:
        console.json(report)
    elif dry_run:
        _render_plan(report)
    if not (json or quiet):
        _render(report)
    for failure in report.failures:
        console.error(failure.message)
    if report.failures and not quiet:
        console.say(_unfinished(report))
    return min((failure.exit_code for failure in report.failures), default=0)


def _render_plan(report: FetchReport) -> None:
    rows = [
        (
            adapter.name,
            (adapter.origin.commit or "local")[:7],
            f"{adapter.files:,}",
            megabytes(adapter.size_bytes),
            adapter.base_model or "-",
            adapter.status,
        )
        for adapter in report.adapters
    ]
    if rows:
        console.line(table(("adapter", "commit", "files", "size", "base model", "status"), rows))
    console.line(f"{count(len(rows), 'adapter')}, {megabytes(report.summary.size_bytes)}")


def _render(report: FetchReport) -> None:
    summary = report.summary
    _render_changes(report.adapters)
    console.listing("removed", report.removed)
    console.listing("left out", [f"{each.what}: {each.reason}" for each in report.left_out])
    bases = Counter(adapter.base_model for adapter in report.adapters)
    if len(bases) > 1:
        named = ", ".join(f"{base or 'unnamed'} ({number:,})" for base, number in bases.most_common(3))
        console.say(f"the adapters have {len(bases)} base models: {named}{' …' if len(bases) > 3 else ''}")
    if report.dry_run or not (report.complete or summary.adapters):
        return
    there = f"{count(summary.adapters, 'adapter')} in {plain(report.directory)}, {megabytes(summary.size_bytes)}"
    if report.complete and summary.present == summary.adapters and not report.removed:
        console.say(f"{there}: all as they should be, nothing to download")
        return
    changes = [
        f"{number:,} {what}"
        for number, what in (
            (summary.new, "new"),
            (summary.updated, "updated"),
            (summary.restored, "restored"),
            (summary.present, "as they were"),
            (summary.removed, "removed"),
        )
        if number
    ]
    console.say(f"{there}: {', '.join(changes) or 'none'}; {megabytes(summary.bytes_downloaded)} downloaded")
    if report.complete and summary.new:
        console.say(f"go on with: lorazip cluster {shlex.quote(report.directory)} -o clusters.json")


def _render_changes(adapters: list[FetchedAdapter]) -> None:
    """What --update changed."""
    lines = [
        f"{each.name}: {(each.previous_commit or '?')[:7]} to {(each.origin.commit or '?')[:7]}"
        f" ({', '.join(each.changed_files) or 'no file that is needed'})"
        for each in adapters
        if each.previous_commit is not None
    ]
    console.listing("at another commit", lines)


def _unfinished(report: FetchReport) -> str:
    failures = count(len(report.failures), "failure")
    if report.dry_run:
        return failures
    if report.locked:
        return f"{failures}: {report.directory} is not what {LOCK_NAME} says"
    escape = ", or --skip-bad" if any(failure.skippable for failure in report.failures) else ""
    return f"{failures}: {LOCK_NAME} was not written; what has arrived stays (run again to go on{escape})"
