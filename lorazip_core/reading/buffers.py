"""Memory that files are read into: a bounded amount, whatever the size of the collection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from threading import Condition

import torch
from torch import Tensor

PIECE = 2**26  # bytes; small pieces make the readers wait for each other, larger ones gain nothing


class Buffers:
    """Host memory of at most ``most`` bytes in all, lent out and used again."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._free: list[Tensor] = []
        self._changed = Condition()

    @contextmanager
    def lend(self, size: int) -> Iterator[Tensor]:
        """``size`` ≤ ``most`` bytes, as soon as others have given back enough."""
        with self._changed:
            self._changed.wait_for(lambda: self._held - sum(map(len, self._free)) + size <= self._most)
            buffer = self._take(size)
        try:
            yield buffer[:size]
        finally:
            with self._changed:
                self._free.append(buffer)
                self._changed.notify_all()

    def _take(self, size: int) -> Tensor:
        fitting = [number for number, buffer in enumerate(self._free) if len(buffer) >= size]
        if fitting:
            return self._free.pop(min(fitting, key=lambda number: len(self._free[number])))
        while self._free and self._held + size > self._most:
            self._held -= len(self._free.pop())
        self._held += size
        return torch.empty(size, dtype=torch.uint8)


class InMemory:
    """A destination in host memory that holds the whole data of an adapter."""

    piece = PIECE

    def __init__(self, data: Tensor) -> None:
        self._bytes = data.numpy().data

    def memory_for(self, begin: int, size: int) -> memoryview:
        return self._bytes[begin : begin + size]

    def arrived(self, begin: int, size: int) -> None:
        pass

    def wait_until_free(self) -> None:
        pass


class Nowhere(InMemory):
    """A destination for bytes of which only the digest is wanted; ``data`` holds one piece."""

    def memory_for(self, begin: int, size: int) -> memoryview:
        return self._bytes[:size]


class Slots:
    """A piece of host memory for each of several readers, lent out and used again."""

    def __init__(self, readers: int, size: int, device: torch.device) -> None:
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(readers):
            self._free.put(Slot(size, device))

    @contextmanager
    def lend(self) -> Iterator[Slot]:
        slot = self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)


class Slot:
    """Host memory of one reader, from which its pieces go to the device on a stream of their own."""

    def __init__(self, size: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.piece = size
        self._data = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        self._bytes = self._data.numpy().data
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._row = self._data

    def towards(self, row: Tensor) -> Slot:
        """The slot, as the destination of the adapter whose data ``row`` [size] is to hold."""
        self._row = row
        return self

    def memory_for(self, begin: int, size: int) -> memoryview:
        return self._bytes[:size]

    def arrived(self, begin: int, size: int) -> None:
        on_stream: AbstractContextManager[object] = torch.cuda.stream(self._stream) if self._stream else nullcontext()
        with on_stream:
            self._row[begin : begin + size].copy_(self._data[:size], non_blocking=True)

    def wait_until_free(self) -> None:
        if self._stream:
            self._stream.synchronize()
