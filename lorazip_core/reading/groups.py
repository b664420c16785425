"""The adapters of a collection by layout: all that is needed to find a module of many of them at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..adapter.layout import Layout
from ..adapter.module import Module, Part
from ..adapter.reader import Adapter

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class LayoutGroup:
    """n_l adapters of one layout. They have the same p modules at the same ranks, and may differ in their scales."""

    layout: Layout
    parts: tuple[Part, ...]
    """The modules of the first adapter, in order; the scales are its own."""
    modules: Integers
    """[p]: the number of each in the collection."""
    adapters: Integers
    """[n_l], ascending: their numbers in the collection."""
    scales: NDArray[np.float64]
    """[n_l, p]: the factor that belongs to B A."""


def by_layout(adapters: Sequence[Adapter], modules: Sequence[Module]) -> list[LayoutGroup]:
    """The groups of a collection, in the order of their first adapters."""
    numbers = {module.name: number for number, module in enumerate(modules)}
    of_layout: defaultdict[Layout, list[int]] = defaultdict(list)
    for number, adapter in enumerate(adapters):
        of_layout[adapter.layout].append(number)
    groups = []
    for layout, own in of_layout.items():
        kinds = {id(adapters[number].parts): adapters[number].parts for number in own}
        scales = {kind: [part.scale for part in parts.values()] for kind, parts in kinds.items()}
        parts = adapters[own[0]].parts
        groups.append(
            LayoutGroup(
                layout,
                tuple(parts.values()),
                np.array([numbers[name] for name in parts], dtype=np.int64),
                np.array(own, dtype=np.int64),
                np.array([scales[id(adapters[number].parts)] for number in own], dtype=np.float64),
            )
        )
    return groups
