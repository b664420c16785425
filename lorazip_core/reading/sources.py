"""Where the factors of one module come from: the arrays on the device, or the files, reading just its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..adapter.layout import Layout, TensorInfo, aligned, view
from ..adapter.reader import Adapter
from ..base.threads import each_done
from ..maths.stack import ScaledStack
from .groups import Integers, LayoutGroup
from .runs import ExpertRuns

_READERS = 16
_CPU_STAGING = 2**25  # bytes of factors as they are in the files, on their way to one stack
_GPU_STAGING = 2**27


class Pick(NamedTuple):
    """One module of some adapters of one layout: its column in the group, and their positions there.

    ``having`` is how many adapters have the module, those of all layouts.
    """

    group: LayoutGroup
    column: int
    chosen: Integers
    having: int

    @property
    def rank(self) -> int:
        return self.group.parts[self.column].rank

    @property
    def adapters(self) -> Integers:
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


class Resident:
    """Arrays [n, size] on the device with the data of all adapters of a layout, and which rows are those of its group.

    Everything runs on the stream that is current.
    """

    def __init__(self, data: dict[Layout, Tensor], rows: dict[Layout, Integers]) -> None:
        self._data = data
        self._rows = rows

    def rows(self, layout: Layout) -> list[Tensor]:
        """The data [1, size] of each adapter of a layout."""
        data = self._data[layout]
        return [data[row : row + 1] for row in self._rows[layout].tolist()]

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
        self._readers = readers or (_READERS if on_gpu else 1)
        self._pool = ThreadPoolExecutor(self._readers) if self._readers > 1 else None
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
        # Freed while the consumer's work is queued, they must not be used for anything else.
        for tensor in (stacked.rows.bt, stacked.rows.a):
            tensor.record_stream(consumer)
        return stacked

    def factors(self, pick: Pick) -> Iterator[Factors]:
        """Of as many adapters at a time as there is staging memory for."""
        spans = _spans(pick)
        numbers = pick.adapters.tolist()
        most = _CPU_STAGING if self._stream is None else _GPU_STAGING
        step = max(1, min(len(numbers), most // spans.size))
        buffer = torch.empty(step * spans.size, dtype=torch.uint8) if self._stream is None else None
        info_b, info_a = (info._replace(begin=spans.at[info.begin]) for info in pick.infos())
        for turn, start in enumerate(range(0, len(numbers), step)):
            some = numbers[start : start + step]
            half = self._halves[turn % 2]
            memory = half.pinned(step * spans.size) if buffer is None else buffer
            data = memory[: len(some) * spans.size].view(len(some), spans.size)
            self._read(some, spans, data, pick.having)
            if buffer is None:
                data = half.sent(data, self._device)
            yield Factors(slice(start, start + len(some)), view(data, info_b), view(data, info_a))

    def _read(self, numbers: list[int], spans: _Spans, data: Tensor, having: int) -> None:
        """Into ``data`` [k, size] what ``spans`` says of the k adapters of these ``numbers``, a share by each reader.

        ``having`` is that of the pick.
        """
        memory = data.view(-1).numpy().data

        def read(rows: range) -> None:
            for row in rows:
                adapter = self._adapters[numbers[row]]
                for keys, at, count in spans.reads:
                    begin = row * spans.size + at
                    if spans.interleaved == keys:
                        self._runs.read_into(adapter, numbers[row], keys[0], memory[begin : begin + count], having)
                    else:
                        adapter.read_into(keys, memory[begin : begin + count])

        rows = range(len(numbers))
        if self._pool is None:
            read(rows)
        else:
            share = -(-len(rows) // self._readers)
            each_done(self._pool, read, [rows[start : start + share] for start in rows[::share]])


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

    ``size`` is how many bytes they take in all, a multiple of 64. ``at`` says where the tensor that begins at a byte of
    the adapter's data ends up, and ``interleaved`` which of the reads, if any, is of what lies scattered in the file.
    """

    reads: list[tuple[list[str], int, int]]
    size: int
    at: dict[int, int]
    interleaved: list[str]


def _spans(pick: Pick) -> _Spans:
    """One read where B and A are neighbours, as safetensors sorts them, else one of each."""
    cuts = pick.group.layout.cuts
    part = pick.group.parts[pick.column]
    infos = sorted(zip(pick.infos(), (part.key_b, part.key_a), strict=True), key=lambda each: each[0].begin)
    (first, key), (second, other) = infos
    if first.file == second.file and first.end == second.begin and key not in cuts:
        whole = first.size_bytes + second.size_bytes
        at = {first.begin: 0, second.begin: first.size_bytes}
        return _Spans([([key, other], 0, whole)], aligned(whole), at, [])
    gap = aligned(first.size_bytes)
    reads = [([key], 0, first.size_bytes), ([other], gap, second.size_bytes)]
    interleaved = [each for each in (part.key_b,) if each in cuts]
    return _Spans(reads, gap + aligned(second.size_bytes), {first.begin: 0, second.begin: gap}, interleaved)


def _taken(rows: Tensor, wanted: Integers) -> Tensor:
    """Some rows, which ascend: a view where they have no gap."""
    if wanted[-1] - wanted[0] + 1 == len(wanted):
        return rows[int(wanted[0]) : int(wanted[-1]) + 1]
    return rows.index_select(0, torch.from_numpy(wanted).to(rows.device))
