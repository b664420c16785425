"""Bytes against squared error: lorazip, everything published that could do the same, and Shannon's bound.

    python tests/benchmarks/frontier.py DIR… [--json FILE]
    python tests/benchmarks/frontier.py DIR… --reuse FILE… [--ours "--method svd --rank 2"]…
    python tests/benchmarks/frontier.py --show FILE… [--svg FILE]

Every DIR is a collection. Each `--ours` are options of `lorazip compress`: the bundle is made by the command line, its
bytes are those of all its files, and its errors are measured by `verify --against`. So are JD-Full and JD-Diag, which
are lorazip's `joint` and `diag` (`--jd`), but for their errors, which are those that the manifest claims; of each of
these bundles `coded_bases.py` measures what coded bases and cores would make. All others are in `competitors.py`.
`--reuse` takes competitors from files that earlier runs wrote with `--json`, where they are of the same adapters;
`--show` measures nothing and prints what is in such files.

"×" is how many times smaller than the factors in bf16, at each adapter's own rank; a squared error is that of an
adapter, Σ‖ΔW−ΔŴ‖²/Σ‖ΔW‖² over its modules. Between two settings of a competitor its error is interpolated on logarithms
of both; below its fewest bytes it has none ("–"), above its most bytes it has that of the most. In the summary it is
ours that is interpolated, at the very bytes that a setting of a competitor takes.
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
from typing import Any, Literal, NamedTuple

import coded_bases
from competitors import SIZES, Point, measure
from loglog import Line, Panel, svg
from other_tools import size
from process import lorazip
from real_adapters import require

from lorazip_core.adapter.collection import open_collection

OURS = tuple(
    f"--max-mean-error {error:g}"
    for error in (0.0003, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.055, 0.1, 0.15, 0.22, 0.3, 0.4, 0.55, 0.7)
)
JD = tuple(
    f"--method {method} --rank {rank}{f' --clusters {clusters}' if clusters > 1 else ''}"
    for method in ("joint", "diag")
    for rank, clusters in ((4, 1), (8, 1), (16, 1), (32, 1), (64, 1), (8, 3), (16, 3), (8, 8))
)
JD_NAMES = {"joint": "JD-Full", "diag": "JD-Diag"}
BOUND = "Shannon"
UNSHIPPED = ("SVD, int4", "SVD, int4 by absmax")
"""What nobody ships or has published: truncated SVDs in groups of 4 bits."""
CODED_BASES = ("joint, ", "diag, ")
"""How the names of `coded_bases` begin."""
NOT_DRAWN = (" by absmax", " by min-max")
"""How names end of what is a little worse than another one of the same idea."""
AIMS = {"published": 0.5, "SVD, int4": 0.65, "coded bases": 1.0}
"""At most so much of their errors."""
COLUMNS = (6, 8, 10, 12, 16, 20, 28, 40, 56, 80)
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
    left_out: list[str] = field(default_factory=list)
    """Settings that cannot be had of this collection, and why."""

    def competitors(self) -> dict[str, list[Point]]:
        return _grouped(self.points)


def _grouped(points: Sequence[Point]) -> dict[str, list[Point]]:
    grouped: dict[str, list[Point]] = {}
    for point in points:
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


def family(competitor: str) -> str:
    """The key of `AIMS` that a competitor belongs to."""
    if competitor.startswith(CODED_BASES):
        return "coded bases"
    return "SVD, int4" if competitor in UNSHIPPED else "published"


def strongest(found: Found, limit: float, kind: Kind = "mean", of: str | None = None) -> tuple[str, float] | None:
    """The competitor (``of`` one family) with the least error within ``limit`` bytes, and that error."""
    errors = {
        name: error_at(points, limit, kind)
        for name, points in found.competitors().items()
        if of is None or family(name) == of
    }
    known = {name: error for name, error in errors.items() if error is not None}
    return min(known.items(), key=lambda item: item[1]) if known else None


@contextmanager
def bundle_of(folder: Path, words: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A bundle of the command line, and the report of `compress`."""
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        done = lorazip("compress", folder, "-o", bundle, *shlex.split(words), "--device", "cpu", "--json", "-q")
        yield bundle, json.loads(done.stdout)


def point_of(bundle: Path, words: str, name: str, summary: dict[str, Any]) -> Point:
    """All bytes of a bundle, and the errors of a report."""
    return Point(name, _setting(words), size(bundle), summary["mean_squared_error"], summary["max_squared_error"])


def _setting(words: str) -> str:
    return words.replace("--", "").replace("method ", "")


