"""The updates of one module as a stack: the factors of all its adapters, each copied to where it belongs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..adapter.collection import Collection
from ..maths.stack import ScaledStack, Stack
from .groups import Integers, LayoutGroup, by_layout
from .sources import Pick, Source

# The largest element of A or B, as an exponent of two: outside of it, products of a few factors would leave float32.
_ORDINARY_EXPONENT = 32


class Stacks:
    """The updates of a collection on one device; several threads may load at once."""

    def __init__(self, collection: Collection, device: torch.device, source: Source) -> None:
        self._device = device
        self._source = source
        self._having: defaultdict[int, list[tuple[LayoutGroup, int]]] = defaultdict(list)
        for group in by_layout(collection.adapters, collection.modules):
            for column, module in enumerate(group.modules.tolist()):
                self._having[module].append((group, column))

    def load(self, module: int, adapters: Sequence[int] | None = None, /) -> ScaledStack:
        """The updates of one module, as `Updates.load` has it: float64 where a file has it, else float32.

        On a GPU the stack may be used on the stream that is current in the calling thread, at once.
        """
        wanted = None if adapters is None else np.asarray(adapters, dtype=np.int64)
        picks = []
        having = sum(len(group.adapters) for group, _ in self._having[module])
        for group, column in self._having[module]:
            chosen = np.arange(len(group.adapters)) if wanted is None else _positions(group.adapters, wanted)
            if len(chosen):
                picks.append(Pick(group, column, chosen, having))
        return self._source.stacked(lambda: self._stack(module, picks))

    def _stack(self, module: int, picks: list[Pick]) -> ScaledStack:
        group, column = self._having[module][0]
        d_out, d_in = group.parts[column].module.d_out, group.parts[column].module.d_in
        order = _ordered(picks)
        wide = any(info.dtype == "F64" for pick in picks for info in pick.infos())
        dtype = torch.float64 if wide else torch.float32
        rows = int(order.ranks.sum())
        bt, a = (torch.empty(rows, width, dtype=dtype, device=self._device) for width in (d_out, d_in))
        for pick, (rows_of_rank, places) in zip(picks, order.targets, strict=True):
            r = pick.rank
            bt_r, a_r = bt[rows_of_rank].view(-1, r, d_out), a[rows_of_rank].view(-1, r, d_in)
            for some, own_b, own_a in self._source.factors(pick):
                _put(bt_r, places[some], own_b.reshape(-1, d_out, r).mT)
                _put(a_r, places[some], own_a.reshape(-1, r, d_in))
        stack = Stack.of_rows(bt, a, order.numbers.tolist(), order.ranks.tolist())
        return ScaledStack(stack, torch.from_numpy(order.scales) * _made_ordinary(stack))


class _Ordered(NamedTuple):
    """The n adapters of some picks in the order of a stack, by rank and then by number.

    ``targets`` has for each pick the rows of the stack that adapters of its rank take, and which of these adapters each
    of its own is. Of the pick [3, 8] at rank 2 and the pick [5] at rank 2, beside one of rank 1 with the adapter 4::

        numbers   4   3     5     8
        ranks     1   2     2     2
        rows      0   1 2   3 4   5 6       targets: (1 … 6, [0, 2]), (1 … 6, [1]) and (0, [0])
    """

    numbers: Integers
    ranks: Integers
    scales: NDArray[np.float64]
    targets: list[tuple[slice, Integers]]


def _ordered(picks: list[Pick]) -> _Ordered:
    numbers = _joined([pick.adapters for pick in picks])
    ranks = _joined([np.full(len(pick.chosen), pick.rank) for pick in picks])
    scales = np.concatenate([np.empty(0), *(pick.group.scales[pick.chosen, pick.column] for pick in picks)])
    order = np.lexsort((numbers, ranks))
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    ranks = ranks[order]
    targets = []
    done = 0
    for pick in picks:
        first, last = np.searchsorted(ranks, [pick.rank, pick.rank + 1])
        begin = int(ranks[:first].sum())
        own = position[done : done + len(pick.chosen)]
        targets.append((slice(begin, begin + int(last - first) * pick.rank), own - first))
        done += len(pick.chosen)
    return _Ordered(numbers[order], ranks, scales[order], targets)


def _made_ordinary(stack: Stack) -> Tensor:
    """Scale all factors that are tiny or huge, in place; what to multiply each update by for it, [n] of float64.

    By powers of two, which round nothing: such an adapter is then fitted like any other.
    """
    taken = torch.zeros(len(stack.adapters), dtype=torch.float64)
    if not stack.adapters:
        return torch.ones_like(taken)
    most = round(-math.log2(torch.finfo(stack.a.dtype).tiny))  # so that 2^±most is a normal number
    for rows in (stack.bt, stack.a):
        largest = torch.cat([torch.linalg.vector_norm(part, torch.inf, (1, 2)) for part in stack.parts(rows)])
        exponents = torch.frexp(largest).exponent.clamp(-most, most)
        exponents = exponents.where(exponents.abs() > _ORDINARY_EXPONENT, 0).cpu()
        if exponents.any():
            rows.mul_(stack.per_row(torch.ldexp(torch.ones_like(taken), -exponents).to(rows))[:, None])
            taken += exponents
    return torch.ldexp(torch.ones_like(taken), taken)


def _positions(adapters: Integers, wanted: Integers) -> Integers:
    return np.flatnonzero(np.isin(adapters, wanted, assume_unique=True))


def _joined(arrays: list[Integers]) -> Integers:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _put(target: Tensor, places: Integers, values: Tensor) -> None:
    """``values`` in ``places``, which ascend: as a slice where they have no gap."""
    if places[-1] - places[0] + 1 == len(places):
        target[int(places[0]) : int(places[-1]) + 1].copy_(values)
    else:
        target.index_copy_(0, torch.from_numpy(places).to(target.device), values.to(target.dtype))
