"""What adapters add to a step of a decoder: the kernels of serving alone, on a GPU, as a CUDA graph.

    python tests/benchmarks/serving_kernels.py BUNDLE [BUNDLE ...] [--tokens 1,16,64,256] [--prompts 8192] [--cuts]

Bundles are of q, k and v of a model (`serving.py make` makes such). A step calls the operators of all layers for so
many tokens, each of another adapter at random, or for prompts of 160 tokens; beside it the same number of products
with the weights of q, k and v. Before anything is timed, kernels are held against the plain operators on the CPU. With
--cuts other ways to cut the work of each kernel are tried, see `Cuts`.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorazip_core.bundle.reader import Bundle
from lorazip_core.serving.kernels import cores, terms
from lorazip_core.serving.kernels.cuts import Cuts, Expand, Shrink
from lorazip_core.serving.layers import Layer, Slice
from lorazip_core.serving.store import AdapterStore
from lorazip_core.serving.tiles import FEW

GPU = torch.device("cuda")
PROMPT = 160
REPEATS = 20
CUTS: dict[tuple[str, str], tuple[list[Shrink], list[Expand]]] = {
    ("terms", "OF_FEW"): (
        [
            *(Shrink(8, 512, warps, groups=groups) for warps in (1, 2) for groups in (4, 8)),
            *(Shrink(4, 1024, warps, groups=8) for warps in (1, 2, 4)),
            *(Shrink(2, 2048, warps, groups=8) for warps in (2, 4)),
            Shrink(16, 256, 1, groups=8),
        ],
        [Expand(columns, warps) for columns in (256, 512, 1024) for warps in (1, 2)],
    ),
    ("terms", "OF_MANY"): (
        [Shrink(splits, columns, 4, terms=16) for splits in (2, 4, 8) for columns in (64, 128)],
        [Expand(columns, warps) for columns in (32, 64, 128) for warps in (2, 4)],
    ),
    ("bases", "OF_FEW"): (
        [Shrink(splits, columns, warps) for splits in (8, 16) for columns in (64, 128) for warps in (1, 2)],
        [Expand(columns, warps) for columns in (64, 128, 256) for warps in (1, 2)],
    ),
    ("bases", "OF_MANY"): (
        [Shrink(splits, columns, 4) for splits in (1, 2) for columns in (64, 128)],
        [Expand(columns, warps) for columns in (64, 128, 256) for warps in (4, 8)],
    ),
}
"""Other ways to cut the work of the first kernel and of the second one."""


def layers_of(bundle: Bundle) -> list[Layer]:
    """The modules of one parent that have inputs of one size, side by side."""
    beside: defaultdict[tuple[str, int], list[Slice]] = defaultdict(list)
    for module in bundle.manifest.modules:
        slices = beside[module.name.rpartition(".")[0], module.d_in]
        column = slices[-1].column + len(slices[-1].out) if slices else 0
        slices.append(Slice(module.name, column, range(module.d_out), range(module.d_in)))
    return [Layer(parent, tuple(slices)) for (parent, _), slices in beside.items()]


class Step:
    """The operators of all layers, for some tokens."""

    def __init__(self, store: AdapterStore, tokens: int, each: int, seed: int, device: torch.device = GPU) -> None:
        draw = np.random.default_rng(seed)
        adapters = draw.integers(0, len(store.numbers), -(-tokens // each))
        self.numbers: NDArray[np.int32] = np.repeat(adapters, each)[:tokens].astype(np.int32)
        self.batch = torch.from_numpy(store.batch(self.numbers)).to(device)
        self.calls = [(layer, store.calls(number)) for number, layer in enumerate(store.layers)]
        generator = torch.Generator().manual_seed(seed)
        self.inputs = {
            size: torch.randn(tokens, size, generator=generator).to(device, torch.bfloat16)
            for size in {len(layer.slices[0].taken) for layer in store.layers}
        }
        self.outputs = {
            layer.name: torch.zeros(tokens, _width(layer), dtype=torch.bfloat16, device=device)
            for layer in store.layers
        }

    def adapters(self) -> None:
        for layer, calls in self.calls:
            for call in calls:
                call(self.outputs[layer.name], self.inputs[len(layer.slices[0].taken)], self.batch)


def _width(layer: Layer) -> int:
    return layer.slices[-1].column + len(layer.slices[-1].out)


def milliseconds(step: Callable[[], None]) -> float:
    """The median time of a CUDA graph of ``step``."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    taken = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end))
    return sorted(taken)[len(taken) // 2]


def kernel_times(step: Callable[[], None]) -> list[tuple[str, float]]:
    """The milliseconds that each kernel of serving takes in a step, without the time between kernels."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return [(each.key, each.device_time_total / 1000) for each in profile.key_averages() if each.key.startswith("_")]


def furthest(bundle: Bundle, store: AdapterStore, tokens: int, each: int) -> float:
    """The largest difference between kernels and plain operators, as a share of the largest number."""
    plain = AdapterStore(bundle, store.layers[:2], device=torch.device("cpu"), dtype=torch.bfloat16)
    found, wanted = Step(store, tokens, each, 1), Step(plain, tokens, each, 1, torch.device("cpu"))
    found.adapters()
    wanted.adapters()
    worst = 0.0
    for name, expected in wanted.outputs.items():
        off = (found.outputs[name].cpu().float() - expected.float()).abs().max()
        worst = max(worst, float(off / expected.float().abs().max()))
    return worst


def products(layers: Sequence[Layer], tokens: int) -> Callable[[], None]:
    """x W of as many layers, of eight weights in turn."""
    sizes = [(_width(layer), len(layer.slices[0].taken)) for layer in layers]
    weights: dict[tuple[int, int], list[Tensor]] = {
        size: [torch.zeros(*size, dtype=torch.bfloat16, device=GPU) for _ in range(8)] for size in set(sizes)
    }
    inputs = {size: torch.zeros(tokens, size[1], dtype=torch.bfloat16, device=GPU) for size in set(sizes)}

    def step() -> None:
        for number, size in enumerate(sizes):
            inputs[size] @ weights[size][number % 8].mT

    return step


@contextmanager
def cut(kernels: ModuleType, name: str, cuts: Cuts) -> Iterator[None]:
    before = getattr(kernels, name)
    setattr(kernels, name, cuts)
    try:
        yield
    finally:
        setattr(kernels, name, before)


def measure(path: Path, options: argparse.Namespace) -> None:
    bundle = Bundle(path)
    store = AdapterStore(bundle, layers_of(bundle), device=GPU, dtype=torch.bfloat16)
    print(f"{path.name}: {len(store.numbers):,} adapters, {store.nbytes / 1e6:,.1f} MB, {store.kinds}", flush=True)
    for tokens, each in ((40, 1), (FEW + 8, PROMPT)):
        print(f"  kernels are off by {furthest(bundle, store, tokens, each):.1e} at {tokens} tokens", flush=True)
    loads = [*((tokens, 1) for tokens in options.tokens), *((tokens, PROMPT) for tokens in options.prompts)]
    for tokens, each in loads:
        base = milliseconds(products(store.layers, tokens))
        added = milliseconds(Step(store, tokens, each, 0).adapters)
        parts = ", ".join(f"{name} {taken:.3f}" for name, taken in kernel_times(Step(store, tokens, each, 0).adapters))
        told = f"adapters {added:.3f} ms ({parts}), weights {base:.3f} ms: {added / base:.2f}"
        print(f"  {tokens:,} tokens: {told}", flush=True)
    if options.cuts:
        few, many = [load for load in loads if load[0] <= FEW], [load for load in loads if load[0] > FEW]
        try_cuts(store, "OF_FEW", few)
        try_cuts(store, "OF_MANY", many)


def try_cuts(store: AdapterStore, name: str, loads: Sequence[tuple[int, int]]) -> None:
    """Print how long a kernel takes for all loads, cut as it is and in other ways."""
    kind, kernels = ("terms", terms) if store.kinds == ["terms"] else ("bases", cores)
    steps = [Step(store, *load, 0) for load in loads]
    usual: Cuts = getattr(kernels, name)
    of_first = [usual, *(usual._replace(shrink=shrink) for shrink in CUTS[kind, name][0])]
    of_second = [usual, *(usual._replace(expand=expand) for expand in CUTS[kind, name][1])]
    for which, (kernel, tried) in enumerate(((f"_shrink_{kind}", of_first), (f"_expand_{kind}", of_second))):
        for cuts in tried:
            with cut(kernels, name, cuts):
                taken = [dict(kernel_times(step.adapters))[kernel] for step in steps]
            print(f"  {kind} {name} {cuts[which]}: {' '.join(f'{each:.3f}' for each in taken)} ms", flush=True)


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--tokens", type=_counts, default=[1, 16, 64, 256], metavar="T,T,…")
    parser.add_argument("--prompts", type=_counts, default=[8192], metavar="T,T,…")
    parser.add_argument("--cuts", action="store_true")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("there is no GPU", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # what plain operators multiply is small
    for bundle in options.bundles:
        measure(bundle, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
