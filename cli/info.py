"""`lorazip info`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorazip_core.base.errors import UsageError
from lorazip_core.base.text import plain

from . import console
from .options import Bundle, Json, Quiet, share, size
from .table import by_file, count, error, megabytes, table, times
from .wording import report_in_options

if TYPE_CHECKING:
    from lorazip_core.adapter.lock import Origin
    from lorazip_core.info import AdapterInfo, InfoReport
    from lorazip_core.vllm.capacity import ServingInfo

_UNKNOWN = "unknown"  # the Hub's own word for it, too


def info(
    bundle: Bundle,
    resident: Annotated[
        bool, typer.Option("--resident", help="Also read it all, and tell what it takes on a GPU that serves it.")
    ] = False,
    serving: Annotated[
        bool, typer.Option("--serving", help="The same, beside ordinary LoRA in vLLM and the memory of a GPU.")
    ] = False,
    gpu_memory: Annotated[
        int | None,
        typer.Option("--gpu-memory", metavar="SIZE", parser=size, help="With --serving: of one GPU, like 80GiB."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="With --gpu-memory: the base model, whose weights are there too."),
    ] = None,
    cache_share: Annotated[
        float,
        typer.Option(
            "--cache-share",
            metavar="S",
            callback=share,
            help="With --gpu-memory: set aside for the KV cache and all else.",
        ),
    ] = 0.3,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """List what is inside a bundle, as its manifest claims it."""
    if gpu_memory is not None and not serving:
        raise UsageError("--gpu-memory says nothing without --serving", "add it")
    if model is not None and gpu_memory is None:
        raise UsageError("--model says nothing without --gpu-memory", "give its size, like 80GiB")
    from lorazip_core.info import Serving
    from lorazip_core.info import info as describe

    compared = Serving(gpu_memory, cache_share, model) if serving else None
    report = describe(bundle, resident=resident, serving=compared)
    console.show(report_in_options(report), _render, as_json=json, quiet=False)
    return 0


def _render(report: InfoReport) -> None:
    asked = report.parameters
    rank = "" if asked.rank is None else f", rank {asked.rank}"
    shapes = ", ".join(
        f"{shape.count} {shape.kind} {shape.d_out} x {shape.d_in}"
        + (f" (kernel {' x '.join(map(str, shape.kernel))})" if shape.kernel else "")
        for shape in report.shapes
    )
    console.line(f"bundle       {report.bundle} (format {report.format_version}, by {report.created_by})")
    console.line(f"base model   {report.base_model or '-'}")
    console.line(", ".join([f"method       {asked.method}{rank}", asked.dtype, f"seed {asked.seed}", *asked.aims]))
    console.line(f"modules      {report.modules}: {shapes}")
    console.line(
        f"size         {megabytes(report.bytes_bundle)}, was {megabytes(report.bytes_original)}:"
        f" {times(report.bytes_original, report.bytes_bundle)}"
    )
    if added := [adapter for adapter in report.adapters if adapter.added]:
        on_bases = sum(adapter.cluster is not None for adapter in added)
        shared = f": {on_bases:,} on shared bases, {len(added) - on_bases:,} on their own" if report.clusters else ""
        console.line(f"added        {count(len(added), 'adapter')} since it was made{shared}")
    for reason in report.refit:
        console.line(f"refit        compressing all adapters again would pay: {reason}")
    if report.resident:
        console.line(
            f"resident     {megabytes(report.resident.bytes)}: {megabytes(report.resident.bytes_shared)} shared,"
            f" an adapter {megabytes(round(report.resident.mean_bytes_own))} on average,"
            f" {megabytes(report.resident.max_bytes_own)} at most"
        )
    if report.serving:
        assert report.resident is not None
        _render_serving(report.serving, report.resident.bytes)
    known = any(adapter.origin for adapter in report.adapters)
    if known:
        console.line(f"licences     {_licences(report.adapters)}")
    if report.clusters:
        clusters = [
            (
                str(number),
                f"{cluster.method}, rank {cluster.rank}",
                str(cluster.adapters),
                megabytes(cluster.bytes_basis),
                megabytes(cluster.bytes_cores),
            )
            for number, cluster in enumerate(report.clusters)
        ]
        console.line()
        console.line(table(("cluster", "kept as", "adapters", "shared basis", "cores"), clusters))
    adapters = [
        (
            adapter.name,
            f"{adapter.scheme}, cluster {adapter.cluster}" if adapter.cluster is not None else _alone(adapter),
            str(adapter.modules),
            error(adapter.squared_error),
            megabytes(adapter.bytes_own),
            *(() if adapter.bytes_resident is None else (megabytes(adapter.bytes_resident),)),
            *((_source(adapter.origin), _licence(adapter.origin) or "-") if known else ()),
        )
        for adapter in report.adapters
    ]
    head = (
        "adapter",
        "kept as",
        "modules",
        "squared error",
        "its own",
        *(("resident",) if report.resident else ()),
        *(("source", "licence") if known else ()),
    )
    console.line()
    console.line(table(head, adapters))
    if report.skipped:
        console.line()
        console.line(f"left out: {count(len(report.skipped), 'adapter')}")
        for skipped in report.skipped:
            console.line(f"  {skipped.name}: {skipped.reason}")
    if beside := by_file({adapter.name: adapter.left_out for adapter in report.adapters}):
        console.line()
        console.line("files that were beside the originals, and are not in the bundle")
        for text in beside:
            console.line(f"  {text}")


def _render_serving(compared: ServingInfo, resident: int) -> None:
    slots, memory = compared.slots, compared.memory
    console.line(
        f"as LoRA      {megabytes(slots.bytes)} a slot of rank {slots.rank} in vLLM:"
        f" the bundle takes as much as {resident / slots.bytes:,.1f} slots"
    )
    if memory:
        model = "" if memory.bytes_model is None else f" {megabytes(memory.bytes_model)} for the base model,"
        console.line(
            f"GPU          {megabytes(memory.bytes)}:{model} {megabytes(memory.bytes_cache)} for the KV cache"
            f" and all else, {_left(memory.bytes_adapters)}"
        )
        console.line(f"fits         {count(memory.fit, 'adapter')} like these, or {count(slots.fit or 0, 'slot')}")


def _left(size: int) -> str:
    return f"{megabytes(size)} for adapters" if size >= 0 else f"which is {megabytes(-size)} too much"


def _alone(adapter: AdapterInfo) -> str:
    return adapter.scheme if adapter.rank is None else f"{adapter.scheme}, rank {adapter.rank}"


def _source(origin: Origin | None) -> str:
    """``owner/repo/sub@1234567``, as ``fetch`` takes it; a local directory as it was given; '-' for nothing known."""
    if origin is None:
        return "-"
    place = origin.directory if origin.repository is None else origin.repository
    commit = f"@{origin.commit[:7]}" if origin.commit else ""
    return ("/".join(filter(None, (place, origin.subfolder))) or "-") + commit


def _licence(origin: Origin | None) -> str:
    """As the Hub writes it; empty when it is not known."""
    return origin.license or "" if origin else ""


def _licences(adapters: list[AdapterInfo]) -> str:
    """Every licence and how many adapters have it, the most frequent first, the unknown last."""
    counts = Counter(_licence(adapter.origin) or _UNKNOWN for adapter in adapters)
    ordered = sorted(counts.items(), key=lambda item: (item[0] == _UNKNOWN, -item[1], item[0]))
    return ", ".join(f"{plain(name)} ({number:,})" for name, number in ordered)
