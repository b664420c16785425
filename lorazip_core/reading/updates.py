"""The updates of a whole collection, read module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..maths.factored import TINY
from ..maths.stack import ScaledStack
from .packs import CPU_BUDGET, Budget, Problem, cut_into_packs


class Load(Protocol):
    """Reads the updates of one module: of all adapters that have it, or of those among ``adapters``, which ascend."""

    def __call__(self, module: int, adapters: Sequence[int] | None = None, /) -> ScaledStack: ...


@dataclass(frozen=True)
class Updates:
    """n adapters and M modules, both by number.

    ``load(m)`` reads the updates D_im of module m, unrounded, of the adapters that have it, ``load(m, adapters)`` those
    of some of them; ``shapes`` has its (d_out, d_in). ``ranks`` [n, M] holds the rank r_im and ``norms`` [n, M]
    ‖D_im‖², both 0 where adapter i lacks module m, and ``weights`` [n, M] the w_im of the objective
    Σ w_im ‖D_im − D̂_im‖²; the last two in float64. ``budget`` says how much is worked on at once, and ``quick``
    whether a load costs next to nothing.
    """

    load: Load
    shapes: list[tuple[int, int]]
    ranks: Tensor
    norms: Tensor
    weights: Tensor
    device: torch.device
    budget: Budget = CPU_BUDGET
    quick: bool = True

    def modules_at_once(self, columns: int) -> list[list[int]]:
        """All modules, those together that have one shape and fit the budget together.

        Each with bases of so many ``columns`` besides, on both sides.
        """
        sizes = {
            problem: size + columns * sum(self.shapes[problem.module])
            for problem, size in self.sizes([0] * len(self.ranks)).items()
        }
        return [[module for _, module in pack] for pack in cut_into_packs(sizes, self.shapes, self.budget)]

    def sizes(self, labels: Sequence[int | None]) -> dict[Problem, int]:
        """The elements in the factors of every problem: Σ r_i · (d_out + d_in); no entry where nobody has the module.

        ``labels`` [n] are the clusters of the adapters, None for those in no cluster.
        """
        shared = torch.tensor([i for i, label in enumerate(labels) if label is not None], dtype=torch.int64)
        clusters = torch.tensor([label for label in labels if label is not None], dtype=torch.int64)
        count = int(clusters.max()) + 1 if len(clusters) else 0
        rows = torch.zeros(count, self.ranks.shape[1], dtype=torch.int64).index_add_(0, clusters, self.ranks[shared])
        widths = torch.tensor([d_out + d_in for d_out, d_in in self.shapes], dtype=torch.int64)
        return {
            Problem(cluster, module): int(rows[cluster, module] * widths[module])
            for cluster, module in rows.nonzero().tolist()
        }

    def kept(self, modules: Sequence[int]) -> Updates:
        """Some of the modules, read once and kept in memory."""
        stacks = [self.load(module) for module in modules]
        shapes = [self.shapes[module] for module in modules]

        def load(module: int, adapters: Sequence[int] | None = None) -> ScaledStack:
            return stacks[module] if adapters is None else stacks[module].select(set(adapters))

        ranks, norms, weights = (each[:, modules] for each in (self.ranks, self.norms, self.weights))
        return Updates(load, shapes, ranks, norms, weights, self.device, self.budget)

    def shares(self, lost: Tensor) -> Tensor:
        """Σ_m lost_im / Σ_m ‖D_im‖², the squared error of every adapter, for ``lost`` [n, …] summed over modules."""
        total = self.norms.sum(1).clamp_min(TINY)
        return lost / total.reshape(-1, *[1] * (lost.ndim - 1))

    def probes(self, count: int) -> list[int]:
        """At most ``count`` modules that stand for all.

        In order of shape, and of energy among equals, each is the middle one of an equal part of the energy.
        """
        energy = (self.weights * self.norms).sum(0)
        order = sorted(range(len(self.shapes)), key=lambda module: (self.shapes[module], -float(energy[module])))
        reached = energy[order].cumsum(0) / energy.sum().clamp_min(TINY)
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        positions = torch.searchsorted(reached, middles).clamp_max(len(order) - 1)
        return [order[position] for position in sorted(set(positions.tolist()))]
