"""Which tokens of a batch are worked on together: some of one group are a tile.

What kernels need of a batch is one array of int32, so that one copy takes it to a device. It begins, for each kind of
adapter, with `HEAD` numbers: how many tiles there are, and where in the array there are, for each tile, the first of
its places, how many places, and the group; for each place, the token; and, for each place, the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FEW = 512
"""A batch of more tokens has wide tiles."""
WIDE = 64
"""The most tokens of a tile of a batch of many tokens."""
HEAD = 4
FIELDS = 3
"""Of a tile: first place, places, group."""

Ints = NDArray[np.int32]


class Grouped(NamedTuple):
    """Tokens of one kind of adapter."""

    group: Ints
    """[t]: what the token's tile has in common, or −1 for a token that is not of this kind"""
    adapter: Ints
    """[t]"""
    narrow: int
    """The most tokens of a tile of a batch of few."""


def batch(kinds: Sequence[Grouped]) -> Ints:
    """The array of a batch."""
    parts: list[Ints] = []
    head = np.zeros(HEAD * len(kinds), np.int32)
    size = len(head)
    for number, kind in enumerate(kinds):
        tokens = np.flatnonzero(kind.group >= 0)
        tokens = tokens[np.argsort(kind.group[tokens], kind="stable")]
        tiles = _tiles(kind.group[tokens], WIDE if len(kind.group) > FEW else kind.narrow)
        own: list[Ints] = [tiles.ravel(), tokens.astype(np.int32), kind.adapter[tokens]]
        ends = size + np.cumsum([len(part) for part in own])
        head[HEAD * number : HEAD * (number + 1)] = [len(tiles), size, *ends[:2]]
        parts += own
        size = int(ends[2])
    return np.concatenate([head, *parts], dtype=np.int32)


def _tiles(groups: Ints, width: int) -> Ints:
    """[n, 3] for the places of ``groups``, which ascend."""
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    counts = np.diff(first, append=len(groups))
    of_each = -(-counts // width)
    group = np.repeat(np.arange(len(first)), of_each)
    within = np.arange(len(group)) - np.repeat(np.cumsum(of_each) - of_each, of_each)
    begin = first[group] + width * within
    return np.stack([begin, np.minimum(width, counts[group] - width * within), groups[first[group]]], 1).astype(
        np.int32
    )


def most_tiles(tokens: int, groups: int, narrow: int) -> int:
    """How many tiles there can be of so many tokens, some of which may be padding, and so many groups."""
    return min(tokens, max(-(-tokens // WIDE), -(-min(tokens, FEW) // narrow)) + groups)


def most_ints(tokens: int, kinds: int) -> int:
    """How long the array of a batch can be."""
    return kinds * (HEAD + (FIELDS + 2) * tokens)
