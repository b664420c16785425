"""The first pass over the weights: digests, also against a lock, NaN and Inf, and the energy of every update."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..adapter.collection import Collection
from ..adapter.layout import Layout
from ..adapter.lock import LOCK_NAME, LockedAdapter, Origin, read_lock
from ..adapter.reader import Adapter
from ..base.device import CPU
from ..base.digests import canonical_json, sha256_bytes
from ..base.errors import AdapterError, AdapterErrors
from ..base.progress import Advance, Progress
from ..bundle.manifest import SourceEntry, Weights
from ..maths.factored import TINY
from .first_pass import FirstPass, read_all
from .groups import Integers, by_layout
from .memory import WorkPlan
from .packs import CPU_BUDGET, Budget
from .placement import HOST, Placement
from .sources import Files, Resident
from .stacks import Stacks
from .updates import Updates

Stamps = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Scan:
    """A collection whose tensors are all finite, with ‖ΔW_im‖² [n, M] in float64 and, by adapter, the source files."""

    collection: Collection
    norms: Tensor
    files: list[list[SourceEntry]]
    origins: list[Origin | None]
    """Where the lock of the collection says that each adapter comes from; None for those that it does not name."""
    device: torch.device
    resident: Resident | None
    """The tensors, where they stayed on the device."""
    stamps: list[Stamps]
    """What the weight files of every adapter looked like before they were read."""
    singular: list[Tensor] | None = None
    """If wanted, the singular values of each adapter [Σ r] in float64: of its modules, in order, one after another."""

    def updates(self, per: Weights, device: torch.device, budget: Budget = CPU_BUDGET) -> Updates:
        """The collection's updates, weighted by w_im = 1/Σ_m‖ΔW_im‖², or per module by 1/‖ΔW_im‖²; 0 for zero ones."""
        resident = self.resident if device == self.device else None
        stacks = Stacks(self.collection, device, resident or Files(self.collection.adapters, device))
        energy = self.norms.sum(1, keepdim=True).expand_as(self.norms) if per == "adapter" else self.norms
        shapes = [(module.d_out, module.d_in) for module in self.collection.modules]
        weights = torch.where(energy >= TINY, 1 / energy, 0.0)
        return Updates(stacks.load, shapes, self.ranks, self.norms, weights, device, budget, resident is not None)

    def resident_rows(self) -> list[Tensor] | None:
        """The bytes [1, size] of every adapter, where they stayed on the device."""
        if self.resident is None:
            return None
        rows: dict[int, Tensor] = {}
        for group in by_layout(self.collection.adapters, self.collection.modules):
            rows.update(zip(group.adapters.tolist(), self.resident.rows(group.layout), strict=True))
        return [rows[number] for number in range(len(rows))]

    @cached_property
    def ranks(self) -> Tensor:
        """The rank of every adapter in every module, [n, M] of int64; 0 where it lacks the module."""
        ranks = torch.zeros(self.norms.shape, dtype=torch.int64)
        for group in by_layout(self.collection.adapters, self.collection.modules):
            own = torch.tensor([part.rank for part in group.parts])
            ranks[torch.from_numpy(group.adapters)[:, None], torch.from_numpy(group.modules)] = own
        return ranks

    def too_small(self, dtype: torch.dtype) -> Tensor:
        """Which adapters [n] are not zero, but have no value that is a normal number in ``dtype``.

        No element of a core is larger than ‖ΔW‖_F, up to rounding, so all of them would lose digits.
        """
        largest = self.norms.amax(1).sqrt()
        return (largest > 0) & (largest < torch.finfo(dtype).smallest_normal)

    def check_unchanged(self, numbers: Iterable[int] | None = None) -> None:
        """Raise AdapterErrors for adapters, of all or of those of these ``numbers``, whose files are others by now.

        Tensors may be read again after the scan, and would not be those that it has the digests of.
        """
        adapters = self.collection.adapters
        changed = [
            adapters[number]
            for number in (range(len(adapters)) if numbers is None else numbers)
            if _stamps(adapters[number]) != self.stamps[number]
        ]
        if changed:
            hint = "try again when nobody writes there"
            raise AdapterErrors(
                [AdapterError(a.name, "its weights changed while they were being read", hint) for a in changed]
            )

    def digests(self) -> list[str]:
        """One digest of each adapter's files, their names and what is in them."""
        return [
            sha256_bytes(canonical_json([[source.path, source.sha256] for source in files])) for files in self.files
        ]


