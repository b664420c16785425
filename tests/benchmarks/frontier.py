"""Bytes against squared error: lorazip, everything published that could do the same, and Shannon's bound.

    python tests/benchmarks/frontier.py DIR… [--ours "--method svd --rank 2"]… [--json FILE] [--svg FILE]
    python tests/benchmarks/frontier.py DIR… --reuse FILE --ours "…"

Every DIR is a collection. Each `--ours` are options of `lorazip compress`: the bundle is made by the command line, its
bytes are those of all its files, and its errors are measured by `verify --against`. So are JD-Full and JD-Diag, which
are lorazip's `joint` and `diag` (`--jd`). The others are in `competitors.py`; `--reuse` takes them from a file that an
earlier run wrote with `--json`, if it is of the same adapters.

"×" is how many times smaller than the factors in bf16, at each adapter's own rank; a squared error is that of an
adapter, Σ‖ΔW−ΔŴ‖²/Σ‖ΔW‖² over its modules. Between two settings of a competitor its error is interpolated on logarithms
of both; below its fewest bytes it has none, above its most bytes it has that of the most.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal

from competitors import SIZES, Point, measure
from loglog import Line, Panel, svg
from other_tools import size
from process import lorazip
from real_adapters import require

from lorazip_core.adapter.collection import open_collection

JD = (
    "--method joint --rank 8",
    "--method joint --rank 16",
    "--method joint --rank 32",
    "--method joint --rank 16 --clusters 3",
    "--method diag --rank 8",
    "--method diag --rank 16",
    "--method diag --rank 32",
    "--method diag --rank 16 --clusters 3",
)
JD_NAMES = {"joint": "JD-Full", "diag": "JD-Diag"}
OURS = "lorazip"
BOUND = "Shannon"
COLUMNS = (8, 16, 28, 40, 56, 80)
X_RANGE, Y_LEAST = (2.0, 200.0), 1e-3
Kind = Literal["mean", "worst"]


@dataclass
class Found:
    """A collection: bytes of its factors in bf16, what any bundle keeps besides, all points, and Shannon's bound.

    ``bound`` is (bytes, least mean error) for any split of the bytes between adapters, ``equal_bound`` (bytes, mean,
    worst) where each has a share by its size.
    """

    name: str
    adapters: list[str]
    stored: int
    fixed: int
    points: list[Point]
    bound: list[tuple[int, float]]
    equal_bound: list[tuple[int, float, float]]
    ours: list[Point] = field(default_factory=list)
    bound_of_ours: list[float] = field(default_factory=list)

    def competitors(self) -> dict[str, list[Point]]:
        grouped: dict[str, list[Point]] = {}
        for point in self.points:
            grouped.setdefault(point.competitor, []).append(point)
        return grouped


def best(points: Sequence[Point], kind: Kind = "mean") -> list[Point]:
    """Those that no other one beats in bytes and error, by bytes."""
    kept: list[Point] = []
    for point in sorted(points, key=attrgetter("bytes", kind)):
        if not kept or getattr(point, kind) < getattr(kept[-1], kind):
            kept.append(point)
    return kept


def error_at(points: Sequence[Point], limit: float, kind: Kind = "mean") -> float | None:
    """The error of a competitor within ``limit`` bytes, interpolated; None if it needs more."""
    front = best(points, kind)
    below = [point for point in front if point.bytes <= limit]
    if not below:
        return None
    left = below[-1]
    low = float(getattr(left, kind))
    if len(below) == len(front) or low == 0:
        return low
    right = front[len(below)]
    share = math.log(limit / left.bytes) / math.log(right.bytes / left.bytes)
    return float(low * (max(getattr(right, kind), 1e-12) / low) ** share)


def strongest(found: Found, limit: float, kind: Kind = "mean") -> tuple[str, float] | None:
    """The competitor with the least error within ``limit`` bytes, and that error."""
    errors = {name: error_at(points, limit, kind) for name, points in found.competitors().items()}
    known = {name: error for name, error in errors.items() if error is not None}
    return min(known.items(), key=lambda item: item[1]) if known else None


def compressed(folder: Path, words: str, name: str, *, against: bool) -> Point:
    """A bundle of the command line: all its bytes, and its errors, measured if ``against``."""
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        done = lorazip("compress", folder, "-o", bundle, *shlex.split(words), "--device", "cpu", "--json", "-q")
        summary = json.loads(done.stdout)["summary"]
        if against:
            done = lorazip("verify", bundle, "--against", folder, "--device", "cpu", "--json", "-q")
            report = json.loads(done.stdout)
            if not report["ok"]:
                raise SystemExit(f"{words}: the bundle does not verify: {report['findings']}")
            summary = report["summary"]
        setting = words.replace("--", "").replace("method ", "")
        return Point(name, setting, size(bundle), summary["mean_squared_error"], summary["max_squared_error"])


@contextmanager
def first(folder: Path, count: int | None) -> Iterator[Path]:
    """``folder``, or another one with links to the first adapters only."""
    if count is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for adapter in open_collection(folder).adapters[:count]:
            link = Path(place) / adapter.name
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(adapter.folder.resolve(), link)
        yield Path(place)


def survey(folder: Path, name: str, options: argparse.Namespace) -> Found:
    """A collection with all competitors, measured or reused, and ours."""
    collection = open_collection(folder)
    adapters = [adapter.name for adapter in collection.adapters]
    reused = _reused(options.reuse, name, adapters) if options.reuse else None
    print(f"{name}: {'spectra' if reused is not None else 'competitors'}", file=sys.stderr)
    stored, fixed, spectra, points = measure(collection, competing=reused is None)
    if reused is None:
        for words in options.jd:
            print(f"{name}: {words}", file=sys.stderr)
            points.append(compressed(folder, words, _jd_name(words), against=False))
    sizes = (2, *SIZES, 56, 160, 200)
    each = [spectra.bound(smaller) for smaller in sizes]
    found = Found(
        name,
        adapters,
        stored,
        fixed,
        points if reused is None else reused,
        [(stored // x + fixed, spectra.bound_of_the_mean(8 * stored / x)) for x in sizes],
        [(stored // x + fixed, float(e.mean()), float(e.max())) for x, e in zip(sizes, each, strict=True)],
    )
    for words in options.ours:
        print(f"{name}: {words}", file=sys.stderr)
        found.ours.append(compressed(folder, words, OURS, against=True))
    found.bound_of_ours = [spectra.bound_of_the_mean(8 * max(0, point.bytes - fixed)) for point in found.ours]
    return found


def _jd_name(words: str) -> str:
    """By its method, which is ``joint`` unless it says otherwise."""
    return next((name for method, name in JD_NAMES.items() if method in shlex.split(words)), JD_NAMES["joint"])


def _reused(file: Path, name: str, adapters: list[str]) -> list[Point]:
    for each in json.loads(file.read_text())["collections"]:
        if each["name"] == name and each["adapters"] == adapters:
            return [Point(**point) for point in each["points"]]
    raise SystemExit(f"{file} has no collection {name} with these {len(adapters)} adapters")


def details(found: Found) -> Iterator[str]:
    """Every setting that no other one of the same competitor beats in bytes and error."""
    yield f"**{found.name}**: {len(found.adapters)} adapters, {found.stored / 1e6:.2f} MB of factors in bf16, and"
    yield f"{found.fixed / 1e3:.1f} kB that any bundle keeps besides"
    yield ""
    yield "| | | MB | × | × without what all keep | mean | worst |"
    yield "|---|---|---|---|---|---|---|"
    for point in [*found.ours, *(point for points in found.competitors().values() for point in best(points))]:
        yield (
            f"| {point.competitor} | {point.setting} | {point.bytes / 1e6:.3f} | {found.stored / point.bytes:.1f}"
            f" | {found.stored / max(1, point.bytes - found.fixed):.1f} | {point.mean:.4f} | {point.worst:.4f} |"
        )
    for number, mean, worst in found.equal_bound:
        smaller = found.stored / (number - found.fixed)
        if round(smaller) not in (*COLUMNS, 160):
            continue
        yield (
            f"| {BOUND} | each adapter its share | {number / 1e6:.3f} | {found.stored / number:.1f} | {smaller:.1f}"
            f" | {mean:.4f} | {worst:.4f} |"
        )


def overview(found: Found) -> Iterator[str]:
    """The mean error of every competitor at the same sizes, with all bytes."""
    yield f"| {found.name}, mean error at | {' | '.join(f'{smaller}×' for smaller in COLUMNS)} |"
    yield f"|---|{'---|' * len(COLUMNS)}"
    limits = [found.stored / smaller for smaller in COLUMNS]
    rows = {OURS: found.ours} if found.ours else {}
    rows |= found.competitors()
    for name, points in rows.items():
        yield f"| {name} | {' | '.join(_error(error_at(points, limit)) for limit in limits)} |"
    bound = [Point(BOUND, "", number, mean, mean) for number, mean in found.bound]
    yield f"| {BOUND}, any split | {' | '.join(_error(error_at(bound, limit)) for limit in limits)} |"


def _ratio(ours: float, other: float) -> str:
    return f"{ours / other:.2f}" if other > 0 else ""


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def verdicts(found: Found) -> Iterator[str]:
    """Each of our points beside the strongest competitor with no more bytes, and the bound there."""
    yield (
        f"| {found.name}, ours | MB | × | mean | best at no more bytes | its mean | ours / its"
        " | worst | least worst at no more bytes | ours / that | mean / Shannon's |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for point, bound in zip(found.ours, found.bound_of_ours, strict=True):
        cells = [point.setting, f"{point.bytes / 1e6:.3f}", f"{found.stored / point.bytes:.1f}"]
        for kind in ("mean", "worst"):
            own = getattr(point, kind)
            other = strongest(found, point.bytes, kind)
            name, error = other or ("nothing", math.nan)
            cells += [f"{own:.4f}", *([name] if kind == "mean" else []), f"{error:.4f}", _ratio(own, error)]
            if kind == "worst":
                cells[-2] += f" {name}"
        yield f"| {' | '.join([*cells, _ratio(point.mean, bound)])} |"


def picture(every: Sequence[Found]) -> str:
    panels = []
    for found in every:

        def line(points: Sequence[tuple[int, float]], stored: int = found.stored) -> list[tuple[float, float]]:
            return [(stored / number, error) for number, error in sorted(points)]

        lines = [Line(BOUND, line(found.bound), bound=True)]
        for name, points in found.competitors().items():
            lines.append(Line(name, line([(point.bytes, point.mean) for point in best(points)])))
        if found.ours:
            lines.append(Line(OURS, line([(point.bytes, point.mean) for point in found.ours]), strong=True))
        panels.append(Panel(f"{found.name}, {len(found.adapters)} adapters", lines))
    return svg(panels, "times smaller, all bytes on disk", "mean squared error", X_RANGE, Y_LEAST)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="a collection of adapters")
    parser.add_argument("--ours", action="append", default=[], metavar="OPTIONS", help="of `lorazip compress`")
    parser.add_argument("--jd", action="append", metavar="OPTIONS", help="instead of eight of joint and diag; '': none")
    parser.add_argument("--first", type=int, metavar="N", help="only so many adapters of each, by name")
    parser.add_argument("--reuse", type=Path, metavar="FILE", help="competitors from what --json wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw them here")
    options = parser.parse_args(argv)
    options.jd = JD if options.jd is None else [words for words in options.jd if words]
    every = []
    for folder in options.dirs:
        with first(require(folder), options.first) as there:
            every.append(survey(there, folder.resolve().name, options))
    for table in (details, overview, verdicts):
        for found in every:
            if table is not verdicts or found.ours:
                print("\n".join(table(found)), end="\n\n")
    if options.json:
        figures = [
            {**asdict(found), "points": [p._asdict() for p in found.points], "ours": [p._asdict() for p in found.ours]}
            for found in every
        ]
        options.json.write_text(json.dumps({"collections": figures}, indent=1) + "\n")
    if options.svg:
        options.svg.write_text(picture(every))
    return 0


if __name__ == "__main__":
    sys.exit(main())
