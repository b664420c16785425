"""Layers of the random bundle as engines have them, and what their operators should compute of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorazip_core.serving.layers import Layer, Slice
from lorazip_core.serving.resident import Resident
from lorazip_core.serving.store import AdapterStore
from testing.random_bundle import MODULES

EMBED, CONV, Q, V = MODULES


def layers(rank: int = 0, ranks: int = 1, *, by_rows: bool = False) -> list[Layer]:
    """Those of one of some tensor parallel ranks: q and v in one matrix, the others in one each.

    Ranks share the rows of ΔW, or the columns where ``by_rows``. q and v have a gap between them, as where an engine
    pads.
    """

    def part(whole: int, shared: bool) -> range:
        size = whole // ranks
        return range(size * rank, size * (rank + 1)) if shared else range(whole)

    found = []
    for modules in ((EMBED,), (Q, V), (CONV,)):
        slices: list[Slice] = []
        column = 0
        for module in modules:
            out = part(module.d_out, not by_rows)
            slices.append(Slice(module.name, column, out, part(module.d_in, by_rows)))
            column += len(out) + 3
        found.append(Layer(modules[0].name, tuple(slices)))
    return found


def computed(
    store: AdapterStore,
    layer: int,
    x: Tensor,
    numbers: list[int],
    y: Tensor,
    padding: int = 0,
    operators: Any = torch.ops.lorazip,
) -> Tensor:
    """``y`` with all that the operators of a layer add for tokens x with these numbers.

    ``padding`` is of x and y: as many last tokens are not of the batch. ``operators`` is what computes.
    """
    assert len(x) == len(y) == len(numbers) + padding
    batch = store.batch(np.array(numbers, np.int32))
    assert len(batch) <= store.most_ints(len(numbers))
    there = torch.full((store.most_ints(len(x)),), -(2**31), dtype=torch.int32)  # what an earlier batch left
    there[: len(batch)] = torch.from_numpy(batch)
    y = y.clone()
    for call in store.calls(layer):
        getattr(operators, call.operator)(y, x, there, *call.tensors, *call.numbers)
    return y


def expected(resident: Resident, layer: Layer, x: Tensor, rows: list[int], y: Tensor) -> Tensor:
    """The same in float64, by `Resident.apply`; ``rows`` are those of the adapters there."""
    y = y.double().clone()
    for each in layer.slices:
        whole = torch.zeros(len(rows), resident.modules[each.module].size.d_in, dtype=torch.float64)
        whole[:, each.taken.start : each.taken.stop] = x[: len(rows)].double()
        added = resident.apply(each.module, whole, torch.tensor(rows, dtype=torch.int64))
        y[: len(rows), each.column : each.column + len(each.out)] += added[:, each.out.start : each.out.stop]
    return y


def inputs(layer: Layer, tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An x and a y of a layer."""
    generator = torch.Generator().manual_seed(seed)
    last = layer.slices[-1]
    sizes = len(last.taken), last.column + len(last.out)
    x, y = (torch.randn(tokens, size, generator=generator).to(dtype) for size in sizes)
    return x, y
