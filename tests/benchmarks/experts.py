"""Adapters of a mixture of experts as PEFT fuses them: how long each verb takes on thousands of expert modules.

    python tests/benchmarks/experts.py [--experts 128] [--layers 24] [--adapters 8] [--methods svd,joint] [--json FILE]

The adapters have random factors for the parameters gate_up_proj and down_proj of every layer, 2·E·L modules in all. Set
OMP_NUM_THREADS=1, as for all of lorazip's small matrices. Each verb is a process of its own, so its seconds have the
import of PyTorch in them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from process import run
from safetensors.torch import save_file


class Shape(NamedTuple):
    """A model of E experts in each of L layers, and the rank of the adapters."""

    experts: int
    layers: int
    hidden: int
    inner: int
    rank: int


class Timed(NamedTuple):
    """A verb on a bundle of one method."""

    method: str
    verb: str
    seconds: float
    peak_bytes: int


def write(folder: Path, shape: Shape, adapters: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write so many adapters into ``folder``."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/moe",
        "r": shape.rank,
        "lora_alpha": 2 * shape.rank,
        "target_modules": [],
        "target_parameters": ["down_proj", "gate_up_proj"],
    }
    sides = {
        ".base_layer": (2 * shape.inner, shape.hidden),  # gate_up_proj, which the model registers first
        "": (shape.hidden, shape.inner),
    }
    for number in range(adapters):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(shape.layers):
            for wrapper, (d_out, d_in) in sides.items():
                name = f"base_model.model.model.layers.{layer}.mlp.experts{wrapper}"
                rows = shape.rank * shape.experts
                tensors[f"{name}.lora_A.weight"] = torch.randn(rows, d_in, generator=generator).to(dtype)
                tensors[f"{name}.lora_B.weight"] = torch.randn(d_out, rows, generator=generator).to(dtype)
        own = folder / f"adapter-{number}"
        own.mkdir(parents=True)
        save_file(tensors, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text(json.dumps(config))


def measure(originals: Path, work: Path, method: str, rank: int) -> list[Timed]:
    """Every verb on a bundle of ``method``."""
    bundle = work / method
    verbs: dict[str, list[object]] = {
        "compress": ["compress", originals, "-o", bundle, "--method", method, "--rank", rank],
        "verify": ["verify", bundle],
        "verify --against": ["verify", bundle, "--against", originals],
        "info": ["info", bundle],
        "export": ["export", bundle, "-o", work / f"{method}-exported"],
    }
    timed = []
    for verb, words in verbs.items():
        done = run([sys.executable, "-m", "lorazip_cli", *words])
        timed.append(Timed(method, verb, done.seconds, done.peak_bytes))
    return timed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=128)
    parser.add_argument("--rank", type=int, default=4, help="of the adapters")
    parser.add_argument("--methods", default="svd,joint", help="at rank 2 for svd, else at 16")
    parser.add_argument("--json", type=Path, help="write all figures here, too")
    parser.add_argument("--work", type=Path, help="where files go for a while; default: the system's place")
    options = parser.parse_args(argv)
    shape = Shape(options.experts, options.layers, options.hidden, options.inner, options.rank)
    timed: list[Timed] = []
    with tempfile.TemporaryDirectory(dir=options.work) as place:
        originals = Path(place) / "originals"
        write(originals, shape, options.adapters)
        for method in options.methods.split(","):
            timed += measure(originals, Path(place), method, 2 if method == "svd" else 16)
    print(f"{options.adapters} adapters of {2 * shape.experts * shape.layers} expert modules", end="\n\n")
    print("| method | verb | s | peak, MB |", "|---|---|---|---|", sep="\n")
    for each in timed:
        print(f"| {each.method} | {each.verb} | {each.seconds:.1f} | {each.peak_bytes / 1e6:.0f} |")
    if options.json is not None:
        options.json.write_text(json.dumps([each._asdict() for each in timed], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
