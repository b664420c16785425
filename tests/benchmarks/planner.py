"""Is what `compress --dry-run` predicts what comes out, and what does planning cost?

    python tests/benchmarks/planner.py DIR… [--each 7] [--seed 0] [--json FILE]

For every collection DIR, seven bounds at random, of all four kinds in turn: `--budget`, `--budget-per-adapter`,
`--max-mean-error`, `--max-error`. Budgets are 5 to 100 times smaller than the factors in bf16, uniformly in the
logarithm; errors are those of Shannon's bound at such sizes (`spectra.py`). For each the chosen point of the frontier
that `plan` returns, before anything is encoded, is held against the files of the bundle and against the errors that
`verify --against` measures. A run may try again when the first plan misses the bound, so what comes out is nearer to
it than what was predicted; that difference counts as a deviation.

Planning is finding singular values while adapters are read, by the difference to reading them without, and finding the
step from them: medians of three, as a share of the processor's time for the whole run. With `--max-error` there is
none, since every adapter has its own step. Exits 1 if any bound does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import torch
from competitors import measure
from other_tools import size
from real_adapters import require

from lorazip_core.adapter.collection import open_collection
from lorazip_core.base.device import CPU
from lorazip_core.base.progress import Advance, Silent
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.planning.plan import plan
from lorazip_core.planning.spectra import Spectra, planned_step
from lorazip_core.reading.scan import scan
from lorazip_core.verify.run import verify

Bound = Literal["budget", "budget_per_adapter", "max_mean_error", "max_error"]
BOUNDS: tuple[Bound, ...] = ("budget", "budget_per_adapter", "max_mean_error", "max_error")
SMALLER = 5.0, 100.0
NEAR = 0.05
ENCODING = "keeping adapters individually"  # the stage that each attempt has


class Stages(Silent):
    """Counts how often a run has each stage."""

    def __init__(self, times: Counter[str]) -> None:
        self.times = times

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        self.times[label] += 1
        with super().stage(label, total) as advance:
            yield advance


class Outcome(NamedTuple):
    """Bytes of a bundle and its squared errors."""

    bytes: int
    mean: float
    worst: float


class Row(NamedTuple):
    collection: str
    adapters: int
    bound: Bound
    value: float
    predicted: Outcome
    found: Outcome
    attempts: int
    planning: float
    """Seconds of the processor."""
    seconds: float
    """The same of the whole run."""

    @property
    def used(self) -> float:
        """The share of what is allowed that was used."""
        of_bound = {
            "budget": self.found.bytes,
            "budget_per_adapter": self.found.bytes / self.adapters,
            "max_mean_error": self.found.mean,
            "max_error": self.found.worst,
        }
        return of_bound[self.bound] / self.value

    @property
    def deviations(self) -> Outcome:
        """What was found over what was predicted, less 1."""
        pairs = zip(self.found, self.predicted, strict=True)
        return Outcome(*(found / predicted - 1 if predicted else math.inf for found, predicted in pairs))  # type: ignore[arg-type]


def draw(folder: Path, count: int, seed: int) -> list[tuple[Bound, float]]:
    """Bounds for a collection; all budgets are in bytes of the bundle, or on average by the adapter."""
    collection = open_collection(folder)
    stored, _, spectra, _ = measure(collection, competing=False)
    generator = random.Random(f"{seed} {folder.name}")
    found: list[tuple[Bound, float]] = []
    for number in range(count):
        bound = BOUNDS[number % len(BOUNDS)]
        smaller = math.exp(generator.uniform(*map(math.log, SMALLER)))
        if bound == "budget":
            value: float = int(stored / smaller)
        elif bound == "budget_per_adapter":
            value = int(stored / smaller / len(collection.adapters))
        else:
            value = float(f"{spectra.bound_of_the_mean(8 * stored / smaller):.2g}")
        found.append((bound, value))
    return found


def planning_seconds(folder: Path, options: CompressOptions) -> float:
    """What planning takes of the processor in a run with these options."""
    if not options.planned:
        return 0.0
    collection = open_collection(folder)
    more, found = [], []
    for _ in range(3):
        begun = time.process_time()
        scan(collection, skip_bad=False, advance=lambda done: None)
        without = time.process_time()
        scanned = scan(collection, skip_bad=False, advance=lambda done: None, singular=True)
        read = time.process_time()
        planned_step(Spectra.of(scanned, CPU, Silent()), scanned, options)
        more.append((read - without) - (without - begun))
        found.append(time.process_time() - read)
    return max(0.0, median(more)) + median(found)


def tried(folder: Path, bound: Bound, value: float) -> Row:
    """Plan, compress and verify with one bound."""
    options = CompressOptions(**{bound: value}, device="cpu")  # type: ignore[arg-type]
    chosen = next(point for point in plan(folder, options).frontier if point.chosen)
    predicted = Outcome(chosen.bytes_bundle, chosen.mean_squared_error, chosen.max_squared_error)
    stages: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        bundle = Path(place) / "bundle"
        begun = time.process_time()
        report = compress(folder, bundle, options, progress=Stages(stages))
        seconds = time.process_time() - begun
        errors = verify(bundle, against=folder).summary
        if errors is None or errors.mean_squared_error is None or errors.max_squared_error is None:
            raise SystemExit(f"{bound} {value:g}: the bundle does not verify")
        found = Outcome(size(bundle), errors.mean_squared_error, errors.max_squared_error)
    planning = planning_seconds(folder, options)
    name, adapters, attempts = folder.resolve().name, report.summary.adapters, stages[ENCODING]
    return Row(name, adapters, bound, value, predicted, found, attempts, planning, seconds)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each bound, and by how much predictions were off."""
    yield (
        "| | bound | | predicted: bytes | mean | worst | came out: bytes | mean | worst | off: bytes | mean | worst"
        " | used | attempts | planning |"
    )
    yield f"|{'---|' * 15}"
    for row in rows:
        value = f"{row.value:,.0f}" if row.bound.startswith("budget") else f"{row.value:g}"
        cells = [row.collection, f"--{row.bound.replace('_', '-')}", value]
        for outcome in (row.predicted, row.found):
            cells += [f"{outcome.bytes:,.0f}", f"{outcome.mean:.4f}", f"{outcome.worst:.4f}"]
        cells += [f"{100 * off:+.1f}%" for off in row.deviations]
        planning = f"{row.planning:.1f} s, {100 * row.planning / row.seconds:.0f}%" if row.planning else "none"
        yield f"| {' | '.join([*cells, f'{100 * row.used:.1f}%', str(row.attempts), planning])} |"


def summary(rows: Sequence[Row]) -> Iterator[str]:
    for kind in Outcome._fields:
        off = [abs(getattr(row.deviations, kind)) for row in rows]
        near = sum(each <= NEAR for each in off)
        yield f"{kind}: at most {100 * max(off):.1f}% off, {near} of {len(rows)} within {100 * NEAR:.0f}%"
    planned = [row.planning / row.seconds for row in rows if row.planning]
    if planned:
        yield f"planning: {100 * min(planned):.0f}% to {100 * max(planned):.0f}% of a run"
    above = sum(row.used > 1 for row in rows)
    yield f"{above} of {len(rows)} bounds are not held" if above else f"all {len(rows)} bounds are held"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="a collection of adapters")
    parser.add_argument("--each", type=int, default=7, metavar="N", help="bounds for every collection")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here, too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for folder in map(require, options.dirs):
        for bound, value in draw(folder, options.each, options.seed):
            print(f"{folder.name}: {bound} {value:g}", file=sys.stderr)
            rows.append(tried(folder, bound, value))
    print("\n".join([*table(rows), "", *summary(rows)]))
    if options.json:
        figures = [row._asdict() | {k: getattr(row, k)._asdict() for k in ("predicted", "found")} for row in rows]
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(row.used > 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
