"""`lorazip info`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import console
from .options import Bundle, Json
from .table import count, error, megabytes, table, times

if TYPE_CHECKING:
    from lorazip_core.info import AdapterInfo, InfoReport


def info(bundle: Bundle, json: Json = False) -> int:
    """List what is inside a bundle, as its manifest claims it."""
    from lorazip_core.info import info as describe

    report = describe(bundle)
    if json:
        console.json(report)
    else:
        _render(report)
    return 0


def _render(report: InfoReport) -> None:
    asked = report.parameters
    rank = "" if asked.rank is None else f", rank {asked.rank}"
    limit = "" if asked.max_error is None else f", no adapter's squared error above {asked.max_error:g}"
    shapes = ", ".join(
        f"{shape.count} {shape.kind} {shape.d_out} x {shape.d_in}"
        + (f" (kernel {' x '.join(map(str, shape.kernel))})" if shape.kernel else "")
        for shape in report.shapes
    )
    console.line(f"bundle       {report.bundle} (format {report.format_version}, by {report.created_by})")
    console.line(f"base model   {report.base_model or '-'}")
    console.line(f"method       {asked.method}{rank}, {asked.dtype}, seed {asked.seed}{limit}")
    console.line(f"modules      {report.modules}: {shapes}")
    console.line(
        f"size         {megabytes(report.bytes_bundle)}, was {megabytes(report.bytes_original)}:"
        f" {times(report.bytes_original, report.bytes_bundle)}"
    )
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
        )
        for adapter in report.adapters
    ]
    console.line()
    console.line(table(("adapter", "kept as", "modules", "squared error", "its own"), adapters))
    if report.skipped:
        console.line()
        console.line(f"left out: {count(len(report.skipped), 'adapter')}")
        for skipped in report.skipped:
            console.line(f"  {skipped.name}: {skipped.reason}")


def _alone(adapter: AdapterInfo) -> str:
    return adapter.scheme if adapter.rank is None else f"{adapter.scheme}, rank {adapter.rank}"
