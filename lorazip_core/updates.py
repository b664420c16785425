"""The updates of a whole collection, read module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .stack import Stack

# Numbers in the factors of modules that are worked on at once, and such modules: on the CPU, where several groups are
# in work, as many as fit its caches well; on a GPU as many as keep it busy.
_AT_ONCE = {False: (2**22, 16), True: (2**31, 32)}


class Load(Protocol):
    """Reads the updates of one module: of all adapters that have it, or of those among ``members``, which ascend."""

    def __call__(self, module: int, members: Sequence[int] | None = None, /) -> Stack: ...


@dataclass(frozen=True)
class Updates:
    """n adapters and M modules, both by number.

    ``load(m)`` reads the updates D_im of module m, of the adapters that have it, and ``load(m, members)`` of some of
    them; ``shapes`` has its (d_out, d_in). ``ranks`` [n, M] holds the rank r_im and ``norms`` [n, M] ‖D_im‖², both 0
    where adapter i lacks module m, and ``weights`` [n, M] the w_im of the objective Σ w_im ‖D_im − D̂_im‖²; the last
    two in float64.
    """

    load: Load
    shapes: list[tuple[int, int]]
    ranks: Tensor
    norms: Tensor
    weights: Tensor
    device: torch.device

    def weighted(self, module: int) -> Stack:
        """√w_im D_im of one module: what a shared basis is fitted to."""
        stack = self.load(module)
        return stack.scaled(self.weights[list(stack.members), module].sqrt())

    def groups(self) -> list[list[int]]:
        """All modules, those together that have one shape and are small enough to be worked on at once.

        This depends on shapes and on the kind of device alone, so that every run works on the same groups.
        """
        budget, most = _AT_ONCE[self.device.type == "cuda"]
        numbers = [rows * sum(shape) for rows, shape in zip(self.ranks.sum(0).tolist(), self.shapes, strict=True)]
        groups: list[list[int]] = []
        room: dict[tuple[int, int], int] = {}  # numbers that still fit into the last group of a shape
        last: dict[tuple[int, int], list[int]] = {}
        for module, (shape, size) in enumerate(zip(self.shapes, numbers, strict=True)):
            if room.get(shape, -1) < size or len(last[shape]) == most:
                last[shape], room[shape] = [], budget
                groups.append(last[shape])
            last[shape].append(module)
            room[shape] -= size
        return groups

    def kept(self, modules: Sequence[int]) -> Updates:
        """Some of the modules, read once and kept in memory."""
        stacks = [self.load(module) for module in modules]
        shapes = [self.shapes[module] for module in modules]

        def load(module: int, members: Sequence[int] | None = None) -> Stack:
            return stacks[module] if members is None else stacks[module].select(set(members))

        ranks, norms, weights = (each[:, modules] for each in (self.ranks, self.norms, self.weights))
        return Updates(load, shapes, ranks, norms, weights, self.device)

    def shares(self, lost: Tensor) -> Tensor:
        """Σ_m lost_im / Σ_m ‖D_im‖², the squared error of every adapter, for ``lost`` [n, …] summed over modules."""
        total = self.norms.sum(1).clamp_min(torch.finfo(torch.float64).tiny)
        return lost / total.reshape(-1, *[1] * (lost.ndim - 1))

    def probes(self, count: int) -> list[int]:
        """At most ``count`` modules that stand for all.

        In order of shape, and of energy among equals, each is the middle one of an equal part of the energy.
        """
        energy = (self.weights * self.norms).sum(0)
        order = sorted(range(len(self.shapes)), key=lambda module: (self.shapes[module], -float(energy[module])))
        reached = energy[order].cumsum(0) / energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        positions = torch.searchsorted(reached, middles).clamp_max(len(order) - 1)
        return [order[position] for position in sorted(set(positions.tolist()))]
