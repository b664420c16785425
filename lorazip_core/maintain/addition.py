"""Adapters that were read, on their way into a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..base.progress import Progress
from ..bundle.manifest import AdapterEntry, Manifest, SkippedEntry
from ..bundle.names import Names
from ..bundle.reader import Bundle
from ..bundle.tensor_file import DTYPES
from ..bundle.writer import BundleWriter
from ..compress.alone import Alone, write_alone
from ..compress.entries import Placed, adapter_entry, module_entry, skipped_entries
from ..compress.individual import Kept, stored
from ..compress.pieces import Pieces
from ..planning.options import CompressOptions
from ..reading.packs import Budget
from ..reading.scan import Scan
from .carry import Staying
from .projection import Host, Nearest, Projection, hosts
from .successor import Joining, successor


@dataclass(frozen=True)
class Addition:
    """The adapters of a scan on their way into a bundle."""

    bundle: Bundle
    scan: Scan
    names: Names
    alone: CompressOptions
    """How those are kept that join no cluster."""
    max_error: float | None
    device: torch.device
    budget: Budget
    progress: Progress

    @cached_property
    def called(self) -> list[str]:
        """The name of each in the bundle."""
        return [self.names.of(adapter.name) for adapter in self.scan.collection.adapters]

    @cached_property
    def staying(self) -> Staying:
        """Those of the bundle whose names nobody takes."""
        return Staying.without(self.bundle, set(self.called))

    @cached_property
    def projection(self) -> Projection:
        updates = self.scan.updates(self.bundle.manifest.parameters.weights, self.device, self.budget)
        return Projection(self.staying, self.scan, updates, self.progress)

    @cached_property
    def nearest(self) -> list[Nearest | None]:
        """For every adapter, the cluster that serves it best."""
        return self.projection.nearest(hosts(self.staying, self.max_error, self.alone.largest_error or 0.0))

    @cached_property
    def joining(self) -> dict[int, Host]:
        """The cluster of every adapter that joins one."""
        too_small = self.scan.too_small(DTYPES[self.alone.dtype]).tolist()
        return {
            number: nearest.host
            for number, (nearest, small) in enumerate(zip(self.nearest, too_small, strict=True))
            if nearest is not None and nearest.joins and not small
        }

    def write(self, writer: BundleWriter, pieces: Pieces) -> Manifest:
        """Write all files of the new bundle; its manifest."""
        self.staying.write(writer, self.progress)
        shards, lost = self.projection.write(writer, self.joining, self.called.__getitem__)
        numbers = [number for number in range(len(self.called)) if number not in self.joining]
        for note in Alone(self.scan, self.alone, self.device, pieces, self.progress).keep(numbers):
            self.progress.note(note)
        kept = {number: own for number in numbers if (own := stored(number, 0, pieces))}
        paths = write_alone(writer, kept, 0, pieces, self.called.__getitem__)
        for number, own in kept.items():
            lost[number, self.scan.ranks[number] > 0] = own.squared_errors
        placed = {number: self._placed(own, paths[number]) for number, own in kept.items()}
        placed |= {number: Placed(host.entry.method, host.number) for number, host in self.joining.items()}
        modules = self.scan.collection.modules
        return successor(
            self.staying,
            Joining(
                entries=[self._entry(writer, number, placed[number], lost[number]) for number in sorted(placed)],
                modules={module.name: module_entry(module) for module in modules},
                modules_of={
                    name: [modules[module].name for module in self.scan.ranks[number].nonzero()[:, 0].tolist()]
                    for number, name in enumerate(self.called)
                },
                shards=shards,
                skipped=[
                    SkippedEntry(self.names.of(each.name), each.reason)
                    for each in skipped_entries(self.scan.collection)
                ],
            ),
            writer,
        )

    def _placed(self, kept: Kept, path: str) -> Placed:
        placed = Placed.alone(kept, path)
        return placed._replace(because="max_error") if self.staying.clusters else placed

    def _entry(self, writer: BundleWriter, number: int, placed: Placed, lost: Tensor) -> AdapterEntry:
        return adapter_entry(
            writer,
            self.scan,
            number,
            placed,
            name=self.called[number],
            module_set=0,
            lost=lost,
            base_model=self.bundle.manifest.base_model,
            added=True,
        )