def scan(
    collection: Collection,
    *,
    skip_bad: bool,
    advance: Advance,
    device: torch.device = CPU,
    placement: Placement = HOST,
    singular: bool = False,
) -> Scan:
    """Read every file once, also for ``singular`` values if these are wanted. ``advance`` is called with 1 for each
    adapter.

    ``placement`` says where the tensors go while they are read, and whether they stay on ``device``.

    Raises AdapterErrors for NaN and Inf and for files that are not those of the collection's lock, unless ``skip_bad``:
    then these adapters leave the collection. A lock that cannot be read raises as `read_lock` does.
    """
    lock = read_lock(collection.root)
    locked = {adapter.name: adapter for adapter in lock.adapters} if lock else {}

    def verify(adapter: Adapter, files: list[SourceEntry]) -> None:
        if adapter.name in locked:
            _check_locked(adapter, files, locked[adapter.name])

    stamps = [_stamps(adapter) for adapter in collection.adapters]
    first = read_all(collection, device, placement, verify, advance, singular=singular)
    bad = [error for _, error in sorted(first.errors.items())]
    if bad and not skip_bad:
        raise AdapterErrors(bad)
    kept = [number for number in range(len(collection.adapters)) if number not in first.errors]
    left = collection.without(bad)
    columns = {module: number for number, module in enumerate(collection.modules)}
    return Scan(
        left,
        first.norms[kept][:, [columns[module] for module in left.modules]],
        [first.files[number] for number in kept],
        [locked[adapter.name].origin if adapter.name in locked else None for adapter in left.adapters],
        device,
        _still_resident(first, collection, left),
        [stamps[number] for number in kept],
        None if first.singular is None else [first.singular[number] for number in kept],
    )


def scan_for(
    collection: Collection,
    plan: WorkPlan,
    *,
    skip_bad: bool,
    device: torch.device,
    progress: Progress,
    singular: bool = False,
) -> Scan:
    """`scan` as a stage of ``progress``, which is also told what was left out."""
    with progress.stage("reading adapters", len(collection.adapters)) as advance:
        scanned = scan(
            collection,
            skip_bad=skip_bad,
            advance=advance,
            device=device,
            placement=plan.placement,
            singular=singular,
        )
    for skipped in scanned.collection.skipped:
        progress.note(f"left out {skipped.name}: {skipped.reason}")
    return scanned


def _still_resident(first: FirstPass, before: Collection, left: Collection) -> Resident | None:
    """The arrays on the device, and which of their rows are those of adapters that are left."""
    if first.resident is None:
        return None
    names = {adapter.name for adapter in left.adapters}
    rows: dict[Layout, Integers] = {}
    for group in by_layout(before.adapters, before.modules):
        rows[group.layout] = np.flatnonzero([before.adapters[i].name in names for i in group.adapters.tolist()])
    return Resident(first.resident, rows)


def _stamps(adapter: Adapter) -> Stamps:
    """Device, inode, size and time of change of every weight file; nothing for one that is gone."""
    found = []
    for weight in adapter.weights:
        with suppress(OSError):
            status = os.stat(weight.path)
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _check_locked(adapter: Adapter, files: list[SourceEntry], locked: LockedAdapter) -> None:
    """What is read is what was fetched. A file that the lock has and nobody reads, like a model card, may change."""
    digests = {file.path: file.sha256 for file in locked.files}
    for file in files:
        if digests.get(file.path) != file.sha256:
            what = f"not what {LOCK_NAME} has" if file.path in digests else f"not in {LOCK_NAME}"
            hint = f"fetch again with «force», or remove {LOCK_NAME}"
            raise AdapterError(adapter.name, f"{file.path} is {what}", hint)
