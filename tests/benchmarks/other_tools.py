"""lorazip, lorashare and vlora on the same real adapters: bytes, errors, seconds, memory. Exits 1 if a check fails.

    python tests/benchmarks/other_tools.py --peers-python PATH [--repeat 3] [--json FILE] [--work DIR]

PATH is the interpreter of a virtual environment that has both, made like this:

    python -m venv peers
    peers/bin/pip install -r tests/benchmarks/peers.txt

Every tool is used as its own documentation says, one process for each step: compress all adapters, then write them out
again as PEFT adapters. Bytes are of all files that compressing wrote. Errors are those of the written adapters against
the originals, by `errors_of_adapters` in float64; lorazip exports in float32, as the others do, so that nothing is
rounded twice. vlora takes no bf16, so it gets float32 copies of the adapters, made before its clock starts. It forgets
lora_alpha; its own option for that (``vlora export --alpha``) sets it to the true value, here through the functions
that the command calls, since the command writes one adapter per process.

Times and memory include starting Python; the last step is `verify --against` for lorazip and writing the adapters for
the others, which can't verify. Rounds go over all tools in turn; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from process import Finished, lorazip, run
from real_adapters import DEFAULT, require

MB = 1e6
HALF = 0.5
TARGET = "joint, rank 31"  # the configuration that our own targets are about
TARGET_BYTES, TARGET_MEAN, TARGET_WORST = 11.1e6, 0.26, 0.38
TARGET_COMPRESS, TARGET_VERIFY, TARGET_MEMORY = 15.0, 10.0, 1.2e9
ALPHA = 32

_VLORA_EXPORT = """
import sys
from pathlib import Path
from vlora.io import save_adapter
from vlora.subspace import SharedSubspace
subspace = SharedSubspace.load(sys.argv[1])
for task in sorted(subspace.tasks):
    weights = subspace.reconstruct(task)
    weights.metadata["lora_alpha"] = float(sys.argv[3])
    save_adapter(weights, Path(sys.argv[2]) / task)
