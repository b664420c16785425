"""Diagonal or full cores? Errors at equal bundle bytes and at equal bytes per adapter, for a growing collection.

    python tests/benchmarks/diag_or_full.py [DIR] [--counts 8,16,32] [--ranks 8,16,32,64] [--modules 15]

DIR is a directory of adapters of equal modules (default: ../shared/data/smollm2-r16 beside the repository). Errors are
squared errors of what is stored in bf16, energy-weighted over a sample of modules; bytes are of bases and cores of all
modules, without manifest and headers.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.reader import Adapter
from lorazip_core.base.threads import in_order
from lorazip_core.maths.encode import encode_diag, encode_joint
from lorazip_core.maths.stack import ScaledStack, Stack

Method = Literal["diag", "joint"]
DEFAULT = Path(__file__).parents[3] / "shared" / "data" / "smollm2-r16"
BYTES = 2  # of a number in bf16


class Sizes(NamedTuple):
    """d_out + d_in of all modules, summed, and their number."""

    sides: int
    modules: int

    def own(self, method: Method, rank: int) -> int:
        """Bytes of one adapter: its cores."""
        return BYTES * self.modules * (rank if method == "diag" else rank * rank)

    def bundle(self, method: Method, rank: int, count: int) -> int:
        return BYTES * self.sides * rank + count * self.own(method, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--counts", type=numbers, default="8,16,32")
    parser.add_argument("--ranks", type=numbers, default="8,16,32,64")
    parser.add_argument("--modules", type=int, default=15)
    options = parser.parse_args()
    if not options.dir.is_dir():
        sys.exit(f"the adapters are not there: no {options.dir}")
    adapters = list(open_collection(options.dir).adapters)
    random.Random(0).shuffle(adapters)
    names = sorted(adapters[0].parts)
    shapes = [tuple(side.shape for side in adapters[0].factors(name)) for name in names]
    sizes = Sizes(sum(b[0] + a[1] for b, a in shapes), len(names))
    count = min(options.modules, len(names))
    sampled = [names[(i * len(names) + i % 3 * count) // count % len(names)] for i in range(count)]  # of all kinds
    print(f"{options.dir.name}: errors on {count} of {len(names)} modules, bytes of all of them")
    for n in options.counts:
        if n <= len(adapters):
            compare(adapters[:n], sampled, sizes, options.ranks)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def compare(adapters: list[Adapter], sampled: list[str], sizes: Sizes, ranks: list[int]) -> None:
    n = len(adapters)
    print(f"\nn = {n}\n{'':24}{'R':>4}{'bundle':>10}{'own':>10}{'mean':>8}{'worst':>8}{'multiplies':>12}{'seconds':>9}")
    stacks = [Stack.of([adapter.factors(name) for adapter in adapters], range(n)) for name in sampled]
    energy = torch.stack([by_number(stack, stack.to(torch.float64).squared_norms()) for stack in stacks]).sum(0)
    for rank in ranks:
        target, own = sizes.bundle("diag", rank, n), sizes.own("diag", rank)
        rows: list[tuple[str, Method, int]] = [
            ("diag", "diag", rank),
            ("joint, equal bundle", "joint", closest(partial(sizes.bundle, "joint", count=n), target)),
            ("joint, equal own", "joint", closest(partial(sizes.own, "joint"), own)),
        ]
        for label, method, width in rows:
            started = time.monotonic()
            errors = squared_errors(stacks, energy, method, width)
            multiplies = sizes.sides // sizes.modules * width + (width if method == "diag" else width * width)
            print(
                f"{label:24}{width:4}{sizes.bundle(method, width, n) / 1e6:7.2f} MB"
                f"{sizes.own(method, width) / 1e3:7.1f} kB{float(errors.mean()):8.4f}{float(errors.max()):8.4f}"
                f"{multiplies:12,}{time.monotonic() - started:9.1f}",
                flush=True,
            )


def closest(size: Callable[[int], int], target: int) -> int:
    """The rank whose size is nearest to ``target``."""
    return min(range(1, 257), key=lambda rank: abs(size(rank) - target))


def squared_errors(stacks: list[Stack], energy: Tensor, method: Method, rank: int) -> Tensor:
    """Σ_m ‖ΔW_im − ΔŴ_im‖² / Σ_m ‖ΔW_im‖² over the sampled modules, of shape [n]."""

    def lost(stack: Stack) -> Tensor:
        weights = 1 / energy[list(stack.adapters)]
        if method == "diag":
            return encode_diag(ScaledStack.of(stack), weights, rank=rank, dtype=torch.bfloat16, seed=0).squared_errors
        alone = torch.zeros(len(weights), dtype=torch.int64)
        encoded = encode_joint([ScaledStack.of(stack)], [alone], [weights], 1, rank=rank, dtype=torch.bfloat16, seed=0)
        return encoded[0].squared_errors

    found: Iterator[Tensor] = in_order(lost, stacks, torch.device("cpu"))
    return torch.stack(list(found)).sum(0) / energy


def by_number(stack: Stack, values: Tensor) -> Tensor:
    """``values`` in the order of the stack, put into the order of the adapters."""
    ordered = torch.empty_like(values)
    ordered[list(stack.adapters)] = values
    return ordered


if __name__ == "__main__":
    main()
