"""Where the adapters of several problems lie, in chunks of equal size, and sums over the chunks of each problem.

A *problem* is one module for the adapters of one cluster. Seven adapters of two problems, in chunks of two places::

    problem of each adapter    0  0  1  0  1  1  1
    place of each adapter      0  1  4  2  5  6  7

    places     0 1   2 3   4 5   6 7      place 3 stays empty: all that is there is zero
    adapters   0 1   3 –   2 4   5 6
    chunk       0     1     2     3
    problem     0     0     1     1       lengths 2, 2

So a step of all fits is a few batched products over chunks, and sums over the adapters of a problem are sums over its
chunks in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.device import CPU
from ..base.stopping import check_stop

ELEMENTS_AT_ONCE = {"cpu": 2**21, "cuda": 2**27}  # in what a step makes besides its result, at the most
_MOST_IN_CHUNK = 64  # adapters: what a large problem makes on the way is made for some of its chunks at a time
_PADDING = 1.25  # times the places that are needed, at the most, for chunks as large as that allows


@dataclass(frozen=True)
class Chunks:
    """The N chunks of P problems, each of ``size`` places; a place is a number out of 0 … N · size − 1."""

    size: int
    problems: Tensor  # [N]: the problem of every chunk, ascending
    lengths: Tensor  # [P]: the number of chunks of every problem
    places: Tensor  # [adapters]: the place of every adapter
    one_each: bool  # whether chunk p is all of problem p

    @classmethod
    def of_problems(cls, problems: Tensor, count: int) -> Chunks:
        """Chunks, on the CPU, for adapters that belong to ``problems`` [adapters] out of ``count``."""
        sizes = torch.bincount(problems, minlength=count)
        size = _chunk_size(sizes)
        lengths = -(-sizes // size)
        order = problems.argsort(stable=True)
        first_adapter, first_chunk = (each.cumsum(0) - each for each in (sizes, lengths))  # of every problem
        within = torch.arange(len(problems)) - first_adapter[problems[order]]
        places = torch.empty_like(problems)
        places[order] = first_chunk[problems[order]] * size + within
        return cls._of(size, torch.repeat_interleave(torch.arange(count), lengths), lengths, places)

    @classmethod
    def _of(cls, size: int, problems: Tensor, lengths: Tensor, places: Tensor) -> Chunks:
        one_each = len(problems) == len(lengths) and bool((lengths == 1).all())
        return cls(size, problems, lengths, places, one_each)

    @property
    def all_places(self) -> int:
        """How many places there are: N · size."""
        return len(self.problems) * self.size

    def to(self, device: torch.device) -> Chunks:
        problems, lengths, places = (each.to(device) for each in (self.problems, self.lengths, self.places))
        return Chunks(self.size, problems, lengths, places, self.one_each)

    def select(self, problems: Tensor) -> tuple[Chunks, Tensor]:
        """The chunks, on the CPU, of some problems [P'], ascending and numbered anew; and which chunks [N] these are.

        Adapters keep their order, and a chunk its adapters.
        """
        own = self.to(CPU)
        number = renumbered(problems, len(own.lengths))[own.problems]
        staying = number >= 0
        chunk, within = own.places // own.size, own.places % own.size
        places = (staying.cumsum(0) - 1)[chunk] * own.size + within
        lengths = torch.bincount(number[staying], minlength=len(problems))
        return self._of(own.size, number[staying], lengths, places[staying[chunk]]), staying

    def spread(self, x: Tensor) -> Tensor:
        """What each problem has, x [P, ...], for each of its chunks, [N, ...]."""
        return x if self.one_each else x[self.problems]

    def total(self, x: Tensor) -> Tensor:
        """The sum over the chunks of each problem of x [N, ...], as [P, ...]; always in one order."""
        if self.one_each:
            return x
        if x.device.type == "cpu":
            return x.new_zeros(len(self.lengths), *x.shape[1:]).index_add_(0, self.problems, x)
        return torch.segment_reduce(x, "sum", lengths=self.lengths, axis=0, initial=0, unsafe=True)

    def total_of(self, make: Callable[[slice], Tensor], step: int) -> Tensor:
        """`total` of what ``make`` gives for a slice of the chunks, [N', ...], made for ``step`` chunks at a time."""
        count = len(self.problems)
        if step >= count:
            return self.total(make(slice(0, count)))

        def made_of(some: slice) -> tuple[slice, Tensor]:
            check_stop()
            return some, make(some)

        pieces = map(made_of, (slice(start, start + step) for start in range(0, count, step)))
        if self.problems.device.type != "cpu":
            return self.total(torch.cat([made for _, made in pieces]))
        sums: Tensor | None = None
        for some, made in pieces:  # in the order of `total`
            sums = made.new_zeros(len(self.lengths), *made.shape[1:]) if sums is None else sums
            sums.index_add_(0, self.problems[some], made)
        assert sums is not None
        return sums


def renumbered(chosen: Tensor, count: int) -> Tensor:
    """The new number [count] of everything: its position in ``chosen``, or −1 for what is not there."""
    number = torch.full((count,), -1)
    number[chosen] = torch.arange(len(chosen))
    return number


def _chunk_size(sizes: Tensor) -> int:
    """The largest chunk, halved as often as it takes for problems of ``sizes`` [P] to leave few places empty."""
    size = max(1, min(_MOST_IN_CHUNK, int(sizes.max())))
    while size > 1 and int((-(-sizes // size)).sum()) * size > _PADDING * int(sizes.sum()):
        size = -(-size // 2)
    return size
