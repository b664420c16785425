"""How much faster is `lorazip fetch` than a loop over snapshot_download? Exits 1 if it is less than 4 times as fast.

    python tests/benchmarks/fetch.py [--count 300] [--delay 0.05] [--repeat 3] [--json FILE] [--work DIR]

A Hub on loopback (testing/hub, in its own process) serves made-up adapters with the shapes of q and v of the 30 layers
of SmolLM2-135M, rank 4 (0.5 MB each), and waits --delay seconds before every answer, which stands for the way to the
real one. It is asked by three, each a process with its default options and a cache of its own, which is empty:

    fetch       lorazip fetch org:bench -o DIR
    loop        for model in list_models(author="bench"): snapshot_download(model.id, allow_patterns=[…])
    threads     the same in a pool of 8 threads

The patterns are the files that fetch brings. Then each is run again, with nothing changed: fetch has a lock and asks
nobody, so `fetch --update`, which looks at every repository as the others do, has a row, too. Rounds go over all in
turn; seconds are medians over rounds and include starting Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from process import run
from testing.hub import HubProcess, hub_process
from testing.random_adapters import Recipe, write_collection

from lorazip_core.adapter.module import Module

FASTER = 4.0
OWNER = "bench"
MODULES = tuple(
    Module(f"model.layers.{layer}.self_attn.{name}_proj", "linear", d_out, 576)
    for layer in range(30)
    for name, d_out in (("q", 576), ("v", 192))
)

_LOOP = f"""
import sys
from huggingface_hub import list_models, snapshot_download
patterns = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
ids = [model.id for model in list_models(author="{OWNER}")]
def bring(id):
    snapshot_download(id, allow_patterns=patterns)
"""
LOOP = f"{_LOOP}\nfor id in ids:\n    bring(id)\n"
THREADS = f"{_LOOP}\nfrom concurrent.futures import ThreadPoolExecutor\nlist(ThreadPoolExecutor(8).map(bring, ids))\n"


@dataclass
class Row:
    """One way to bring them, over all rounds. Requests and bytes are those that the server has seen and sent."""

    seconds: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def measure(adapters: Path, delay: float, repeat: int, work: Path) -> dict[str, Row]:
    """What was measured, by what was done."""
    rows: defaultdict[str, Row] = defaultdict(Row)
    with hub_process(adapters, "--owner", OWNER, "--delay", str(delay)) as hub:
        for number in range(repeat):
            print(f"round {number + 1} of {repeat}", file=sys.stderr, flush=True)
            for name, seconds, peak in _round(hub, work):
                asked = hub.lap()
                row = rows[name]
                row.seconds.append(seconds)
                row.peak_bytes.append(peak)
                row.requests.append(asked["requests"])
                row.bytes.append(asked["body_bytes"])
    return dict(rows)


def _round(hub: HubProcess, work: Path) -> Iterator[tuple[str, float, int]]:
    """Everything once, as it is done."""
    lorazip = [sys.executable, "-m", "lorazip_cli", "fetch", f"org:{OWNER}", "-q", "-o", work / "fetched"]
    loop, threads = ([sys.executable, "-c", program] for program in (LOOP, THREADS))
    commands = {
        "fetch": {"": lorazip, ", again": lorazip, " --update, again": [*lorazip, "--update"]},
        "loop": {"": loop, ", again": loop},
        "threads": {"": threads, ", again": threads},
    }
    for name, runs in commands.items():
        home = work / "home"
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        for what, command in runs.items():
            done = run(command, environment=settings)
            yield name + what, done.seconds, done.peak_bytes
        arrived = len(list((home / "hub").glob("models--*/snapshots/*/adapter_model.safetensors")))
        if arrived != hub.repositories:
            raise SystemExit(f"{name} brought {arrived} of {hub.repositories} adapters")
        shutil.rmtree(home)
        shutil.rmtree(work / "fetched", ignore_errors=True)


def table(rows: dict[str, Row]) -> str:
    """All rows as Markdown; how many times as long as fetch, of first runs and of later ones."""
    lines = ["| | s, median | least, most | × fetch | requests | MB | peak, MB |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        ours = rows["fetch --update, again" if "again" in name else "fetch"]
        lines.append(
            f"| {name} | {median(row.seconds):.1f} | {min(row.seconds):.1f}, {max(row.seconds):.1f}"
            f" | {median(row.seconds) / median(ours.seconds):.1f} | {median(row.requests):,.0f}"
            f" | {median(row.bytes) / 1e6:.1f} | {max(row.peak_bytes) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="adapters")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before every answer")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--faster", type=float, default=FASTER, help="how many times as fast as the loop it has to be")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    parser.add_argument("--work", type=Path, help="where temporary files go; default: the system's place")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        adapters = Path(folder) / "adapters"
        recipes = (Recipe(f"a{number:05}", 4, MODULES, dtype=torch.bfloat16) for number in range(options.count))
        write_collection(adapters, tuple(recipes))
        size = sum(path.stat().st_size for path in adapters.rglob("*") if path.is_file())
        rows = measure(adapters, options.delay, options.repeat, Path(folder))
    print(
        f"{options.count} adapters, {size / 1e6:.1f} MB; {1000 * options.delay:g} ms before every answer;"
        f" {os.cpu_count()} cores",
        end="\n\n",
    )
    print(table(rows), end="\n\n")
    ratio = median(rows["loop"].seconds) / median(rows["fetch"].seconds)
    holds = ratio >= options.faster
    print("PASS" if holds else "FAIL", f"fetch is {ratio:.1f} times as fast as the loop (at least {options.faster:g})")
    if options.json:
        report = {
            "adapters": options.count,
            "bytes": size,
            "delay": options.delay,
            "rows": {name: asdict(row) for name, row in rows.items()},
            "ratio": ratio,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
