"""Large collections on a small machine without a GPU: memory beside lorashare's, and ten thousand tiny adapters.

    python tests/benchmarks/scale_cpu.py memory DIR [--peers-python PYTHON] [--json FILE]
    python tests/benchmarks/scale_cpu.py many [--hard-links 1000,3000,10000] [--json FILE]

`memory`: peak memory of `lorazip compress` on a collection (`scale.py make DIR --adapters 200 --shape cpu --groups 5`),
less what a process has that only imports PyTorch, beside lorashare on the same files, in each of its three ways to
compress.

`many`: compress of so many adapters that are hard links to 100 tiny ones (3 modules, d = 64, rank 4), in folders within
folders; time, memory, open files and the bytes of the manifest, each of which should grow in proportion at most.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import rounds
from compressing import PEAKS, Settings, compress, head, megabytes, peaks, remove, row
from process import Finished, run
from readers import files_of, warm
from scale import numbers

ORIGINALS = 100
LORASHARE = {
    "as it is": (),
    "--layer-by-layer": ("--layer-by-layer",),
    "--chunk-size 10": ("--chunk-size", 10),
}


@dataclass(frozen=True)
class Row:
    """A tool on the collection; ``idle`` is what its interpreter has that only imports PyTorch."""

    name: str
    done: Finished
    idle: int
    bytes: int

    @property
    def above(self) -> int:
        """Peak anonymous memory above ``idle``."""
        return _anonymous(self.done) - self.idle

    def figures(self) -> dict[str, object]:
        watched = self.done.watched and self.done.watched._asdict()
        known = {"name": self.name, "exit_code": self.done.exit_code, "seconds": self.done.seconds}
        return {**known, "idle": self.idle, "above": self.above, "watched": watched, "bytes": self.bytes}


def memory(options: argparse.Namespace) -> int:
    folder = options.directory.resolve()
    size = warm(folder)
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        rows = [_ours(folder, Path(place) / "bundle", options)]
        if options.peers_python is not None:
            rows += _theirs(folder, Path(place) / "lorashare", options)
    print(
        f"{len(files_of(folder))} adapters, {size / 1e9:.2f} GB; import torch: {megabytes(rows[0].idle)} MB", end="\n\n"
    )
    print("\n".join(head("", "exit", "s", "above import torch, MB", *PEAKS, "MB written")))
    for one in rows:
        figures = f"{one.done.seconds:.1f}", megabytes(one.above), *peaks([one.done.watched]), megabytes(one.bytes)
        print(row(one.name, one.done.exit_code, *figures))
    _write(options.json, {"bytes": size, "rows": [one.figures() for one in rows]})
    if options.at_most is None:
        return 0
    holds = rows[0].above <= options.at_most
    print("", f"{'PASS' if holds else 'FAIL'} {megabytes(rows[0].above)} of {megabytes(options.at_most)} MB", sep="\n")
    return 0 if holds else 1


def _ours(folder: Path, bundle: Path, options: argparse.Namespace) -> Row:
    more = () if options.memory is None else ("--memory", options.memory)
    settings = Settings(options.clusters, options.rank, "cpu", more)
    ours = compress(folder, bundle, settings, adapters=len(files_of(folder)))
    name = f"lorazip, {options.clusters} clusters, R = {options.rank}"
    done = Finished(ours.seconds, 0, "", ours.watched)
    return Row(name, done, _idle(sys.executable), ours.bytes_bundle or 0)


def _theirs(folder: Path, out: Path, options: argparse.Namespace) -> Iterator[Row]:
    python = Path(os.path.abspath(options.peers_python))  # not resolved: a link into the environment is what counts
    adapters = [path.parent for path in files_of(folder)]
    idle = _idle(python)
    for name, words in LORASHARE.items():
        asked = ["-o", out, "-k", options.components, "--device", "cpu", *words]
        command = [python.parent / "lorashare", "compress", *adapters, *asked]
        done = run(command, environment={"HF_HUB_OFFLINE": "1"}, watch=True, check=False)
        kept = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        yield Row(f"lorashare, k = {options.components}, {name}", done, idle, kept)
        remove(out)


def _idle(python: object) -> int:
    return _anonymous(run([python, "-c", "import torch"], watch=True))


def _anonymous(of: Finished) -> int:
    """Peak anonymous memory; of a process that is too short to be seen, or where /proc is not there, all it had."""
    return of.peak_bytes if of.watched is None else of.watched.anonymous


def many(options: argparse.Namespace) -> int:
    import torch
    from grouped_collection import recipe, write

    with tempfile.TemporaryDirectory(dir=options.work) as place:
        originals = Path(place) / "originals"
        for _ in write(originals, recipe("tiny", groups=options.clusters), ORIGINALS, torch.device("cpu")):
            pass
        settings = Settings(options.clusters, options.rank, "cpu")
        found = rounds.scaling(originals, Path(place), settings, options.hard_links, options.rounds)
    print(rounds.scaling_table(found))
    _write(options.json, {"rows": [one.figures() for runs in found for one in runs]})
    return 0


def _write(path: Path | None, report: dict[str, object]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="memory|many")

    verb = verbs.add_parser("memory", help="peak memory, beside lorashare")
    verb.add_argument("directory", type=Path, metavar="DIR")
    verb.add_argument("--clusters", type=int, default=5)
    verb.add_argument("--rank", type=int, default=16)
    verb.add_argument("--memory", help="passed on to compress")
    verb.add_argument(
        "--peers-python", type=Path, help="an interpreter with lorashare; without it there is no such row"
    )
    verb.add_argument("--components", type=int, default=16, metavar="K", help="of lorashare")
    verb.add_argument("--at-most", type=int, metavar="BYTES", help="exit 1 if lorazip has more above PyTorch's own")
    verb.set_defaults(do=memory)

    verb = verbs.add_parser("many", help="thousands of tiny adapters")
    verb.add_argument("--hard-links", type=numbers, default=[1000, 3000, 10_000], metavar="N,N,…")
    verb.add_argument("--clusters", type=int, default=10)
    verb.add_argument("--rank", type=int, default=4)
    verb.add_argument("--rounds", type=int, default=1)
    verb.set_defaults(do=many)

    for verb in verbs.choices.values():
        verb.add_argument("--json", type=Path, help="write all figures here, too")
        verb.add_argument("--work", type=Path, help="where files go for a while; default: the system's place")
    options = parser.parse_args(argv)
    code: int = options.do(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
