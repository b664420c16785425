"""The first pass over a collection: every file read once, for its digest and for the energy of every update."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter import TORCH_DTYPES, Adapter, Collection, Layout
from ..bundle import SourceEntry
from ..errors import AdapterError
from ..progress import Advance
from ..workers import in_order
from .buffers import PIECE, Buffers, InMemory, Nowhere, Slot
from .contents import read_contents
from .groups import LayoutGroup, by_layout
from .norms import check, finite_extras, norms_of_adapter, norms_of_rows, tensors_of
from .placement import Placement

Verify = Callable[[Adapter, list[SourceEntry]], None]

_MOST_READERS = 16
_HOST_BYTES = 2**30  # in all buffers together


@dataclass(frozen=True)
class Intake:
    """What is known of n adapters when all bytes have been seen.

    ``norms`` [n, M] holds ‖ΔW_im‖² in float64; adapters in ``errors``, by number, cannot be used. ``resident`` has for
    every layout the data [n_l, size] of its adapters on the device, in their order; None if they did not stay.
    """

    norms: Tensor
    files: list[list[SourceEntry]]
    errors: dict[int, AdapterError] = field(default_factory=dict)
    resident: dict[Layout, Tensor] | None = None


def take_in(
    collection: Collection, device: torch.device, placement: Placement, verify: Verify, advance: Advance
) -> Intake:
    """Read all files of a collection. ``verify`` sees the digests of an adapter first and may refuse it.

    ``advance`` is called with 1 for each adapter, by this thread. Adapters with NaN or Inf, or whose files were cut
    short, are errors.
    """
    adapters = collection.adapters
    intake = Intake(
        torch.zeros(len(adapters), len(collection.modules), dtype=torch.float64),
        [[] for _ in adapters],
        {},
        {} if placement.kind == "resident" else None,
    )
    groups = by_layout(adapters, collection.modules)
    if placement.kind == "host":
        _on_host(intake, adapters, groups, verify, advance)
    else:
        _on_device(intake, adapters, groups, device, placement, verify, advance)
    return intake


def _on_host(
    intake: Intake, adapters: Sequence[Adapter], groups: list[LayoutGroup], verify: Verify, advance: Advance
) -> None:
    """Adapter by adapter in memory, one a thread. One that is too large for that has its tensors read a second time."""
    buffers = Buffers(_HOST_BYTES)
    modules = {number: group.modules for group in groups for number in group.adapters.tolist()}

    def read(number: int) -> tuple[list[SourceEntry], list[float]] | AdapterError:
        adapter = adapters[number]
        whole = adapter.layout.size <= _HOST_BYTES
        try:
            with buffers.lend(adapter.layout.size if whole else PIECE) as data:
                files = read_contents(adapter, InMemory(data) if whole else Nowhere(data))
                verify(adapter, files)
                tensor_of = tensors_of(adapter, data) if whole else adapter.tensor
                norms = norms_of_adapter(adapter.parts, tensor_of)
                check(adapter, norms, tensor_of)
        except AdapterError as error:
            return error
        return files, norms

    with closing(in_order(read, range(len(adapters)), torch.device("cpu"))) as results:
        for number, result in enumerate(results):
            if isinstance(result, AdapterError):
                intake.errors[number] = result
            else:
                intake.files[number], norms = result
                intake.norms[number, modules[number]] = torch.tensor(norms, dtype=torch.float64)
            advance(1)


class _Block(NamedTuple):
    """Some adapters of one layout, in turn, and where their data goes."""

    group: LayoutGroup
    rows: slice
    data: Tensor


def _on_device(
    intake: Intake,
    adapters: Sequence[Adapter],
    groups: list[LayoutGroup],
    device: torch.device,
    placement: Placement,
    verify: Verify,
    advance: Advance,
) -> None:
    """Into arrays on the device: several threads read, this one has the energies computed block by block."""
    readers = min(_MOST_READERS, _cores(), len(adapters))
    size = min(PIECE, max(group.layout.size for group in groups))
    slots: SimpleQueue[Slot] = SimpleQueue()
    for _ in range(readers):
        slots.put(Slot(max(size, 1), device))

    def read(number: int, row: Tensor) -> list[SourceEntry] | AdapterError:
        slot = slots.get()
        try:
            return read_contents(adapters[number], slot.towards(row))
        except AdapterError as error:
            return error
        finally:
            slots.put(slot)

    blocks = _blocks(intake, groups, device, placement)
    ahead = len(adapters) if placement.kind == "resident" else 1
    waiting: deque[tuple[_Block, list[Future[list[SourceEntry] | AdapterError]]]] = deque()
    pool = ThreadPoolExecutor(readers)
    try:
        for block in blocks:
            numbers = block.group.adapters[block.rows].tolist()
            waiting.append((block, [pool.submit(read, *each) for each in zip(numbers, block.data, strict=True)]))
            if len(waiting) > ahead:
                _digest(intake, adapters, *waiting.popleft(), verify, advance)
        while waiting:
            _digest(intake, adapters, *waiting.popleft(), verify, advance)
    finally:
        pool.shutdown(cancel_futures=True)


def _blocks(intake: Intake, groups: list[LayoutGroup], device: torch.device, placement: Placement) -> Iterator[_Block]:
    """All adapters in blocks, each in memory that nothing on the device is using any more.

    Resident data stays in one array a layout. Streamed blocks take turns in two arrays: the one before the last has
    been dealt with when the next one is asked for.
    """
    staging: list[Tensor] = []
    if intake.resident is None:
        sizes = [group.layout.size * min(_rows(group, placement), len(group.adapters)) for group in groups]
        staging = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
    else:
        for group in groups:
            shape = (len(group.adapters), group.layout.size)
            intake.resident[group.layout] = torch.empty(shape, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # readers write on streams of their own
    turn = 0
    for group in groups:
        step = _rows(group, placement)
        for start in range(0, len(group.adapters), step):
            rows = slice(start, min(start + step, len(group.adapters)))
            if intake.resident is None:
                count, size = rows.stop - rows.start, group.layout.size
                data = staging[turn % 2][: count * size].view(count, size)
            else:
                data = intake.resident[group.layout][rows]
            turn += 1
            yield _Block(group, rows, data)


def _rows(group: LayoutGroup, placement: Placement) -> int:
    return max(1, placement.block_bytes // max(1, group.layout.size))


def _digest(
    intake: Intake,
    adapters: Sequence[Adapter],
    block: _Block,
    reading: list[Future[list[SourceEntry] | AdapterError]],
    verify: Verify,
    advance: Advance,
) -> None:
    """Wait for a block and draw its energies from it; nothing uses its data when this returns."""
    numbers = block.group.adapters[block.rows].tolist()
    for number, future in zip(numbers, reading, strict=True):
        try:
            found = future.result()
            if isinstance(found, AdapterError):
                raise found
            verify(adapters[number], found)
            intake.files[number] = found
        except AdapterError as error:
            intake.errors[number] = error
        advance(1)
    norms = norms_of_rows(block.data, block.group, block.rows).cpu()
    keys = list(adapters[numbers[0]].extras)
    unseen = [key for key in keys if block.group.layout.tensors[key].dtype not in TORCH_DTYPES]
    sound = (finite_extras(block.data, block.group, keys).cpu() & norms.isfinite().all(1)).tolist()
    intake.norms[torch.tensor(numbers)[:, None], torch.from_numpy(block.group.modules)] = norms
    for row, number in enumerate(numbers):
        if number not in intake.errors and (unseen or not sound[row]):
            try:
                check(adapters[number], norms[row].tolist(), tensors_of(adapters[number], block.data[row]))
            except AdapterError as error:
                intake.errors[number] = error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
