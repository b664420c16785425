"""Bounds on memory: what fits within them, how much is worked on at once, and a refusal when nothing would fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..adapter.collection import Collection
from ..adapter.reader import distinct_parts
from ..base.device import free_bytes, limit_memory
from ..base.errors import LocalError
from ..base.threads import at_most, cores, one_thread
from ..schemes.registry import SCHEMES, shared_scheme
from ..schemes.scheme import PackSize, SharedScheme, Size
from .packs import CPU_BUDGET, Budget, Problem, cut_into_packs
from .placement import HOST, Placement, choose_placement, fits_to_stay
from .runs import MOST_HELD

_MOST_ON_GPU = Budget(2**31, 32)  # as much as keeps it busy
_LEAST_OF_AUTO = 8  # adapters in a cluster, on average: smaller ones are hardly ever worth their bases

# Bytes, measured, and each an upper bound. Of a pack, per element of its factors: these as they were read and in the
# order of the problems, in float32, and what turns a part of them to float64; with `diag` all of them in float64.
_CPU_BYTES, _GPU_BYTES = 16, 20
_WIDE_BYTES = 12  # more where some factors of a pack are F64: what was read, and what errors are computed from
_AHEAD_BYTES = 4  # of the next pack, which is loaded meanwhile where tensors do not stay on the GPU
_COLUMN_BYTES = 32  # per element of a basis: in float32, and on its way to be orthonormal in float64
_ALONE_BYTES = 48  # per element of an adapter on its own: as it was read, and decomposed in float64
_WORKER_BYTES = 96 * 2**20  # of what is made for a slice of a pack at a time
_HOST_BYTES_OF_GPU = 5 * 2**29  # CUDA itself, the buffers that files are read into, and results on their way to disk
_ADAPTER_BYTES = 40_000  # names, digests, the lines of a manifest
_PROCESS_BYTES = 16 * 2**20  # by which processes differ before they do anything
_FIXED_BYTES = 64 * 2**20  # libraries at work, files on their way to disk


PROBES = 4
"""Modules on which partitions into clusters are tried, kept in memory."""
COMPARED = 2048
"""Adapters, at the most, of which every two are compared for the first medoids."""


class Bounds(NamedTuple):
    """Bytes that may be used; None means no bound on the host, and on a GPU what is free there."""

    host: int | None = None
    device: int | None = None


class Task(NamedTuple):
    """What memory depends on besides the collection.

    ``clusters`` is how many there may be, and ``sought`` whether it is still to be found who is in which.
    """

    method: str
    rank: int
    clusters: int
    sought: bool

    @classmethod
    def of(cls, method: str, rank: int, clusters: object, adapters: int) -> Task:
        """For what ``clusters`` says: a number, ``auto``, or a file."""
        if isinstance(clusters, int):
            return cls(method, rank, clusters, clusters > 1)
        sought = clusters == "auto"
        return cls(method, rank, -(-adapters // _LEAST_OF_AUTO) if sought else adapters, sought)


class HostBytes(NamedTuple):
    """Main memory that a run takes, in bytes, each an upper bound: what it always holds, and each worker beside it."""

    always: int
    worker: int


class WorkPlan(NamedTuple):
    """How to work within the bounds: threads, how much is worked on at once, and where tensors are kept."""

    workers: int
    budget: Budget
    placement: Placement


def fit_into_memory(device: torch.device, collection: Collection, task: Task, bounds: Bounds) -> WorkPlan:
    """How to work on a collection. Raises LocalError when its largest module does not fit, before a weight is read."""
    base, each = host_bytes(device, collection, task)
    if device.type == "cpu":
        workers = cores() if bounds.host is None else min(cores(), (bounds.host - base) // each)
        if workers < 1:
            raise _too_little("«memory»", bounds.host, base + each)
        return WorkPlan(workers, CPU_BUDGET, HOST)
    if bounds.host is not None and bounds.host < base + each:
        raise _too_little("«memory»", bounds.host, base + each)
    bound = min(free_bytes(device), bounds.device or free_bytes(device))
    sizes = [adapter.layout.size for adapter in collection.adapters]
    resident = fits_to_stay(sum(sizes), bound)
    left = bound - (sum(sizes) if resident else 0)
    wide = bool(_wide(collection))
    each_element = _GPU_BYTES + _WIDE_BYTES if wide else _GPU_BYTES
    if not resident:
        each_element += 2 * _AHEAD_BYTES if wide else _AHEAD_BYTES
    elements, updates = _counts(collection)
    least = max(elements.values()) * each_element + max(updates.values()) * _of_update(task)
    if left < least:
        raise _too_little("«device_memory»", bound, least + bound - left)
    most = 2 ** ((left // each_element).bit_length() - 1)
    budget = Budget(min(_MOST_ON_GPU.elements, most), _MOST_ON_GPU.modules)
    return WorkPlan(cores(), budget, choose_placement(device, sum(sizes), max(sizes), bound))


@contextmanager
def working_within(device: torch.device, collection: Collection, task: Task, bounds: Bounds) -> Iterator[WorkPlan]:
    """Work in the block as `fit_into_memory` says, on threads of one core each, and with what a GPU may give."""
    plan = fit_into_memory(device, collection, task, bounds)
    limit_memory(device, bounds.device)
    with at_most(plan.workers), one_thread():
        yield plan


def _of_update(task: Task) -> int:
    """What an update takes on a GPU besides its factors."""
    scheme = SCHEMES[task.method]
    return scheme.working_bytes_of_update(task.rank) if isinstance(scheme, SharedScheme) else 0


def host_bytes(device: torch.device, collection: Collection, task: Task) -> HostBytes:
    """What a run takes of main memory. On a CPU every core has a worker, on a GPU there is one."""
    base = anonymous_bytes() + _whole_bytes(collection, task)
    return HostBytes(base, _worker_bytes(collection, task) if device.type == "cpu" else _HOST_BYTES_OF_GPU)


def planned_bytes(device: torch.device, collection: Collection, task: Task) -> tuple[int, int]:
    """The main memory that a run takes here at the most without ``memory``, and the least that ``memory`` may be.

    Rounded up to MiB, as people would give them, with some MiB more for what another process holds of its libraries.
    """
    always, worker = host_bytes(device, collection, task)
    always += _PROCESS_BYTES
    workers = cores() if device.type == "cpu" else 1
    most, least = (-(-size // 2**20) * 2**20 for size in (always + workers * worker, always + worker))
    return most, least


def _whole_bytes(collection: Collection, task: Task) -> int:
    """What one run holds, however many workers there are."""
    n = len(collection.adapters)
    size = _FIXED_BYTES + n * _ADAPTER_BYTES
    if SCHEMES[task.method].shared:
        size += min(MOST_HELD, sum(adapter.layout.interleaved_bytes for adapter in collection.adapters))
    if not task.sought:
        return size
    elements, _ = _counts(collection)
    probes = sum(sorted(elements.values())[-PROBES:]) * 4
    pairs = min(n, COMPARED) ** 2 * 8 * 8
    bases = sum(task.clusters * min(task.rank, side) * side for m in collection.modules for side in (m.d_out, m.d_in))
    return size + probes + pairs + 4 * bases + n * task.clusters * 8 * 8


def _worker_bytes(collection: Collection, task: Task) -> int:
    """What a worker needs for the pack that takes most, or the adapter that it decomposes on its own."""
    alone = (
        max(sum(part.parameters for part in parts.values()) for parts, _ in distinct_parts(collection.adapters))
        * _ALONE_BYTES
    )
    if not SCHEMES[task.method].shared:
        return _WORKER_BYTES + alone
    elements, updates = _counts(collection)
    shapes = [(module.d_out, module.d_in) for module in collection.modules]
    sizes = {Problem(0, number): elements[module.name] for number, module in enumerate(collection.modules)}
    wide = _wide(collection)
    most = 0
    for pack in cut_into_packs(sizes, shapes, CPU_BUDGET):
        names = [collection.modules[module].name for _, module in pack]
        own, count = sum(elements[name] for name in names), sum(updates[name] for name in names)
        more = 0 if wide.isdisjoint(names) else own * _WIDE_BYTES
        size = PackSize(own, count, len(pack) * task.clusters, Size(*shapes[pack[0].module]))
        most = max(most, _pack_bytes(size, task) + more)
    return _WORKER_BYTES + max(most + _source_bytes(collection), alone)


def _pack_bytes(pack: PackSize, task: Task) -> int:
    """What a pack takes, if it is not split between clusters."""
    solved = shared_scheme(task.method).working_bytes(pack, task.rank)
    if not task.sought:
        return solved
    longest = max(pack.size)
    climbed = pack.problems * longest * min(3 * task.rank, longest) * _COLUMN_BYTES
    return max(solved, pack.elements * _CPU_BYTES + climbed)


def _source_bytes(collection: Collection) -> int:
    """What a worker holds to read an expert: the largest tensor that has all of them, and its parts, transposed."""
    layouts = {id(adapter.layout): adapter.layout for adapter in collection.adapters}.values()
    sizes = (layout.tensors[cut.source].size_bytes for layout in layouts for cut in layout.interleaved)
    return 2 * max(sizes, default=0)


def _wide(collection: Collection) -> set[str]:
    """The modules of which some adapter has a factor in F64: their stacks are float64."""
    kinds = {(id(adapter.parts), id(adapter.layout)): adapter for adapter in collection.adapters}
    return {
        name
        for adapter in kinds.values()
        for name, part in adapter.parts.items()
        if any(adapter.layout.tensors[key].dtype == "F64" for key in (part.key_b, part.key_a))
    }


def _counts(collection: Collection) -> tuple[Counter[str], Counter[str]]:
    """Elements in the factors of all adapters in every module, and its updates."""
    elements: Counter[str] = Counter()
    updates: Counter[str] = Counter()
    for parts, count in distinct_parts(collection.adapters):
        for name, part in parts.items():
            elements[name] += part.parameters * count
            updates[name] += count
    return elements, updates


def _too_little(name: str, bound: int | None, least: int) -> LocalError:
    return LocalError(
        f"{name}: {_size(bound or 0)} is too little, {_size(least)} is the least that this takes",
        "allow more, or compress fewer adapters at a time",
    )


def anonymous_bytes() -> int:
    """The anonymous memory of this process: what no file stands behind. 0 where the kernel does not tell."""
    try:
        told = re.search(r"^RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(told[1]) if told else 0


def _size(size: int) -> str:
    return f"{-(-size // 2**20)} MiB"  # rounded up, so that what is said to be needed is enough
