"""The singular components of all modules of an adapter, and which of them to keep: ranks that follow the spectrum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Component(NamedTuple):
    """A singular component of a module."""

    module: str
    place: int
    """0 for the largest of its module, and so on."""
    cost: int
    """The elements that it takes: d_out + d_in."""
    energy: float
    """s²"""


@dataclass(frozen=True)
class Spectrum:
    """The largest components of the modules, all of which are kept; then the others, by what an element is worth."""

    components: list[Component]
    modules: int

    @classmethod
    def of(cls, components: Iterable[Component]) -> Spectrum:
        """In that order; of equal ones by name."""
        ordered = sorted(
            components, key=lambda each: (each.place > 0, -each.energy / each.cost, each.module, each.place)
        )
        return cls(ordered, sum(each.place == 0 for each in ordered))

    def ranks(self, count: int) -> dict[str, int]:
        """The rank of every module where the first ``count`` components are kept."""
        return dict(Counter(each.module for each in self.components[:count]))

    def fewest(self, limit: float) -> int:
        """The least number of components without which no more energy than ``limit`` is lost, before rounding."""
        lost = accumulate((each.energy for each in reversed(self.components)), initial=0.0)
        dropped = sum(energy <= limit for energy in lost) - 1
        return max(self.modules, len(self.components) - dropped)

    def ranks_worth(self, step: float) -> dict[str, int]:
        """Ranks that keep the components whose energy is that of ``step`` in every element."""
        worth = [each for each in self.components[self.modules :] if each.energy >= each.cost * step**2]
        return self.ranks(self.modules + len(worth))

    def ranks_within(self, rank: int) -> dict[str, int]:
        """Ranks that take no more elements than ``rank`` in all modules would, and lose no more."""
        alike = [each for each in self.components if each.place < rank]
        left = sum(each.cost for each in alike)
        kept = []
        for each in self.components:
            if each.cost <= left:
                left -= each.cost
                kept.append(each)
        best = max(alike, kept, key=lambda some: sum(each.energy for each in some))
        return dict(Counter(each.module for each in best))
