"""Collections with known groups, in memory: updates built around directions that a group shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorazip_core.maths.stack import ScaledStack, Stack
from lorazip_core.reading.updates import Updates

SHAPES = [(24, 20), (16, 24), (10, 20), (20, 20), (16, 14)]
Adapters = list[dict[int, tuple[Tensor, Tensor]]]
"""Per adapter, the factors of the modules that it has."""


def groups(sizes: list[int], *, seed: int = 0, own: float = 0.3, rank: int = 4) -> tuple[Adapters, list[int]]:
    """Adapters of planted groups, each with its own 5 directions a side in every module, and their groups."""
    generator = torch.Generator().manual_seed(seed)
    adapters: Adapters = []
    planted = []
    for group, size in enumerate(sizes):
        bases = [
            (torch.randn(d_out, 5, generator=generator), torch.randn(5, d_in, generator=generator))
            for d_out, d_in in SHAPES
        ]
        for _ in range(size):
            planted.append(group)
            adapters.append({})
            for module, (left, right) in enumerate(bases):
                b = left @ torch.randn(5, rank, generator=generator)
                a = torch.randn(rank, 5, generator=generator) @ right
                b = b + own * torch.randn(b.shape, generator=generator)
                a = a + own * torch.randn(a.shape, generator=generator)
                adapters[-1][module] = b * float(torch.rand(1, generator=generator) * 5 + 0.1), a
    return adapters, planted


def collected(adapters: Adapters, shapes: list[tuple[int, int]] = SHAPES) -> Updates:
    """As the verbs see them, every adapter weighted alike."""

    def load(module: int, members: Sequence[int] | None = None) -> ScaledStack:
        wanted = range(len(adapters)) if members is None else members
        having = [i for i in wanted if module in adapters[i]]
        return ScaledStack.of(Stack.of([adapters[i][module] for i in having], having))

    norms = torch.zeros(len(adapters), len(shapes), dtype=torch.float64)
    ranks = torch.zeros(norms.shape, dtype=torch.int64)
    for module in range(len(shapes)):
        if any(module in adapter for adapter in adapters):
            stack = load(module)
            norms[list(stack.adapters), module] = stack.exact().squared_norms().double()
            ranks[list(stack.adapters), module] = torch.tensor(stack.rows.ranks)
    energy = norms.sum(1, keepdim=True)
    weights = torch.where(energy > 0, 1 / energy, 0.0).expand_as(norms)
    return Updates(load, shapes, ranks, norms, weights, torch.device("cpu"))


def same_partition(labels: list[int], other: list[int]) -> bool:
    return len(set(zip(labels, other, strict=True))) == len(set(labels)) == len(set(other))


def shuffled(adapters: Adapters, seed: int) -> tuple[Adapters, list[int]]:
    order = torch.randperm(len(adapters), generator=torch.Generator().manual_seed(seed)).tolist()
    return [adapters[i] for i in order], order


def rewritten(adapters: Adapters, seed: int = 0) -> Adapters:
    """The same adapters as (B R, R⁻¹ A)."""
    generator = torch.Generator().manual_seed(seed)

    def turn(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        rank = a.shape[0]
        r = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q
        r = r * torch.linspace(0.5, 2, rank, dtype=torch.float64)
        return (b.double() @ r).float(), torch.linalg.solve(r, a.double()).float()

    return [{module: turn(*factors) for module, factors in adapter.items()} for adapter in adapters]
