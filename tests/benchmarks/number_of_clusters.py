"""Which number of clusters is best? Compress a collection with each, and see how near `cluster --clusters auto` comes.

    python tests/benchmarks/number_of_clusters.py DIR -o FILE [--clusters 1,2,4,8] [--methods joint,diag] [--verify]
    python tests/benchmarks/number_of_clusters.py DIR -o FILE --auto clusters.json

For every method and K, `lorazip compress` runs as a process of its own. What is minimised for each method is

    cost = mean squared error + bytes of the bundle / bytes of the originals,

what is lost plus what is kept. Every row goes to FILE as soon as it is known, and a row that is there already is not
computed again, so that the script can be stopped at any time. With --auto the number of clusters that the file's
chosen candidate has is compared: PASS if its cost is at most 5% above the least, else FAIL and exit 1.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from process import lorazip

MOST = 16
TOLERANCE = 1.05


class Row(TypedDict):
    """One method and number of clusters; errors are `squared_error` of adapters, seconds those of compress."""

    method: str
    rank: int
    clusters: int
    bytes_bundle: int
    bytes_original: int
    mean_squared_error: float
    max_squared_error: float
    cost: float
    sizes: list[int]
    seconds: float
    peak_bytes: int
    verified: bool


def measure(
    folder: Path, method: str, rank: int, clusters: int, *, device: str, verify: bool, work: Path | None = None
) -> Row:
    """Compress ``folder`` and read the report; the bundle is thrown away."""
    with tempfile.TemporaryDirectory(dir=work) as place:
        bundle = Path(place) / "bundle"
        options = ("--method", method, "--rank", rank, "--clusters", clusters, "--device", device)
        done = lorazip("compress", folder, "-o", bundle, *options, "--json", "-q")
        report = json.loads(done.stdout)
        if verify:
            lorazip("verify", bundle, "--against", folder, "-q")
    summary = report["summary"]
    kept = summary["bytes_bundle"] / summary["bytes_original"]
    return Row(
        method=method,
        rank=rank,
        clusters=clusters,
        bytes_bundle=summary["bytes_bundle"],
        bytes_original=summary["bytes_original"],
        mean_squared_error=summary["mean_squared_error"],
        max_squared_error=summary["max_squared_error"],
        cost=summary["mean_squared_error"] + kept,
        sizes=report["clusters"],
        seconds=done.seconds,
        peak_bytes=done.peak_bytes,
        verified=verify,
    )


def load(path: Path, folder: Path) -> list[Row]:
    """The rows in ``path``, none if it is not there; SystemExit if they are of another collection."""
    if not path.exists():
        return []
    report = json.loads(path.read_text())
    if report["collection"] != folder.name:
        raise SystemExit(f"{path} is about {report['collection']}, not {folder.name}")
    rows: list[Row] = report["rows"]
    return rows


def save(path: Path, folder: Path, rows: list[Row]) -> None:
    """Write the rows; an interrupted write leaves the old file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"collection": folder.name, "rows": rows}, indent=1) + "\n")
    os.replace(partial, path)


def least(rows: Sequence[Row], method: str) -> Row:
    """The row of least cost of a method."""
    return min((row for row in rows if row["method"] == method), key=lambda row: row["cost"])


def table(rows: Sequence[Row]) -> str:
    """All rows, by method and K, as Markdown; the least cost of each method is marked."""
    lines = [
        "| method | K | largest, smallest cluster | MB | mean | worst | cost | s | peak, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["method"], row["clusters"])):
        mark = " least" if row is least(rows, row["method"]) else ""
        lines.append(
            f"| {row['method']}, rank {row['rank']} | {row['clusters']} | {max(row['sizes'])}, {min(row['sizes'])}"
            f" | {row['bytes_bundle'] / 1e6:.2f} | {row['mean_squared_error']:.4f} | {row['max_squared_error']:.4f}"
            f" | {row['cost']:.4f}{mark} | {row['seconds']:.0f} | {row['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def at_the_end(rows: Sequence[Row]) -> list[str]:
    """A line for each method whose cost still falls at the largest K tried."""
    found = []
    for method in sorted({row["method"] for row in rows}):
        most = max(row["clusters"] for row in rows if row["method"] == method)
        if least(rows, method)["clusters"] == most > 1:
            found.append(f"{method}: the least is at the largest number tried, {most}; more may be better still")
    return found


def judge(rows: Sequence[Row], auto: Path) -> tuple[bool, str]:
    """Whether the number of clusters that ``auto`` chose is good, by the rows of its method; and a line about it."""
    report = json.loads(auto.read_text())
    chosen = [candidate for candidate in report["candidates"] if candidate["chosen"]]
    if len(chosen) != 1:
        raise SystemExit(f"{auto}: {len(chosen)} of {len(report['candidates'])} candidates are chosen, not one")
    method, clusters = chosen[0]["method"], chosen[0]["clusters"]
    own = [row for row in rows if row["method"] == method and row["clusters"] == clusters]
    if not own:
        raise SystemExit(f"auto chose {method} with {clusters} clusters, which is not measured: add it to --clusters")
    best = least(rows, method)
    ratio = own[0]["cost"] / best["cost"]
    return ratio <= TOLERANCE, (
        f"auto chose {clusters} clusters of {method}: cost {own[0]['cost']:.4f}, least {best['cost']:.4f} at"
        f" {best['clusters']}: {ratio:.3f} times (at most {TOLERANCE})"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a collection of adapters")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="rows, as JSON; continued")
    parser.add_argument("--clusters", default=",".join(map(str, range(1, MOST + 1))), metavar="K,K,…")
    parser.add_argument("--methods", default="joint,diag", metavar="M,M")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--verify", action="store_true", help="check every bundle against the originals")
    parser.add_argument("--auto", type=Path, metavar="FILE", help="what `lorazip cluster --clusters auto` wrote")
    parser.add_argument("--work", type=Path, help="where bundles are built for a while; default: the system's place")
    options = parser.parse_args(argv)
    folder = options.directory.resolve()
    if not folder.is_dir():
        print(f"no collection at {options.directory}", file=sys.stderr)
        return 2
    rows = load(options.output, folder)
    for clusters in map(int, options.clusters.split(",")):
        for method in options.methods.split(","):
            if any((row["method"], row["rank"], row["clusters"]) == (method, options.rank, clusters) for row in rows):
                continue
            print(f"{method}, {clusters} clusters", file=sys.stderr, flush=True)
            row = measure(
                folder,
                method,
                options.rank,
                clusters,
                device=options.device,
                verify=options.verify,
                work=options.work,
            )
            rows.append(row)
            save(options.output, folder, rows)
    shown = [row for row in rows if row["rank"] == options.rank]
    print("\n".join([table(shown), *at_the_end(shown)]))
    if options.auto is None:
        return 0
    holds, line = judge(shown, options.auto)
    print("PASS" if holds else "FAIL", line)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
