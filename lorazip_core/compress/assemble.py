"""What was encoded, laid out as a bundle of format 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import __version__
from ..bundle.manifest import ClusterEntry, Manifest, Parameters, required_to_export, required_to_read
from ..bundle.writer import BundleWriter
from ..reading.scan import Scan
from ..schemes.scheme import SharedScheme
from .alone import write_alone
from .entries import Placed, adapter_entry, module_entry, skipped_entries
from .individual import Kept
from .pieces import Pieces
from .shards import ClusterFiles
from .shared import Encoded


@dataclass
class Assembly:
    """Writes what a bundle consists of from its pieces, and then its manifest.

    ``has`` [n, M] says which adapter has which module; ``_lost`` [n, M] is what each loses, ‖ΔW−ΔŴ‖².
    """

    writer: BundleWriter
    scan: Scan
    has: Tensor
    pieces: Pieces
    _clusters: list[ClusterEntry] = field(default_factory=list)
    _cluster_of: dict[int, int] = field(default_factory=dict)
    _individual: dict[int, Kept] = field(default_factory=dict)
    _paths: dict[int, str] = field(default_factory=dict)
    _lost: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._lost = torch.zeros(self.has.shape, dtype=torch.float64)

    def add_clusters(self, encoded: Encoded, scheme: SharedScheme) -> None:
        """Write what clusters share, and what their adapters have of their own."""
        modules = [module.name for module in self.scan.collection.modules]
        self._clusters = ClusterFiles(self.writer, encoded, self.pieces, modules, self.has, scheme).write()
        self._cluster_of = {
            member: number
            for number, cluster in enumerate(self._clusters)
            for shard in cluster.shards
            for member in shard.adapters
        }
        self._lost += encoded.lost

    def add_individual(self, kept: Mapping[int, Kept], attempt: int) -> None:
        """Take over the files of adapters that are kept on their own, by number, some of them packed together."""
        self._paths |= write_alone(
            self.writer, kept, attempt, self.pieces, lambda number: self.scan.collection.adapters[number].name
        )
        for number, each in kept.items():
            self._lost[number, self.has[number]] = each.squared_errors
        self._individual |= kept

    def finish(self, parameters: Parameters) -> tuple[Manifest, int]:
        """Write extras, configurations and the manifest; returns it and the bytes of the bundle."""
        collection = self.scan.collection
        module_sets: dict[bytes, int] = {}
        covered: list[list[int]] = []
        entries = []
        for number in range(len(collection.adapters)):
            row = self.has[number]
            module_set = module_sets.setdefault(row.numpy().tobytes(), len(module_sets))
            if module_set == len(covered):
                covered.append(row.nonzero().flatten().tolist())
            entries.append(
                adapter_entry(
                    self.writer,
                    self.scan,
                    number,
                    self._placed(number),
                    module_set=module_set,
                    lost=self._lost[number],
                    base_model=collection.base_model,
                )
            )
        modules = [module_entry(module) for module in collection.modules]
        manifest = Manifest(
            created_by=f"lorazip {__version__}",
            requires={
                "read": required_to_read(entries),
                "export": required_to_export(modules, entries),
            },
            base_model=collection.base_model,
            parameters=parameters,
            modules=modules,
            module_sets=covered,
            clusters=self._clusters,
            adapters=entries,
            skipped=skipped_entries(collection),
            files=self.writer.files,
        )
        return manifest, self.writer.finish(manifest)

    def _placed(self, number: int) -> Placed:
        kept = self._individual.get(number)
        if kept is not None:
            return Placed.alone(kept, self._paths[number])
        cluster = self._cluster_of[number]
        return Placed(self._clusters[cluster].method, cluster)
