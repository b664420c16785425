"""Bounds on memory: what fits within them, how much is worked on at once, and a refusal when nothing would fit."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from . import team
from .adapter import Collection
from .errors import LocalError
from .packs import CPU_BUDGET, Budget
from .reading import HOST, Placement, place, stays
from .workers import cores

_MOST_ON_GPU = Budget(2**31, 32)  # as much as keeps it busy

# Measured, per number in the factors of a pack: the factors in float32, once as they were read and once in the order of
# the problems, and what the search makes of them.
_CPU_BYTES, _GPU_BYTES = 16, 20
_CORE_BYTES = 4 * 2 * 96**2  # per update: its core, on which the search runs, and the transpose
_WORKER_BYTES = 96 * 2**20  # of what is made for a slice of a pack at a time
_HOST_BYTES_OF_GPU = 5 * 2**29  # CUDA itself, the buffers that files are read into, and results on their way to disk
_ADAPTER_BYTES = 40_000  # names, digests, the lines of a manifest


class Bounds(NamedTuple):
    """Bytes that may be used; None means no bound on the host, and on a GPU what is free there."""

    host: int | None = None
    device: int | None = None


class Room(NamedTuple):
    """How to stay within the bounds: threads, how much is worked on at once, and where tensors are kept."""

    workers: int
    budget: Budget
    placement: Placement


def room(device: torch.device, collection: Collection, bounds: Bounds) -> Room:
    """How to work on a collection. Raises LocalError when its largest module does not fit, before a weight is read."""
    numbers, updates = _largest_module(collection)
    base = anonymous_bytes() + len(collection.adapters) * _ADAPTER_BYTES
    if device.type == "cpu":
        each = _WORKER_BYTES + max(numbers, CPU_BUDGET.numbers) * _CPU_BYTES + updates * _CORE_BYTES
        workers = cores() if bounds.host is None else min(cores(), (bounds.host - base) // each)
        if workers < 1:
            raise _too_little("--memory", bounds.host, base + each)
        return Room(workers, CPU_BUDGET, HOST)
    if bounds.host is not None and bounds.host < base + _HOST_BYTES_OF_GPU:
        raise _too_little("--memory", bounds.host, base + _HOST_BYTES_OF_GPU)
    bound = min(free_bytes(device), bounds.device or free_bytes(device))
    sizes = [adapter.layout.size for adapter in collection.adapters]
    left = bound - (sum(sizes) if stays(sum(sizes), bound) else 0)
    least = numbers * _GPU_BYTES + updates * _CORE_BYTES
    if left < least:
        raise _too_little("--device-memory", bound, least + bound - left)
    most = 2 ** ((left // _GPU_BYTES).bit_length() - 1)
    budget = Budget(min(_MOST_ON_GPU.numbers, most), _MOST_ON_GPU.modules)
    return Room(cores(), budget, place(device, sum(sizes), max(sizes), bound))


def agreed(own: Room) -> Room:
    """The same with the budget that all processes work with, the least of theirs: what is cut by it is dealt out."""
    return own._replace(budget=min(team.gathered(own.budget)))


def _largest_module(collection: Collection) -> tuple[int, int]:
    """Numbers in the factors of all adapters in the module where these are most; and the most updates of a module."""
    numbers: Counter[str] = Counter()
    updates: Counter[str] = Counter()
    kinds = Counter(id(adapter.parts) for adapter in collection.adapters)
    for parts in {id(adapter.parts): adapter.parts for adapter in collection.adapters}.values():
        for name, part in parts.items():
            numbers[name] += part.parameters * kinds[id(parts)]
            updates[name] += kinds[id(parts)]
    return max(numbers.values()), max(updates.values())


def _too_little(option: str, bound: int | None, least: int) -> LocalError:
    return LocalError(
        f"{option}: {_size(bound or 0)} is too little, the largest module of all adapters needs {_size(least)}",
        "allow more, or compress fewer adapters at a time",
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def anonymous_bytes() -> int:
    """The anonymous memory of this process: what no file stands behind. 0 where the kernel does not tell."""
    try:
        told = re.search(r"^RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(told[1]) if told else 0


def _size(size: int) -> str:
    return f"{-(-size // 2**20)} MiB"  # rounded up, so that what is said to be needed is enough
