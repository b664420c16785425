"""Compressing a large collection beside reading it: rounds of both in turn, and what else a large run has to stand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from compressing import PEAKS, Compressed, Settings, compress, digest, gpu, head, linked, megabytes, peaks, remove, row
from process import LORAZIP, Finished, run
from readers import BASELINE, Reading, files_of, measure, warm


@dataclass
class Rounds:
    """Readings and runs of every round, in order, and `verify --against` of the first bundle."""

    bytes: int
    readings: list[Reading] = field(default_factory=list)
    runs: list[Compressed] = field(default_factory=list)
    verify: Finished | None = None
    digests: list[str] = field(default_factory=list)

    def ratios(self) -> dict[str, list[float]]:
        """Compressing over reading, round by round: both with all start-up; the reading without; neither with."""
        pairs = list(zip(self.runs, self.readings, strict=True))
        return {
            "both with start-up": [one.seconds / read.process_seconds for one, read in pairs],
            "reading without start-up": [one.seconds / read.seconds for one, read in pairs],
            "neither with start-up": [one.own_seconds / read.seconds for one, read in pairs if one.own_seconds],
        }

    def figures(self) -> dict[str, object]:
        """All of it for a JSON file."""
        verify = self.verify
        return {
            "bytes": self.bytes,
            "readings": [one.figures() for one in self.readings],
            "runs": [one.figures() for one in self.runs],
            "ratios": self.ratios(),
            "same_bytes_every_round": len(set(self.digests)) < 2,
            "verify": verify and {"seconds": verify.seconds, "watched": verify.watched and verify.watched._asdict()},
        }


def rounds(folder: Path, work: Path, settings: Settings, count: int, *, verify: bool) -> Rounds:
    """``count`` rounds: warm the page cache, read in a fresh process, compress; `verify --against` in the first.

    The bundle of the first round stays at ``work/bundle``.
    """
    found = Rounds(sum(path.stat().st_size for path in files_of(folder)))
    for number in range(count):
        bundle = work / ("bundle" if number == 0 else "again")
        warm(folder)
        found.readings.append(measure(folder, *BASELINE, _device(settings)))
        found.runs.append(compress(folder, bundle, settings, adapters=found.readings[-1].adapters))
        found.digests.append(digest(bundle))
        say(f"round {number + 1}: reading {found.readings[-1].process_seconds:.2f} s, compress", found.runs[-1])
        if number == 0 and verify:
            found.verify = run([*LORAZIP, "verify", bundle, "--against", folder, "-q"], watch=True)
            say(f"verify: {found.verify.seconds:.2f} s")
        elif number > 0:
            remove(bundle)
    return found


def _device(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    import torch  # late: it stays out of --help

    return "cuda" if torch.cuda.is_available() else "cpu"


def table(of: Rounds) -> str:
    """What was read and compressed, and the ratios, as Markdown."""
    read, runs = of.readings, of.runs
    lines = head("", "s, median", "least, most", "GB/s", *PEAKS, "GPU, MB")
    watched = peaks(one.watched for one in read)
    lines += [
        _line("read, with start-up", [one.process_seconds for one in read], of.bytes, watched),
        _line("read, without", [one.seconds for one in read], of.bytes),
        _line("compress", [one.seconds for one in runs], of.bytes, peaks(one.watched for one in runs), gpu(runs)),
    ]
    if own := [one.own_seconds for one in runs if one.own_seconds is not None]:
        lines.append(_line("compress, by its own clock", own, of.bytes))
    if of.verify is not None:
        lines.append(_line("verify --against", [of.verify.seconds], of.bytes, peaks([of.verify.watched])))
    lines += ["", *head("compress / read", "median", "round by round")]
    for name, ratios in of.ratios().items():
        if ratios:
            lines.append(row(name, f"{median(ratios):.2f}", " ".join(f"{ratio:.2f}" for ratio in ratios)))
    last = of.runs[-1]
    lines += [
        "",
        f"{last.adapters:,} adapters, {of.bytes / 1e9:.2f} GB to {megabytes(last.bytes_bundle)} MB; squared error: mean"
        f" {last.mean_squared_error:.4f}, worst {last.max_squared_error:.4f};"
        f" {'the same bytes' if len(set(of.digests)) < 2 else 'DIFFERENT BYTES'} in every round",
    ]
    return "\n".join(lines)


def _line(name: str, seconds: Sequence[float], size: int, seen: Sequence[str] = ("-",) * 3, on_gpu: str = "-") -> str:
    speed = size / 1e9 / median(seconds)
    return row(name, f"{median(seconds):.2f}", _range(seconds), f"{speed:.2f}", *seen, on_gpu)


def _range(seconds: Sequence[float]) -> str:
    return f"{min(seconds):.2f}, {max(seconds):.2f}"


def scaling(folder: Path, work: Path, settings: Settings, counts: Sequence[int], repeat: int) -> list[list[Compressed]]:
    """Compress the first n adapters for every n, ``repeat`` times in turn; more than there are come round again."""
    subsets = {n: linked(folder, work / f"first-{n}", n) for n in counts}
    warm(folder)
    found: dict[int, list[Compressed]] = {n: [] for n in counts}
    for _ in range(repeat):
        for n, subset in subsets.items():
            bundle = work / "subset-bundle"
            found[n].append(compress(subset, bundle, settings, adapters=n))
            remove(bundle)
            say(f"{n:,} adapters:", found[n][-1])
    for subset in subsets.values():
        remove(subset)
    return list(found.values())


def scaling_table(of: Sequence[Sequence[Compressed]]) -> str:
    """A line for each n; × time is against the smallest n, and the last line the least-squares fit a + b n."""
    names = (
        "s, median",
        "least, most",
        "× adapters",
        "× time",
        *PEAKS,
        "GPU, MB",
        "manifest, kB",
        "its bytes an adapter",
    )
    lines = head("adapters", *names)
    first = of[0]
    for runs in of:
        n, seconds = runs[0].adapters, [one.seconds for one in runs]
        size = runs[0].bytes_manifest or 0
        longer = median(seconds) / median([one.seconds for one in first])
        lines.append(
            row(
                f"{n:,}",
                f"{median(seconds):.2f}",
                _range(seconds),
                f"{n / first[0].adapters:.2f}",
                f"{longer:.2f}",
                *peaks(one.watched for one in runs),
                gpu(runs),
                f"{size / 1e3:,.0f}",
                f"{size / n:,.0f}",
            )
        )
    if len(of) > 1:
        fixed, each = line_through([(runs[0].adapters, median([one.seconds for one in runs])) for runs in of])
        lines += ["", f"time ≈ {fixed:.2f} s + {1e3 * each:.3f} ms for each adapter (least squares)"]
    return "\n".join(lines)


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares y ≈ a + b x: (a, b)."""
    n = len(points)
    mean_x, mean_y = (sum(point[axis] for point in points) / n for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_y - slope * mean_x, slope


@dataclass(frozen=True)
class Trial:
    """A run under other conditions; ``same`` says whether its bundle has the bytes of the first one."""

    name: str
    run: Compressed
    same: bool | None
    killed: bool = False

    @property
    def holds(self) -> bool:
        """Whether it ended well, with the same bytes, unless it was to be killed."""
        return self.killed or self.same is True

    def figures(self) -> dict[str, object]:
        return {"name": self.name, "same_bytes": self.same, **self.run.figures()}


def trial(name: str, folder: Path, work: Path, settings: Settings, adapters: int, **conditions: object) -> Trial:
    """Compress under ``conditions`` (of `compress`) and compare with ``work/bundle``; the bundle is thrown away."""
    bundle = work / "trial"
    done = compress(folder, bundle, settings, adapters=adapters, check=False, **conditions)  # type: ignore[arg-type]
    same = digest(bundle) == digest(work / "bundle") if done.exit_code == 0 else None
    remove(bundle)
    say(f"{name}:", done)
    return Trial(name, done, same)


def resumed(folder: Path, work: Path, settings: Settings, adapters: int, after: float) -> list[Trial]:
    """Kill a run after so many seconds, and run again: what was done before is there, and the bytes are the same."""
    bundle = work / "trial"
    name = f"killed after {after:.1f} s"
    killed = compress(folder, bundle, settings, adapters=adapters, check=False, kill_after=after)
    say(f"{name}:", killed)
    if killed.exit_code == 0:
        remove(bundle)
        return [Trial(f"{name}, but it had ended", killed, None, killed=True)]
    return [Trial(name, killed, None, killed=True), trial("then again", folder, work, settings, adapters)]


def trials_table(of: Sequence[Trial]) -> str:
    """A line for each trial, as Markdown."""
    lines = head("", "exit", "s", *PEAKS, "GPU, MB", "same bytes", "")
    for one in of:
        same = {True: "yes", False: "NO", None: "-"}[one.same]
        cells = one.name, one.run.exit_code, f"{one.run.seconds:.2f}", *peaks([one.run.watched]), gpu([one.run]), same
        lines.append(row(*cells, one.run.message))
    return "\n".join(lines)


def say(text: str, run: Compressed | None = None) -> None:
    """A line of progress on stderr."""
    more = "" if run is None else f" {run.seconds:.2f} s" + (f", exit {run.exit_code}" if run.exit_code else "")
    print(text + more, file=sys.stderr, flush=True)
