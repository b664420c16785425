"""Large collections: make one, read it, compress it beside reading it, and the least time that it could take.

    python tests/benchmarks/scale.py make OUT --adapters 1000 --shape mistral-7b
    python tests/benchmarks/scale.py read DIR --device cuda
    python tests/benchmarks/scale.py run DIR --device cuda --rounds 5 --scaling 125,250,500,1000 --json scale.json
    python tests/benchmarks/scale.py floor --adapters 1000 --shape mistral-7b --measured 3.2

The product is driven through its command line only, each run a process of its own; seconds are of whole processes, with
all start-up, unless a row says otherwise. docs/benchmarks.md says how to read what is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import floor as floor_
import readers
import rounds
from compressing import Settings

if TYPE_CHECKING:
    from grouped_collection import Recipe

SHAPES = ("mistral-7b", "cpu", "tiny")


def _recipe(options: argparse.Namespace) -> Recipe:
    from grouped_collection import recipe  # late: PyTorch stays out of --help

    return recipe(
        options.shape,
        rank=options.rank,
        letters=options.modules.split(","),
        layers=options.layers,
        d_model=options.d_model,
        groups=options.groups,
        seed=options.seed,
    )


def make(options: argparse.Namespace) -> int:
    import torch
    from grouped_collection import write

    of = _recipe(options)
    need, room = of.bytes_per_adapter * options.adapters, shutil.disk_usage(options.out.absolute().parent).free
    if need > room:
        raise SystemExit(f"{options.out}: {need / 1e9:.1f} GB are needed, {room / 1e9:.1f} GB are free")
    if options.out.exists() and any(options.out.iterdir()):
        raise SystemExit(f"{options.out} is not empty")
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    size = sum(write(options.out, of, options.adapters, torch.device(name)))
    seconds = time.monotonic() - started
    print(
        f"{options.adapters:,} adapters of {len(of.modules)} modules at rank {of.rank}, {size / 1e9:.2f} GB, in"
        f" {seconds:.1f} s on {name}: {size / 1e9 / seconds:.2f} GB/s"
    )
    return 0


def read(options: argparse.Namespace) -> int:
    folder = _collection(options.directory)
    ways = [readers.BASELINE] if options.baseline_only else [readers.BASELINE, *readers.OTHERS]
    found = []
    for _ in range(options.rounds):
        for way in ways:
            readers.warm(folder)
            found.append(readers.measure(folder, *way, options.device))
            rounds.say(f"{found[-1].name}: {found[-1].seconds:.2f} s")
    print(_machine(), end="\n\n")
    print(f"{found[0].adapters:,} files, {found[0].bytes / 1e9:.3f} GB", end="\n\n")
    print(readers.table(sorted(found, key=lambda one: ways.index((one.how, one.threads)))))
    _write(options.json, {"machine": _machine(), "readings": [one.figures() for one in found]})
    return 0


def run(options: argparse.Namespace) -> int:
    folder = _collection(options.directory)
    more = [
        word
        for name in ("memory", "device_memory")
        if (value := getattr(options, name)) is not None
        for word in (f"--{name.replace('_', '-')}", value)
    ]
    settings = Settings(options.clusters, options.rank, options.device, (*more, *options.more))
    report: dict[str, object] = {"machine": _machine(), "settings": settings.words(Path("DIR"), Path("BUNDLE"))}
    # Beside the collection: hard links need the same file system.
    with tempfile.TemporaryDirectory(dir=options.work or folder.parent, prefix="scale-") as place:
        work = Path(place)
        found = rounds.rounds(folder, work, settings, options.rounds, verify=not options.no_verify)
        report |= found.figures()
        print(_machine(), end="\n\n")
        print(rounds.table(found))
        adapters, usual = found.runs[0].adapters, median([one.seconds for one in found.runs])
        trials: list[rounds.Trial] = []
        for limit in options.hard_limit:
            name = f"with at most {limit / 1e9:g} GB of private memory"
            trials.append(rounds.trial(name, folder, work, settings, adapters, data_limit=limit))
        for share in options.kill_at:
            trials += rounds.resumed(folder, work, settings, adapters, share * usual)
        if trials:
            print("", rounds.trials_table(trials), sep="\n")
            report["trials"] = [one.figures() for one in trials]
        if options.scaling:
            rows = rounds.scaling(folder, work, settings, options.scaling, options.rounds)
            print("", rounds.scaling_table(rows), sep="\n")
            report["scaling"] = [one.figures() for runs in rows for one in runs]
    holds = all(one.holds for one in trials) and len(set(found.digests)) < 2
    if options.at_most is not None:
        ratio = median(found.ratios()["both with start-up"])
        fast = ratio <= options.at_most
        holds &= fast
        print(
            "",
            f"{'PASS' if fast else 'FAIL'} compress takes {ratio:.2f} times as long as reading"
            f" (at most {options.at_most:g})",
            sep="\n",
        )
    _write(options.json, report)
    return 0 if holds else 1


def floor(options: argparse.Namespace) -> int:
    of = _recipe(options)
    shapes = [(module.d_out, module.d_in) for module in of.modules]
    device = floor_.Device(options.bandwidth * 1e12, options.f32 * 1e12, options.f64 * 1e12)
    once = [floor_.Pass(options.bundle_rank)]
    for name, passes in (("one pass", once), (" ".join(options.passes), list(map(floor_.parse_pass, options.passes)))):
        if passes:
            least = floor_.floor(options.adapters, shapes, of.rank, options.clusters, passes, device)
            print(f"{name}: {floor_.table(options.adapters, shapes, least, options.measured)}")
    return 0


def _collection(folder: Path) -> Path:
    if not folder.is_dir():
        raise SystemExit(f"no collection at {folder}")
    return folder.resolve()


def _machine() -> str:
    """The processor count, and the GPUs as nvidia-smi names them."""
    gpus = ""
    if shutil.which("nvidia-smi"):
        import subprocess

        words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpus = "; ".join(subprocess.run(words, capture_output=True, text=True).stdout.split("\n")).strip("; ")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, Python {platform.python_version()}" + (f", {gpus}" if gpus else "")


def _write(path: Path | None, report: dict[str, object]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1, default=str) + "\n")


def numbers(text: str) -> list[int]:
    """``125,250`` as numbers."""
    return list(map(int, text.split(",")))


def _add_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapters", type=int, required=True, metavar="N")
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--rank", type=int, help="of the adapters; default: 16, tiny 4")
    parser.add_argument("--modules", default="q,k,v", metavar="q,k,v,o")
    parser.add_argument("--layers", type=int, help="default: 32, tiny 1")
    parser.add_argument("--d-model", type=int, help="default: 4096, cpu 2048, tiny 64")
    parser.add_argument("--groups", type=int, default=25, help="adapter i is of group i mod GROUPS")
    parser.add_argument("--seed", type=int, default=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="make|read|run|floor")

    verb = verbs.add_parser("make", help="write a synthetic collection")
    verb.add_argument("out", type=Path, metavar="OUT")
    _add_shape(verb)
    verb.add_argument("--device", default="auto", help="where numbers are drawn; a GPU and a CPU draw different ones")
    verb.set_defaults(do=make)

    verb = verbs.add_parser("read", help="read a collection in several ways, each in a fresh process")
    verb.add_argument("directory", type=Path, metavar="DIR")
    verb.add_argument("--device", default="cpu")
    verb.add_argument("--rounds", type=int, default=1)
    verb.add_argument("--baseline-only", action="store_true")
    verb.add_argument("--json", type=Path, help="write all figures here, too")
    verb.set_defaults(do=read)

    verb = verbs.add_parser("run", help="rounds of reading and compressing, and the other runs that are asked for")
    verb.add_argument("directory", type=Path, metavar="DIR")
    verb.add_argument("--clusters", type=int, default=25, help="0 for none: each adapter on its own")
    verb.add_argument("--rank", type=int, default=16, help="of the bases")
    verb.add_argument("--device", default="auto")
    verb.add_argument("--memory", help="passed on to compress")
    verb.add_argument("--device-memory", help="passed on to compress")
    verb.add_argument("--more", type=shlex.split, default=[], metavar="'WORD …'", help="further options of compress")
    verb.add_argument("--rounds", type=int, default=3)
    verb.add_argument("--no-verify", action="store_true")
    verb.add_argument("--at-most", type=float, metavar="RATIO", help="exit 1 if compress takes longer by this factor")
    verb.add_argument("--scaling", type=numbers, metavar="N,N,…", help="compress the first N, too")
    verb.add_argument("--hard-limit", type=numbers, default=[], metavar="BYTES,…", help="RLIMIT_DATA of one more run")
    verb.add_argument(
        "--kill-at",
        type=lambda text: list(map(float, text.split(","))),
        default=[],
        metavar="SHARE,…",
        help="kill one more run after this share of the usual time, and go on",
    )
    verb.add_argument("--json", type=Path, help="write all figures here, too")
    verb.add_argument("--work", type=Path, help="where bundles and links go for a while; default: beside DIR")
    verb.set_defaults(do=run)

    verb = verbs.add_parser("floor", help="the least time that the factorisation can take, by bytes and operations")
    _add_shape(verb)
    verb.add_argument("--clusters", type=int, default=25)
    verb.add_argument("--bundle-rank", type=int, default=16)
    verb.add_argument("--passes", nargs="*", default=(), metavar="WIDTH[xCOUNT][b][e][a]", help="see floor.parse_pass")
    verb.add_argument("--bandwidth", type=float, default=3.35, metavar="TB/S")
    verb.add_argument("--f32", type=float, default=67.0, metavar="TFLOP/S")
    verb.add_argument("--f64", type=float, default=67.0, metavar="TFLOP/S")
    verb.add_argument("--measured", type=float, metavar="S", help="seconds to compare with")
    verb.set_defaults(do=floor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    code: int = options.do(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