def ours(folder: Path, words: str) -> Point:
    """A bundle with its errors as `verify` measures them."""
    with bundle_of(folder, words) as (bundle, made):
        done = lorazip("verify", bundle, "--against", folder, "--device", "cpu", "--json", "-q")
        report = json.loads(done.stdout)
        if not report["ok"]:
            raise SystemExit(f"{words}: the bundle does not verify: {report['findings']}")
        return point_of(bundle, words, f"lorazip {made['method']}", report["summary"])


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
    if reused is not None:
        points += reused
    left_out = []
    for words in options.jd:
        if (clusters := _clusters(words)) > len(adapters):
            left_out.append(f"{_setting(words)}: {clusters} clusters of {len(adapters)} adapters")
            continue
        print(f"{name}: {words}", file=sys.stderr)
        with bundle_of(folder, words) as (bundle, made):
            points.append(point_of(bundle, words, JD_NAMES[made["method"]], made["summary"]))
            points += coded_bases.points(bundle, collection, _setting(words))
    sizes = sorted({2, *SIZES, *COLUMNS, 160, 200})
    each = [spectra.bound(smaller) for smaller in sizes]
    found = Found(
        name,
        adapters,
        stored,
        fixed,
        points,
        [(stored // x + fixed, spectra.bound_of_the_mean(8 * stored / x)) for x in sizes],
        [(stored // x + fixed, float(e.mean()), float(e.max())) for x, e in zip(sizes, each, strict=True)],
    )
    for words in options.ours:
        print(f"{name}: {words}", file=sys.stderr)
        found.ours.append(ours(folder, words))
    found.left_out = left_out
    found.bound_of_ours = [spectra.bound_of_the_mean(8 * max(0, point.bytes - fixed)) for point in found.ours]
    return found


def _clusters(words: str) -> int:
    parts = shlex.split(words)
    return int(parts[parts.index("--clusters") + 1]) if "--clusters" in parts else 1


def _reused(files: Sequence[Path], name: str, adapters: list[str]) -> list[Point]:
    every = [each for file in files for each in shown(file) if each.name == name and each.adapters == adapters]
    if not every:
        raise SystemExit(f"no collection {name} with these {len(adapters)} adapters in {', '.join(map(str, files))}")
    return [point for found in every for point in found.points]


def shown(file: Path) -> list[Found]:
    """What `--json` wrote."""
    every = json.loads(file.read_text())["collections"]
    return [
        Found(**each | {kind: [Point(**point) for point in each[kind]] for kind in ("points", "ours")})
        for each in every
    ]


def details(found: Found) -> Iterator[str]:
    """Every setting that no other one of the same competitor beats in bytes and error."""
    yield f"**{found.name}**: {len(found.adapters)} adapters, {found.stored / 1e6:.2f} MB of factors in bf16, and"
    yield f"{found.fixed / 1e3:.1f} kB that any bundle keeps besides"
    for words in found.left_out:
        yield f"; cannot be had: {words}"
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
        if round(smaller) not in COLUMNS:
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
    for name, points in (_grouped(found.ours) | found.competitors()).items():
        yield f"| {name} | {' | '.join(_error(error_at(points, limit)) for limit in limits)} |"
    bound = [Point(BOUND, "", number, mean, mean) for number, mean in found.bound]
    yield f"| {BOUND}, any split | {' | '.join(_error(error_at(bound, limit)) for limit in limits)} |"


def summary(found: Found) -> Iterator[str]:
    """Ours beside the best of every family at no more bytes, by size, and what Shannon's bound leaves to be had."""
    yield (
        f"| {found.name}, × | ours | best published or released | its | ours / its | {BOUND}'s / its"
        f" | SVD, int4 | ours / its | best coded bases | its | ours / its | ours / {BOUND}'s |"
    )
    yield f"|{'---|' * 12}"
    bound = [Point(BOUND, "", number, mean, mean) for number, mean in found.bound]
    for smaller in COLUMNS:
        limit = found.stored / smaller
        own, least = error_at(found.ours, limit), error_at(bound, limit)
        cells = [f"{smaller}×", _error(own)]
        for of in AIMS:
            name, error = strongest(found, limit, of=of) or ("none", None)
            cells += [*([name] if of != "SVD, int4" else []), _error(error), _ratio(own, error)]
            cells += [_ratio(least, error)] if of == "published" else []
        yield f"| {' | '.join([*cells, _ratio(own, least)])} |"


class Worst(NamedTuple):
    """Where a competitor comes nearest to ours, or passes it."""

    ratio: float
    smaller: float
    setting: str


def nearest(found: Found, points: Sequence[Point]) -> Worst | None:
    """Of the settings within `COLUMNS`, the one of whose error ours, at just its bytes, has the largest share.

    None without such a setting, or where ours has no bundle as small.
    """
    worst: Worst | None = None
    for point in best(points):
        smaller = found.stored / point.bytes
        own = error_at(found.ours, point.bytes)
        if not COLUMNS[0] <= smaller <= COLUMNS[-1] or own is None:
            continue
        if worst is None or own / max(point.mean, 1e-12) > worst.ratio:
            worst = Worst(own / max(point.mean, 1e-12), smaller, point.setting)
    return worst


def verdicts(every: Sequence[Found]) -> Iterator[str]:
    """For every competitor the largest share of its error that ours has, and whether that will do."""
    yield f"| ours / its, at most | aim | {' | '.join(found.name for found in every)} |"
    yield f"|{'---|' * (2 + len(every))}"
    names = list(dict.fromkeys(name for found in every for name in found.competitors()))
    for name in sorted(names, key=lambda name: list(AIMS).index(family(name))):
        aim = AIMS[family(name)]
        cells = []
        for found in every:
            points = found.competitors().get(name, [])
            if not points:
                cells.append("not measured")
            elif worst := nearest(found, points):
                missed = " **missed**" if worst.ratio > aim else ""
                cells.append(f"{worst.ratio:.2f} at {worst.smaller:.0f}× ({worst.setting}){missed}")
            else:
                sizes = [found.stored / point.bytes for point in points]
                cells.append(f"no setting: {min(sizes):.1f}× to {max(sizes):.1f}×")
        yield f"| {name} | {aim:g} | {' | '.join(cells)} |"


def _ratio(ours: float | None, other: float | None) -> str:
    return "–" if ours is None or not other else f"{ours / other:.2f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def picture(every: Sequence[Found]) -> str:
    panels = []
    for found in every:

        def line(points: Sequence[tuple[int, float]], stored: int = found.stored) -> list[tuple[float, float]]:
            return [(stored / number, error) for number, error in sorted(points)]

        lines = [Line(BOUND, line(found.bound), bound=True)]
        drawn: dict[str, list[Point]] = {}
        for name, points in found.competitors().items():
            if not name.endswith(NOT_DRAWN):
                drawn.setdefault(_drawn_as(name), []).extend(points)
        for name, points in drawn.items():
            lines.append(Line(name, line([(point.bytes, point.mean) for point in best(points)])))
        for name, points in _grouped(found.ours).items():
            lines.append(Line(name, line([(point.bytes, point.mean) for point in points]), strong=True))
        panels.append(Panel(f"{found.name}, {len(found.adapters)} adapters", lines))
    return svg(panels, "times smaller, all bytes on disk", "mean squared error", X_RANGE, Y_LEAST)


def _drawn_as(name: str) -> str:
    """One line for all ways to round the bases of a method."""
    return f"{name.partition(',')[0]}, coded bases and cores" if family(name) == "coded bases" else name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", nargs="*", type=Path, metavar="DIR", help="a collection of adapters")
    parser.add_argument(
        "--ours",
        action="append",
        metavar="OPTIONS",
        help="of `lorazip compress`, instead of fifteen mean errors; '': none",
    )
    parser.add_argument(
        "--jd",
        action="append",
        metavar="OPTIONS",
        help="instead of sixteen of joint and diag, or besides those of --reuse; '': none",
    )
    parser.add_argument("--first", type=int, metavar="N", help="only so many adapters of each, by name")
    parser.add_argument("--reuse", type=Path, nargs="+", metavar="FILE", help="competitors from what --json wrote")
    parser.add_argument("--show", type=Path, nargs="+", metavar="FILE", help="only print and draw what --json wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw them here")
    options = parser.parse_args(argv)
    if bool(options.dirs) == bool(options.show):
        parser.error("either DIR or --show")
    options.ours = [words for words in (OURS if options.ours is None else options.ours) if words]
    if options.jd is None:
        options.jd = () if options.reuse else JD
    options.jd = [words for words in options.jd if words]
    every = [found for file in options.show or [] for found in shown(file)]
    for folder in options.dirs:
        with first(require(folder), options.first) as there:
            every.append(survey(there, folder.resolve().name, options))
    for table in (details, overview, summary):
        for found in every:
            print("\n".join(table(found)), end="\n\n")
    print("\n".join(verdicts(every)))
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
