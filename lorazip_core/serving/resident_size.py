"""How many bytes a device holds of a bundle, counted file by file: never are all adapters in memory at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..base.device import CPU
from ..base.stopping import check_stop
from ..base.threads import in_order
from ..bundle.manifest import AdapterEntry
from ..bundle.reader import Bundle
from ..bundle.stored import check_unpacked
from ..schemes.registry import packed_scheme
from ..schemes.scheme import Size
from .resident import NONE, Resident

_WORKERS = 4  # threads: with more, each waits for others most of the time


class ResidentSize(NamedTuple):
    """What a `Resident` of all adapters would hold."""

    nbytes: int
    """All of it."""
    own_bytes: list[int]
    """What each adapter adds, by row; the rest is shared."""


class _PartSize(NamedTuple):
    """Of adapters of one file that are held together."""

    together: tuple[str, str, int | None, tuple[torch.dtype, ...]]
    """Equal for what is one part of a `Resident`: the module, the scheme, the cluster, and what the tensors are."""
    rows: tuple[int, ...]
    """The adapters, ascending."""
    fixed: int
    """Bytes that are there however many adapters there are."""
    basis: tuple[str, int] | None
    """The module and the cluster whose shared tensors it has."""
    shared: int
    """Bytes of these."""

    @property
    def module(self) -> str:
        return self.together[0]


def resident_size(bundle: Bundle) -> ResidentSize:
    """The bytes of `Resident.of` all adapters of a bundle. Raises as `stored`, and not for what would be too much."""
    by_file: defaultdict[object, list[int]] = defaultdict(list)
    for row, adapter in enumerate(bundle.manifest.adapters):
        file = adapter.individual if adapter.cluster is None else bundle.shard(adapter).path
        by_file[file].append(row)
    own_bytes = [0] * len(bundle.manifest.adapters)
    fixed, shared = dict[object, int](), dict[tuple[str, int], int]()
    rows_of: defaultdict[object, list[int]] = defaultdict(list)
    numbers: dict[tuple[int, ...], int] = {}  # of sets of rows, so that those of all modules take no memory each
    files = in_order(partial(_of_file, bundle), by_file.values(), CPU, workers=_WORKERS)
    with closing(files):
        for rows, (own, parts) in zip(by_file.values(), files, strict=True):
            for row, added in zip(rows, own, strict=True):
                own_bytes[row] = added
            for part in parts:
                fixed[part.together] = part.fixed
                rows_of[part.together].append(numbers.setdefault(part.rows, len(numbers)))
                if part.basis is not None:
                    shared[part.basis] = part.shared
    places = {tuple(sets) for sets in rows_of.values()}  # equal ones are one tensor
    of_places = len(places) * len(own_bytes) * np.dtype(np.int32).itemsize
    return ResidentSize(sum(fixed.values()) + sum(shared.values()) + of_places + sum(own_bytes), own_bytes)


def _of_file(bundle: Bundle, rows: list[int]) -> tuple[list[int], list[_PartSize]]:
    """What each adapter in ``rows`` adds, and the parts that they make."""
    check_stop()
    adapters = [bundle.manifest.adapters[row] for row in rows]
    scheme = packed_scheme(adapters[0].scheme)
    if scheme is None:
        held = Resident.of(bundle, CPU, adapters)
        return held.own_bytes, list(_parts(held, adapters[0].cluster, np.array(rows)))
    of_file = bundle.unpacked_in(str(adapters[0].individual))
    unpacked = {row: of_file[row] for row in rows}
    check_unpacked(bundle, unpacked)
    sizes = [[Size(module.d_out, module.d_in) for module in bundle.modules(adapter)] for adapter in adapters]
    own = [scheme.joined_bytes(unpacked[row].joined, of_row) for row, of_row in zip(rows, sizes, strict=True)]
    return own, list(_parts_of_packed(bundle, adapters, rows))


def _parts(held: Resident, cluster: int | None, rows: NDArray[np.int64]) -> Iterator[_PartSize]:
    """Those of some adapters, which are at ``rows`` of the bundle and of one ``cluster``, or none."""
    for name, module in held.modules.items():
        for part in module.parts:
            own = sum(part.scheme.resident_bytes(part.own, module.size))
            yield _PartSize(
                (name, part.scheme.name, cluster, tuple(tensor.dtype for tensor in part.own.values())),
                tuple(rows[part.places.numpy() != NONE].tolist()),
                sum(tensor.nbytes for tensor in part.own.values()) - own,
                None if cluster is None else (name, cluster),
                sum(tensor.nbytes for tensor in part.shared.values()),
            )


def _parts_of_packed(bundle: Bundle, adapters: list[AdapterEntry], rows: list[int]) -> Iterator[_PartSize]:
    """Those of a file of several: in a module they are one part, and one of them tells what it is like."""
    sets = np.array([adapter.module_set for adapter in adapters])
    first = {adapter.module_set: adapter for adapter in reversed(adapters)}
    modules = {number: {module.name for module in bundle.modules(adapter)} for number, adapter in first.items()}
    for part in _parts(Resident.of(bundle, CPU, list(first.values())), None, np.array(list(first))):
        having = [number for number in first if part.module in modules[number]]
        yield part._replace(rows=tuple(np.array(rows)[np.isin(sets, having)].tolist()))
