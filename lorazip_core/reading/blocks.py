"""Adapters read whole, every file once: in blocks of one layout, each worked on while the next ones are read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..adapter.layout import Layout, Views, deinterleave
from ..adapter.reader import Adapter
from ..base.device import CPU
from ..base.errors import AdapterError
from ..base.progress import Advance
from ..base.threads import cores, delayed, in_order
from ..bundle.manifest import SourceEntry
from ..maths.factored import Factors
from .buffers import PIECE, Buffers, InMemory, Nowhere, Slots
from .contents import Destination, read_contents
from .groups import LayoutGroup
from .placement import Placement

R = TypeVar("R")
Contents = list[SourceEntry] | AdapterError
Stored = Callable[[Sequence[int]], Factors]
"""B [n, m, d_out, r] and A [n, m, r, d_in] of m modules of equal shapes and ranks, given by their columns, as they are
in the files: in their dtype and without the scale."""

_HOST_BYTES = 2**30  # in all buffers together


class Block(NamedTuple):
    """k adapters of one layout, when all their files have been read."""

    group: LayoutGroup
    rows: slice
    """Their positions in the group."""
    data: Tensor | None
    """[k, size] of bytes: their tensors, deinterleaved; None for a single adapter too large for that, whose files have
    them."""
    files: list[Contents]
    """What was read of each, or why its row of ``data`` means nothing."""

    @property
    def adapters(self) -> list[int]:
        """Their numbers."""
        numbers: list[int] = self.group.adapters[self.rows].tolist()
        return numbers

    def stored(self, rows: slice, adapters: Sequence[Adapter]) -> Stored:
        """The factors of some rows of ``data``, which are those ``adapters``."""
        parts, tensors = self.group.parts, self.group.layout.tensors
        if self.data is None:
            (adapter,) = adapters

            def read(columns: Sequence[int]) -> Factors:
                factors = adapter.each_stored(parts[column].module.name for column in columns)
                b, a = (torch.stack(side)[None] for side in zip(*factors, strict=True))
                return b, a

            return read
        infos = [tensors[key] for part in parts for key in (part.key_b, part.key_a)]
        flat = Views(infos, self.group.layout.size).of(self.data[rows])

        def cut(columns: Sequence[int]) -> Factors:
            first = parts[columns[0]]
            b, a = (torch.stack([flat[2 * column + side] for column in columns], 1) for side in (0, 1))
            b = b.view(*b.shape[:2], first.module.d_out, first.rank)
            return b, a.view(*a.shape[:2], first.rank, first.module.d_in)

        return cut


def in_blocks(
    function: Callable[[Block], R],
    adapters: Sequence[Adapter],
    groups: Sequence[LayoutGroup],
    device: torch.device,
    placement: Placement,
    advance: Advance,
    resident: dict[Layout, Tensor] | None = None,
) -> Generator[R, None, None]:
    """``function`` of every block, in order, each adapter of ``groups`` being in one.

    On the host several threads work, each on a block. On a device this one does, and nothing uses the data when
    ``function`` returns, unless it stays in ``resident``: an array [n_l, size] for each layout. ``advance`` is
    called with 1 for each adapter, by this thread.
    """
    if placement.kind == "host":
        return _on_host(function, adapters, groups, placement, advance)
    return _on_device(function, adapters, groups, device, placement, advance, resident)


def _on_host(
    function: Callable[[Block], R],
    adapters: Sequence[Adapter],
    groups: Sequence[LayoutGroup],
    placement: Placement,
    advance: Advance,
) -> Generator[R, None, None]:
    buffers = Buffers(_HOST_BYTES)

    def read(cut: tuple[LayoutGroup, slice]) -> tuple[R, int]:
        with _in_host_memory(*cut, adapters, buffers) as block:
            return function(block), len(block.files)

    cuts = _cuts(groups, min(placement.block_bytes, _HOST_BYTES))
    with closing(in_order(read, cuts, CPU)) as results:
        for result, count in results:
            for _ in range(count):
                advance(1)
            yield result


@contextmanager
def _in_host_memory(group: LayoutGroup, rows: slice, adapters: Sequence[Adapter], buffers: Buffers) -> Iterator[Block]:
    """A block that has been read, for as long as its memory is lent out."""
    own = [adapters[number] for number in group.adapters[rows]]
    size = group.layout.size
    if size > _HOST_BYTES:
        with buffers.lend(PIECE) as piece:
            yield Block(group, rows, None, [_contents(own[0], Nowhere(piece))])
        return
    with buffers.lend(len(own) * size) as memory:
        data = memory.view(len(own), size)
        files = [_contents(adapter, InMemory(row)) for adapter, row in zip(own, data, strict=True)]
        deinterleave(data, group.layout)
        yield Block(group, rows, data, files)


def _on_device(
    function: Callable[[Block], R],
    adapters: Sequence[Adapter],
    groups: Sequence[LayoutGroup],
    device: torch.device,
    placement: Placement,
    advance: Advance,
    resident: dict[Layout, Tensor] | None,
) -> Generator[R, None, None]:
    readers = min(cores(), len(adapters))
    slots = Slots(readers, max(1, min(PIECE, max(group.layout.size for group in groups))), device)

    def read(number: int, row: Tensor) -> Contents:
        with slots.lend() as slot:
            return _contents(adapters[number], slot.towards(row))

    def begun(cut: tuple[LayoutGroup, slice, Tensor]) -> tuple[Block, list[Future[Contents]]]:
        block = Block(*cut, [])
        return block, [pool.submit(read, *each) for each in zip(block.adapters, cut[2], strict=True)]

    ahead = len(adapters) if placement.kind == "resident" else 1
    pool = ThreadPoolExecutor(readers)
    try:
        for block, reading in delayed(map(begun, _on_device_cuts(groups, device, placement, resident)), ahead):
            for future in reading:
                block.files.append(future.result())
                advance(1)
            assert block.data is not None
            deinterleave(block.data, block.group.layout)
            yield function(block)
    finally:
        pool.shutdown(cancel_futures=True)


def _contents(adapter: Adapter, destination: Destination) -> Contents:
    try:
        return read_contents(adapter, destination)
    except AdapterError as error:
        return error


def _on_device_cuts(
    groups: Sequence[LayoutGroup], device: torch.device, placement: Placement, resident: dict[Layout, Tensor] | None
) -> Iterator[tuple[LayoutGroup, slice, Tensor]]:
    """All adapters in cuts, each with memory [k, size] for its data that nothing on the device is using any more.

    Resident data stays in one array a layout. Streamed cuts take turns in two arrays: the one before the last has been
    dealt with when the next one is asked for.
    """
    cuts = _cuts(groups, placement.block_bytes)
    staging: list[Tensor] = []
    if resident is None:
        most = max(group.layout.size * (rows.stop - rows.start) for group, rows in cuts)
        staging = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
    else:
        for group in groups:
            shape = (len(group.adapters), group.layout.size)
            resident[group.layout] = torch.empty(shape, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # readers write on streams of their own
    for turn, (group, rows) in enumerate(cuts):
        if resident is None:
            count, size = rows.stop - rows.start, group.layout.size
            yield group, rows, staging[turn % 2][: count * size].view(count, size)
        else:
            yield group, rows, resident[group.layout][rows]


def _cuts(groups: Sequence[LayoutGroup], most: int) -> list[tuple[LayoutGroup, slice]]:
    """The rows of every block: adapters of one layout that follow each other, of at most ``most`` bytes or a single
    one."""
    cuts = []
    for group in groups:
        count = len(group.adapters)
        step = max(1, min(count, most // max(1, group.layout.size)))
        cuts += [(group, slice(start, min(start + step, count))) for start in range(0, count, step)]
    return cuts
