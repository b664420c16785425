"""`lorazip cluster`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.bundle.kinds import check_adapters_path
from lorazip_core.report.html import cluster_page

from . import console
from .options import (
    AllowMixedBase,
    AllowPickle,
    Device,
    DeviceMemory,
    Directory,
    Dtype,
    ForceFiles,
    Json,
    Memory,
    Quiet,
    ReportPage,
    Seed,
    SkipBad,
    Weights,
    check_rank,
)
from .progress import progress
from .report_file import check_report_files, write_report_files
from .table import count, error, megabytes, saved, table
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.clustering.clusters_file import Candidate, ClusterFigures
    from lorazip_core.clustering.run import ClusterReport


def _number(value: str) -> str:
    """A number of clusters, or auto."""
    if value != "auto" and not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        raise typer.BadParameter(f"{value!r} is neither auto nor a number of 1 or more")
    return value


def cluster(
    directory: Directory,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.json", help="Where the file for compress goes.")
    ],
    clusters: Annotated[
        str,
        typer.Option("--clusters", metavar="K|auto", callback=_number, help="How many; auto weighs bytes and error."),
    ] = "auto",
    rank: Annotated[
        int,
        typer.Option("--rank", metavar="R", callback=check_rank, help="Rank of the bases that they will share."),
    ] = 16,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", metavar="bf16|f16|f32", help="What the bundle will store.")
    ] = "bf16",
    seed: Seed = 0,
    weights: Weights = "adapter",
    html: ReportPage = None,
    device: Device = "auto",
    memory: Memory = None,
    device_memory: DeviceMemory = None,
    allow_pickle: AllowPickle = False,
    allow_mixed_base: AllowMixedBase = False,
    skip_bad: SkipBad = False,
    force: ForceFiles = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Say which adapters share a basis, for compress --clusters FILE.

    Finds adapters that no cluster serves, and adapters that hardly differ from another.
    """
    check_adapters_path(directory)
    files = {"-o": output, "--report": html}
    check_report_files(files, inputs=[directory], force=force, json=json)
    from lorazip_core.clustering.run import ClusterOptions
    from lorazip_core.clustering.run import cluster as cluster_adapters

    found = cluster_adapters(
        directory,
        output,
        ClusterOptions(
            clusters="auto" if clusters == "auto" else int(clusters),
            rank=rank,
            dtype=dtype,
            seed=seed,
            weights=weights,
            device=device,
            memory=memory,
            device_memory=device_memory,
        ),
        allow_pickle=allow_pickle,
        allow_mixed_base=allow_mixed_base,
        skip_bad=skip_bad,
        progress=progress(quiet),
    )
    write_report_files(
        files,
        {
            "-o": lambda: console.json_bytes(found.assignment),
            "--report": lambda: cluster_page(found.assignment, found.similarity).encode(),
        },
    )
    console.show(report_in_options(found.report), _render, as_json=json, quiet=quiet)
    return 0


def _render(report: ClusterReport) -> None:
    if report.candidates:
        console.say("cost = mean squared error + bytes of the bundle / bytes of the originals")
        console.say(table(_HEAD, map(_candidate_row, report.candidates)))
        _advise(report.candidates)
        console.say()
    console.say(
        f"{count(report.adapters, 'adapter')} in {count(len(report.clusters), 'cluster')} of rank {report.rank}:"
        f" squared error mean {error(report.mean_squared_error)}, worst {error(report.max_squared_error)}"
    )
    numbered = list(enumerate(report.clusters))
    if len(numbered) > 2 * console.LISTED:
        console.say(f"the {console.LISTED} clusters of largest mean error:")
        numbered = sorted(numbered, key=lambda each: -each[1].mean_squared_error)[: console.LISTED]
    console.say(
        table(
            ("cluster", "adapters", "mean error", "worst", "similarity within", "to others"),
            (_cluster_row(number, figures) for number, figures in numbered),
        )
    )
    console.listing("served by no cluster", [f"{each.name}: {_REASONS[each.reason]}" for each in report.outliers])
    console.listing(
        "nearly the same",
        [
            f"{each.first} and {each.second} differ by {error(each.squared_distance)} of their energy"
            for each in report.near_duplicates
        ],
    )
    file = shlex.quote(report.output)
    console.say(f"go on with: lorazip compress DIR -o BUNDLE --rank {report.rank} --clusters {file}")


_HEAD = ("clusters", "bundle", "saved", "mean error", "worst", "cost", "measured on")
_REASONS = {
    "alone": "alone in its cluster",
    "loses-most": "loses more than half of its update",
    "shares-nothing": "shares hardly anything with the others of its cluster",
}


def _candidate_row(candidate: Candidate) -> tuple[str, ...]:
    return (
        f"svd, rank {candidate.rank}" if candidate.method == "svd" else str(candidate.clusters),
        megabytes(candidate.bytes_bundle),
        saved(candidate.saved_ratio),
        error(candidate.mean_squared_error),
        error(candidate.max_squared_error),
        f"{candidate.cost:.4f}",
        f"{'all modules' if candidate.measured_on == 'all' else 'probes'}{' (chosen)' if candidate.chosen else ''}",
    )


def _advise(candidates: list[Candidate]) -> None:
    """Say so when full cores in clusters are not as good as leaving every adapter on its own."""
    chosen = next(candidate for candidate in candidates if candidate.chosen)
    best = min(candidates, key=lambda candidate: candidate.cost)
    if best.method == "svd" and best.cost < chosen.cost:
        console.say(
            f"these adapters share little: compress --method svd --rank {best.rank} costs less than full cores in any"
            f" number of clusters ({best.cost:.4f} against {chosen.cost:.4f}); diagonal cores may cost less"
        )


def _cluster_row(number: int, figures: ClusterFigures) -> tuple[str, ...]:
    similarities = (figures.similarity_within, figures.similarity_to_others)
    return (
        str(number),
        f"{figures.adapters:,}",
        error(figures.mean_squared_error),
        error(figures.max_squared_error),
        *("-" if similarity is None else f"{similarity:.3f}" for similarity in similarities),
    )
