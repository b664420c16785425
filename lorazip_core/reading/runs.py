"""Factors of experts that are interleaved in the files, read for many of them at once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from ..adapter.reader import Adapter

MOST_HELD = 2**28  # bytes of factors at hand, of all threads together
_RUNS = 8  # of each adapter at hand: modules in order of their names, and threads, go back and forth between a few


@dataclass
class _Run:
    """What some experts have in one tensor of one adapter, ``size`` bytes, each in one piece; None until it is read."""

    size: int
    lock: Lock = field(default_factory=Lock)
    data: Tensor | None = None


class ExpertRuns:
    """Reads the tensors that hold all experts whole, and keeps those runs of experts at hand that were used last.

    The bytes of one expert are scattered all over its tensor, so reading it costs as much as reading the tensor. A run
    is as many experts as there is room for in ``most`` bytes if all adapters that are read together, whatever their
    layouts, have theirs.
    """

    def __init__(self, most: int = MOST_HELD) -> None:
        self._most = most
        self._held = 0
        self._lock = Lock()
        self._runs: OrderedDict[tuple[int, str, int, int], _Run] = OrderedDict()

    def read_into(self, adapter: Adapter, number: int, key: str, buffer: memoryview, together: int) -> None:
        """The bytes of the part ``key`` of the adapter of this ``number``, cut out of the tensor that has all of them.

        ``together`` is how many adapters have the part, those of all layouts: one expert of all of them is read before
        the next one.
        """
        cut, size = adapter.layout.cuts[key], len(buffer)
        length = max(1, min(cut.experts, self._most // (_RUNS * together * size)))
        offset = cut.expert % length
        start = cut.expert - offset
        stop = min(start + length, cut.experts)
        run = self._run((number, cut.source, start, stop), (stop - start) * size)
        with run.lock:
            if run.data is None:
                parts = cut.some_of(adapter.tensor(cut.source), start, stop)
                run.data = parts.view(-1).view(torch.uint8)
            buffer[:] = run.data.numpy().data[offset * size : (offset + 1) * size]

    def _run(self, key: tuple[int, str, int, int], size: int) -> _Run:
        """The run of this key, of ``size`` bytes; those that were not used for longest make room for it."""
        with self._lock:
            if key not in self._runs:
                self._runs[key] = _Run(size)
                self._held += size
                while self._held > self._most and len(self._runs) > 1:
                    self._held -= self._runs.popitem(last=False)[1].size
            self._runs.move_to_end(key)
            return self._runs[key]
