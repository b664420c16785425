"""Sizes and errors of the sample's bundles, in tests/results/sample.tsv: `python tests/testing/sample_results.py`.

The table is under version control, so that a change of results shows in the diff of the change that makes it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path
from typing import NamedTuple, Self

from lorazip_cli.main import main
from lorazip_core.sample import sample_path

FILE = Path(__file__).resolve().parents[1] / "results" / "sample.tsv"
SCHEMES = (
    "--method coded",
    "--method coded --budget 100kB",
    "--method svd",
    "--method joint",
    "--method diag",
    "--method joint --max-error 0.15",
    "--method joint --clusters 3",
)


class Result(NamedTuple):
    """A row of the table. Bytes are those of all files but the manifest, which changes with the version."""

    scheme: str
    modules: int
    clusters: str
    individual: int
    tensor_bytes: int
    mean_squared_error: float
    max_squared_error: float
    worst: str

    @classmethod
    def of(cls, scheme: str) -> Self:
        """Compress the sample by these options, on the CPU."""
        with tempfile.TemporaryDirectory() as place:
            bundle = Path(place) / "bundle"
            made = _report("compress", str(sample_path()), "-o", str(bundle), "--device", "cpu", *scheme.split())
            files = [path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
            return cls(
                scheme,
                len(json.loads((bundle / "manifest.json").read_bytes())["modules"]),
                "+".join(map(str, made["clusters"])) or "-",
                len(made["individual"]),
                sum(path.stat().st_size for path in files),
                made["summary"]["mean_squared_error"],
                made["summary"]["max_squared_error"],
                made["worst"]["name"],
            )


def read() -> dict[str, Result]:
    """The table, by scheme."""
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    numbers = {"modules": int, "individual": int, "tensor_bytes": int}
    numbers |= {"mean_squared_error": float, "max_squared_error": float}
    return {row["scheme"]: Result(**{key: numbers.get(key, str)(row[key]) for key in Result._fields}) for row in rows}


def write(results: list[Result]) -> None:
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(Result._fields)
        for result in results:
            writer.writerow(f"{value:.7g}" if isinstance(value, float) else value for value in result)


def _report(*argv: str) -> dict:
    out = io.BytesIO()
    with contextlib.redirect_stdout(io.TextIOWrapper(out, encoding="utf-8", write_through=True)):
        assert main([*argv, "--json", "-q"]) == 0, argv
        return dict(json.loads(out.getvalue()))


if __name__ == "__main__":
    write([Result.of(scheme) for scheme in SCHEMES])
