"""`lorazip export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorazip_core.bundle.kinds import check_bundle_path
from lorazip_core.bundle.output_path import check_output_path

from . import console
from .early import check_new
from .options import Bundle, Dtype, Force, Json, Quiet, check_rank
from .progress import progress
from .table import count

if TYPE_CHECKING:
    from lorazip_core.export.exporter import ExportReport


def export(
    bundle: Bundle,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the adapters go.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="Only this adapter, or all like 'fv_*'; may be given again.",
        ),
    ] = None,
    format: Annotated[Literal["peft"], typer.Option("--format", metavar="peft", help="What to write.")] = "peft",
    target: Annotated[
        Literal["vllm"] | None, typer.Option("--target", metavar="vllm", help="Check and pad for this engine.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="R", callback=check_rank, help="Truncate every module to this rank."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option("--dtype", metavar="bf16|f16|f32", help="What the adapters store. Default: as the bundle."),
    ] = None,
    no_pad: Annotated[
        bool, typer.Option("--no-pad", help="Leave ranks uneven where they are, with rank and alpha patterns.")
    ] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Write adapters of a bundle as ordinary PEFT adapters."""
    check_bundle_path(bundle)
    check_output_path(output, [bundle])
    from lorazip_core.bundle.contradictions import refuse_contradictions
    from lorazip_core.bundle.manifest import read_manifest

    refuse_contradictions(bundle, read_manifest(bundle, ("read", "export")))
    check_new(output, force=force)
    from lorazip_core.export.exporter import export as export_adapters

    report = export_adapters(
        bundle,
        output,
        format=format,
        adapters=adapter or (),
        target=target,
        rank=rank,
        dtype=dtype,
        pad=not no_pad,
        force=force,
        progress=progress(quiet),
    )
    console.show(report, _render, as_json=json, quiet=quiet)
    return 0


def _render(report: ExportReport) -> None:
    ranks = sorted({one.rank for one in report.adapters})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    console.say(f"{count(len(report.adapters), 'adapter')} ({report.format}, {span}) in {report.output}")
    if report.max_lora_rank is not None:
        console.say(f"serve with: vllm serve MODEL --enable-lora --max-lora-rank {report.max_lora_rank}")
