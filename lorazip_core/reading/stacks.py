"""The updates of one module as a stack: out of the arrays on the device, or of the files, reading just its bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..adapter.collection import Collection
from ..adapter.layout import Layout, TensorInfo, aligned, view
from ..adapter.reader import Adapter
from ..maths.stack import ScaledStack, Stack
from .groups import LayoutGroup, Numbers, by_layout
from .runs import ExpertRuns

_READERS = 16
_CPU_STAGING = 2**25  # bytes of factors as they are in the files, on their way to one stack
_GPU_STAGING = 2**27
# The largest number in A or B, as an exponent of two: outside of it, products of a few factors would leave float32.
_ORDINARY_EXPONENT = 32


class Pick(NamedTuple):
    """One module of some adapters of one layout: its column in the group, and their positions there.

    ``having`` is how many adapters have the module, those of all layouts.
    """

    group: LayoutGroup
    column: int
    chosen: Numbers
    having: int

    @property
    def rank(self) -> int:
        return self.group.parts[self.column].rank

    @property
    def adapters(self) -> Numbers:
        return self.group.adapters[self.chosen]

    def infos(self) -> tuple[TensorInfo, TensorInfo]:
        """Where B and A are."""
        part, tensors = self.group.parts[self.column], self.group.layout.tensors
        return tensors[part.key_b], tensors[part.key_a]


class Factors(NamedTuple):
    """B [k, d_out, r, …] and A [k, r, d_in, …] of some of a pick, in the dtype of the files and without the scale."""

    some: slice
    b: Tensor
    a: Tensor


class Source(Protocol):
    """Where factors come from."""

    def factors(self, pick: Pick) -> Iterator[Factors]:
        """All of a pick, in its order. What was yielded is used up when the next is asked for."""
        ...

    def stacked(self, stack: Callable[[], ScaledStack]) -> ScaledStack:
        """Do ``stack``, which takes factors from here, where and when that can be done."""
        ...


class Stacks:
    """The updates of a collection on one device; several threads may load at once."""

    def __init__(self, collection: Collection, device: torch.device, source: Source) -> None:
        self._device = device
        self._source = source
        self._having: defaultdict[int, list[tuple[LayoutGroup, int]]] = defaultdict(list)
        for group in by_layout(collection.adapters, collection.modules):
            for column, module in enumerate(group.modules.tolist()):
                self._having[module].append((group, column))

    def load(self, module: int, members: Sequence[int] | None = None, /) -> ScaledStack:
        """The updates of one module, as `Updates.load` has it: float64 where a file has it, else float32.

        On a GPU the stack may be used on the stream that is current in the calling thread, at once.
        """
        wanted = None if members is None else np.asarray(members, dtype=np.int64)
        picks = []
        having = sum(len(group.adapters) for group, _ in self._having[module])
        for group, column in self._having[module]:
            chosen = np.arange(len(group.adapters)) if wanted is None else _positions(group.adapters, wanted)
            if len(chosen):
                picks.append(Pick(group, column, chosen, having))
        return self._source.stacked(lambda: self._stack(module, picks))

    def _stack(self, module: int, picks: list[Pick]) -> ScaledStack:
        """The factors of all picks in the order of (rank, number): every one is copied once, to where it belongs."""
        group, column = self._having[module][0]
        target = group.parts[column].module
        numbers = _joined([pick.adapters for pick in picks])
        ranks = _joined([np.full(len(pick.chosen), pick.rank) for pick in picks])
        order = np.lexsort((numbers, ranks))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        ranks = ranks[order]
        rows = int(ranks.sum())
        wide = any(info.dtype == "F64" for pick in picks for info in pick.infos())
        dtype = torch.float64 if wide else torch.float32
        bt, a = (torch.empty(rows, width, dtype=dtype, device=self._device) for width in (target.d_out, target.d_in))
        done = 0
        for pick in picks:
            r = pick.rank
            first, last = np.searchsorted(ranks, [r, r + 1])
            begin = int(ranks[:first].sum())
            of_rank = slice(begin, begin + int(last - first) * r)
            bt_r, a_r = bt[of_rank].view(-1, r, target.d_out), a[of_rank].view(-1, r, target.d_in)
            places = place[done : done + len(pick.chosen)] - first
            for some, own_b, own_a in self._source.factors(pick):
                _put(bt_r, places[some], own_b.reshape(-1, target.d_out, r).mT)
                _put(a_r, places[some], own_a.reshape(-1, r, target.d_in))
            done += len(pick.chosen)
        scales = _joined([pick.group.scales[pick.chosen, pick.column] for pick in picks], np.float64)[order]
        stack = Stack.of_rows(bt, a, numbers[order].tolist(), ranks.tolist())
        return ScaledStack(stack, torch.from_numpy(scales) * _made_ordinary(stack))


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


class Resident:
    """Arrays [n, size] on the device with the data of all adapters of a layout, and which rows are those of its group.

    Everything runs on the stream that is current.
    """

    def __init__(self, data: dict[Layout, Tensor], rows: dict[Layout, Numbers]) -> None:
        self._data = data
        self._rows = rows

    def factors(self, pick: Pick) -> Iterator[Factors]:
        data, rows = self._data[pick.group.layout], self._rows[pick.group.layout][pick.chosen]
        b, a = (_taken(view(data, info), rows) for info in pick.infos())
        yield Factors(slice(0, len(rows)), b, a)

    def stacked(self, stack: Callable[[], ScaledStack]) -> ScaledStack:
        return stack()


class Files:
    """The files themselves: reads of single factors, on a GPU by several threads and through pinned memory."""

    def __init__(self, adapters: Sequence[Adapter], device: torch.device, readers: int | None = None) -> None:
        self._adapters = adapters
        self._device = device
        on_gpu = device.type == "cuda"
        readers = readers or (_READERS if on_gpu else 1)
        self._readers = readers
        self._pool = ThreadPoolExecutor(readers) if readers > 1 else None
        self._one_at_a_time = Lock()
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._halves = [_Half() for _ in range(2)]
        self._runs = ExpertRuns()

    def stacked(self, stack: Callable[[], ScaledStack]) -> ScaledStack:
        """On a GPU: on a stream of its own, so that another thread's computations go on meanwhile."""
        if self._stream is None:
            return stack()
        consumer = torch.cuda.current_stream(self._device)
        with self._one_at_a_time, torch.cuda.stream(self._stream):
            stacked = stack()
            self._stream.synchronize()
        for tensor in (
            stacked.rows.bt,
            stacked.rows.a,
        ):  # freed while the consumer's work is queued, they must not be reused
            tensor.record_stream(consumer)
        return stacked

    def factors(self, pick: Pick) -> Iterator[Factors]:
        spans, size = _spans(pick)
        numbers = pick.adapters.tolist()
        most = _CPU_STAGING if self._stream is None else _GPU_STAGING
        step = max(1, min(len(numbers), most // size))
        buffer = torch.empty(step * size, dtype=torch.uint8) if self._stream is None else None
        info_b, info_a = (info._replace(begin=spans.at[info.begin]) for info in pick.infos())
        for turn, start in enumerate(range(0, len(numbers), step)):
            some = numbers[start : start + step]
            half = self._halves[turn % 2]
            staged = (half.pinned(step * size) if buffer is None else buffer)[: len(some) * size]
            self._read(some, spans, size, staged, pick.having)
            data = staged.view(len(some), size)
            if buffer is None:
                data = half.sent(data, self._device)
            yield Factors(slice(start, start + len(some)), view(data, info_b), view(data, info_a))

    def _read(self, numbers: list[int], spans: _Spans, size: int, staged: Tensor, having: int) -> None:
        """``having`` is that of the pick."""
        buffer = staged.numpy().data

        def read(start: int, stop: int) -> None:
            for row in range(start, stop):
                adapter = self._adapters[numbers[row]]
                for keys, at, count in spans.reads:
                    room = buffer[row * size + at : row * size + at + count]
                    if spans.interleaved == keys:
                        self._runs.read_into(adapter, numbers[row], keys[0], room, having)
                    else:
                        adapter.read_into(keys, room)

        if self._pool is None:
            read(0, len(numbers))
            return
        share = -(-len(numbers) // self._readers)
        starts = range(0, len(numbers), share)
        reading = [self._pool.submit(read, start, min(start + share, len(numbers))) for start in starts]
        wait(reading)
        for each in reading:
            each.result()


class _Half:
    """One of two pieces of pinned memory: while one is on its way to the device, the other is filled."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._sent: torch.cuda.Event | None = None

    def pinned(self, size: int) -> Tensor:
        """``size`` bytes, when what was in them has arrived."""
        if self._sent is not None:
            self._sent.synchronize()
        if self._memory is None or len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._memory

    def sent(self, data: Tensor, device: torch.device) -> Tensor:
        """The same on the device; the copy is under way on the current stream."""
        there = data.to(device, non_blocking=True)
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._sent.record()
        return there


class _Spans(NamedTuple):
    """The reads that bring B and A of one adapter: their names, where the bytes go, and how many they are.

    ``at`` says where the tensor that begins at a byte of the adapter's data ends up, and ``interleaved`` which of the
    reads, if any, is of what lies scattered in the file.
    """

    reads: list[tuple[list[str], int, int]]
    at: dict[int, int]
    interleaved: list[str]


def _spans(pick: Pick) -> tuple[_Spans, int]:
    """One read where B and A are neighbours, as safetensors sorts them; and the bytes in all, a multiple of 64."""
    cuts = pick.group.layout.cuts
    part = pick.group.parts[pick.column]
    infos = sorted(zip(pick.infos(), (part.key_b, part.key_a), strict=True), key=lambda each: each[0].begin)
    (first, key), (second, other) = infos
    if first.file == second.file and first.end == second.begin and key not in cuts:
        whole = first.size_bytes + second.size_bytes
        return _Spans([([key, other], 0, whole)], {first.begin: 0, second.begin: first.size_bytes}, []), aligned(whole)
    gap = aligned(first.size_bytes)
    reads = [([key], 0, first.size_bytes), ([other], gap, second.size_bytes)]
    interleaved = [each for each in (part.key_b,) if each in cuts]
    return _Spans(reads, {first.begin: 0, second.begin: gap}, interleaved), gap + aligned(second.size_bytes)


def _positions(adapters: Numbers, wanted: Numbers) -> Numbers:
    return np.flatnonzero(np.isin(adapters, wanted, assume_unique=True))


def _joined(arrays: list[Numbers], dtype: type = np.int64) -> Numbers:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays])


def _put(target: Tensor, places: Numbers, values: Tensor) -> None:
    """``values`` in ``places``, which ascend: as a slice where they have no gap."""
    if places[-1] - places[0] + 1 == len(places):
        target[int(places[0]) : int(places[-1]) + 1].copy_(values)
    else:
        target.index_copy_(0, torch.from_numpy(places).to(target.device), values.to(target.dtype))


def _taken(rows: Tensor, wanted: Numbers) -> Tensor:
    """Some rows, which ascend: a view where they have no gap."""
    if wanted[-1] - wanted[0] + 1 == len(wanted):
        return rows[int(wanted[0]) : int(wanted[-1]) + 1]
    return rows.index_select(0, torch.from_numpy(wanted).to(rows.device))
