"""What codes for a fixed width gain on a GPU, and what they cost on disk.

    python tests/benchmarks/resident.py DIR… [--times 16,40,64,100]

Each DIR is compressed to 1/times of its factors in bf16 on disk with `--objective disk`. What a device holds of that
bundle is then the budget of a bundle with `--objective resident`; and what that one takes on disk the budget of a last
one, again for the disk. "×" is against the factors in bf16; errors are means over adapters, as bundles claim them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from process import lorazip
from real_adapters import require

from lorazip_core.adapter.collection import open_collection


class Made(NamedTuple):
    """A bundle: its bytes, those that a device holds of it, and its mean squared error."""

    disk: int
    resident: int
    error: float


def stored(folder: Path) -> int:
    """Bytes of all factors in bf16."""
    return sum(2 * part.parameters for adapter in open_collection(folder).adapters for part in adapter.parts.values())


def made(folder: Path, objective: str, budget: int) -> Made:
    """The best bundle within a budget of the bytes that ``objective`` is about."""
    with tempfile.TemporaryDirectory() as place:
        bundle, wanted = Path(place) / "bundle", ("--objective", objective, "--budget", budget)
        done = lorazip("compress", folder, "-o", bundle, *wanted, "--device", "cpu", "--json", "-q")
        summary = json.loads(done.stdout)["summary"]
        held = json.loads(lorazip("info", bundle, "--resident", "--json").stdout)["resident"]
        return Made(summary["bytes_bundle"], held["bytes"], summary["mean_squared_error"])


def row(folder: Path, times: float) -> str:
    """A line of the table."""
    factors = stored(folder)
    coded = made(folder, "disk", round(factors / times))
    fixed = made(folder, "resident", coded.resident)
    again = made(folder, "disk", fixed.disk)
    cells = (
        f"{folder.name}, {factors / coded.resident:.1f}",
        f"{coded.error:.4f}",
        f"{fixed.error:.4f}",
        f"{100 * (fixed.error / coded.error - 1):+.0f}%",
        f"{factors / fixed.disk:.1f}",
        f"{again.error:.4f}",
        f"{100 * (fixed.error / again.error - 1):+.0f}%",
    )
    return f"| {' | '.join(cells)} |"


HEAD = """\
| × on a device | `disk` | `resident` | | × on disk | `disk` | `resident` is |
|---|---|---|---|---|---|---|"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path)
    parser.add_argument("--times", default="16,40,64,100")
    options = parser.parse_args(argv)
    print(HEAD)
    for folder in map(require, options.folders):
        for times in map(float, options.times.split(",")):
            print(row(folder, times), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