"""

LORAZIP = {
    "svd, rank 1": ("--method", "svd", "--rank", 1),
    "joint, rank 21": ("--method", "joint", "--rank", 21),
    "diag, rank 32": ("--method", "diag", "--rank", 32),
    "svd, rank 2": ("--method", "svd", "--rank", 2),
    TARGET: ("--method", "joint", "--rank", 31),
    "joint, rank 32": ("--method", "joint", "--rank", 32),
    "diag, rank 64": ("--method", "diag", "--rank", 64),
    "svd, rank 4": ("--method", "svd", "--rank", 4),
    "joint, rank 50": ("--method", "joint", "--rank", 50),
}
LORASHARE = {"k = 8": 8, "k = 16": 16, "k = 32": 32}
VLORA = {"k = 16": 16}


@dataclass
class Row:
    """One tool with one set of options; seconds and bytes of memory of each round, compressing and afterwards."""

    tool: str
    options: str
    bytes: int
    mean: float
    worst: float
    module_mean: float
    compress_seconds: list[float]
    compress_peak: list[int]
    after_seconds: list[float]
    after_peak: list[int]


@dataclass(frozen=True)
class Contender:
    """How to compress into a directory, what is timed afterwards, and how to get PEFT adapters (not timed)."""

    tool: str
    options: str
    compress: Callable[[Path], Finished]
    after: Callable[[Path, Path], Finished]
    export: Callable[[Path, Path], object] | None = None


def contenders(data: Path, copies: Path, peers: Path) -> list[Contender]:
    """All that are compared, the peers first."""
    quiet = {"HF_HUB_OFFLINE": "1"}
    commands = peers.parent
    adapters, wide = (sorted(p.parent for p in root.glob("*/adapter_config.json")) for root in (data, copies))
    found = [
        Contender(
            "lorashare",
            options,
            lambda out, k=k: run(  # type: ignore[misc]
                [commands / "lorashare", "compress", *adapters, "-o", out, "-k", k], environment=quiet
            ),
            lambda out, peft: run([commands / "lorashare", "reconstruct", out, "--all", "-o", peft], environment=quiet),
        )
        for options, k in LORASHARE.items()
    ]
    found += [
        Contender(
            "vlora",
            options,
            lambda out, k=k: run([commands / "vlora", "compress", *wide, "-o", out, "-k", k]),  # type: ignore[misc]
            lambda out, peft: run([peers, "-c", _VLORA_EXPORT, out, peft, ALPHA]),
        )
        for options, k in VLORA.items()
    ]
    found += [
        Contender(
            "lorazip",
            options,
            lambda out, words=words: lorazip("compress", data, "-o", out, *words, "--device", "cpu", "-q"),  # type: ignore[misc]
            lambda out, peft: lorazip("verify", out, "--against", data, "-q"),
            lambda out, peft: lorazip("export", out, "-o", peft, "--dtype", "f32", "-q"),
        )
        for options, words in LORAZIP.items()
    ]
    return found


def measure(which: list[Contender], data: Path, work: Path, repeat: int) -> list[Row]:
    """Every contender, ``repeat`` times in turn; errors from the first round."""
    rows: dict[tuple[str, str], Row] = {}
    for turn in range(repeat):
        for one in which:
            out, peft = work / "compressed", work / "peft"
            compressed = one.compress(out)
            after = one.after(out, peft)
            if turn == 0:
                if one.export is not None:
                    one.export(out, peft)
                rows[one.tool, one.options] = _first(one, out, peft, data)
            row = rows[one.tool, one.options]
            row.compress_seconds.append(compressed.seconds)
            row.compress_peak.append(compressed.peak_bytes)
            row.after_seconds.append(after.seconds)
            row.after_peak.append(after.peak_bytes)
            for folder in (out, peft):
                shutil.rmtree(folder, ignore_errors=True)
            print(f"round {turn + 1}: {one.tool}, {one.options}: {compressed.seconds:.1f} s", file=sys.stderr)
    return list(rows.values())


def _first(one: Contender, out: Path, peft: Path, data: Path) -> Row:
    from errors_of_adapters import compare  # late: PyTorch and numpy stay out of --help

    errors = compare(data, peft)
    return Row(one.tool, one.options, size(out), *errors, [], [], [], [])


def size(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_as_f32(data: Path, copies: Path) -> None:
    """The same adapters with every tensor in float32."""
    from safetensors.torch import load_file, save_file

    for config in data.glob("*/adapter_config.json"):
        target = copies / config.parent.name
        target.mkdir(parents=True)
        shutil.copyfile(config, target / config.name)
        tensors = load_file(config.parent / "adapter_model.safetensors")
        save_file({key: each.float() for key, each in tensors.items()}, target / "adapter_model.safetensors")


def table(rows: list[Row], original: int) -> str:
    """The rows as a Markdown table, by size."""
    lines = [
        f"originals: {original / MB:.1f} MB",
        "",
        "| | | MB | mean | worst | mean over modules | compress, s | peak, MB | then, s | peak, MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.bytes):
        lines.append(
            f"| {row.tool} | {row.options} | {row.bytes / MB:.2f} | {row.mean:.4f} | {row.worst:.4f}"
            f" | {row.module_mean:.4f} | {median(row.compress_seconds):.1f} | {median(row.compress_peak) / MB:.0f}"
            f" | {median(row.after_seconds):.1f} | {median(row.after_peak) / MB:.0f} |"
        )
    return "\n".join(lines)


def checks(rows: list[Row], original: int) -> list[tuple[bool, str]]:
    """(holds, what): at most half the error of each peer at no more bytes, and our own targets."""
    own = [row for row in rows if row.tool == "lorazip"]
    keep = Row("lorazip", "the originals as they are", original, 0.0, 0.0, 0.0, [0.0], [0], [0.0], [0])
    found = []
    for peer in (row for row in rows if row.tool != "lorazip"):
        for only in ("joint", ""):
            fitting = [row for row in [*own, keep] if row.bytes <= peer.bytes and row.options.startswith(only)]
            if not fitting or (only and keep.bytes <= peer.bytes):
                continue  # with room for the originals there is nothing to choose
            best = min(fitting, key=lambda row: row.mean)
            mean, worst = best.mean / peer.mean, best.worst / peer.worst
            found.append(
                (
                    mean <= HALF and worst <= HALF,
                    f"{best.options}, {best.bytes / MB:.1f} MB, against {peer.tool} {peer.options},"
                    f" {peer.bytes / MB:.1f} MB: {mean:.3f} of its mean error, {worst:.3f} of its worst (at most 0.5)",
                )
            )
    target = next(row for row in own if row.options == TARGET)
    for name, value, limit, unit in (
        ("bytes", target.bytes / MB, TARGET_BYTES / MB, " MB"),
        ("mean squared error", target.mean, TARGET_MEAN, ""),
        ("worst squared error", target.worst, TARGET_WORST, ""),
        ("compress", median(target.compress_seconds), TARGET_COMPRESS, " s"),
        ("verify", median(target.after_seconds), TARGET_VERIFY, " s"),
        ("memory", max(target.compress_peak + target.after_peak) / MB, TARGET_MEMORY / MB, " MB"),
    ):
        found.append((value <= limit, f"{TARGET}: {name} {value:.4g}{unit} (at most {limit:g}{unit})"))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, required=True, help="an interpreter with lorashare and vlora-dev")
    parser.add_argument("--data", type=Path, default=DEFAULT, help="the real adapters")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    parser.add_argument("--work", type=Path, help="where temporary files go; default: the system's place")
    options = parser.parse_args(argv)
    data = require(options.data)
    peers = Path(os.path.abspath(options.peers_python))  # not resolved: a link into the environment is what counts
    original = sum(path.stat().st_size for path in data.glob("*/adapter_*"))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        copies = Path(folder) / "f32"
        copy_as_f32(data, copies)
        rows = measure(contenders(data, copies, peers), data, Path(folder), options.repeat)
    print(table(rows, original), end="\n\n")
    results = checks(rows, original)
    for holds, what in results:
        print("PASS" if holds else "FAIL", what)
    if options.json:
        report = {
            "original_bytes": original,
            "repeat": options.repeat,
            "rows": [asdict(row) for row in rows],
            "checks": [{"holds": holds, "what": what} for holds, what in results],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(holds for holds, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
