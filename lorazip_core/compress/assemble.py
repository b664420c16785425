"""What was encoded, laid out as a bundle of format 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from msgspec import UNSET
from torch import Tensor

from .. import __version__
from ..adapter.formats.names import CONFIG_NAME
from ..adapter.module import Module
from ..adapter.reader import Adapter
from ..base.digests import safe_name
from ..base.text import unmarked
from ..bundle.losses import Losses
from ..bundle.manifest import (
    AdapterEntry,
    ClusterEntry,
    Manifest,
    ModuleEntry,
    ParameterEntry,
    Parameters,
    SkippedEntry,
    required_to_read,
)
from ..bundle.writer import BundleWriter
from ..reading.scan import Scan
from ..schemes.scheme import SharedScheme
from .individual import Kept
from .packed import pack, packed_files
from .pieces import Pieces, individual_piece
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
        whose = ((number, kept[number].scheme, len(kept[number].squared_errors)) for number in sorted(kept))
        for file in pack(packed_files(whose, attempt), attempt, self.pieces):
            self.writer.add_file(file.path, *self.pieces.file(file.piece))
            self._paths |= dict.fromkeys(file.adapters, file.path)
        for number, each in kept.items():
            if number not in self._paths:
                self._paths[number] = f"individual/{safe_name(self.scan.collection.adapters[number].name)}.safetensors"
                self.writer.add_file(self._paths[number], *self.pieces.file(individual_piece(number, attempt)))
            self._lost[number, self.has[number]] = each.squared_errors
        self._individual |= kept

    def finish(self, parameters: Parameters) -> tuple[Manifest, int]:
        """Write extras, configurations and the manifest; returns it and the bytes of the bundle."""
        collection = self.scan.collection
        module_sets: dict[bytes, int] = {}
        covered: list[list[int]] = []
        entries = []
        for number, adapter in enumerate(collection.adapters):
            row = self.has[number]
            module_set = module_sets.setdefault(row.numpy().tobytes(), len(module_sets))
            if module_set == len(covered):
                covered.append(row.nonzero().flatten().tolist())
            entries.append(self._entry(number, adapter, module_set, covered[module_set], parameters))
        features: set[str] = {module.kind for module in collection.modules}
        if any(module.parameter for module in collection.modules):
            features.add("target_parameters")
        manifest = Manifest(
            created_by=f"lorazip {__version__}",
            requires={
                "read": required_to_read(entries),
                "export": sorted(features | ({"extras"} if any(entry.extras for entry in entries) else set())),
            },
            base_model=collection.base_model,
            parameters=parameters,
            modules=[_module_entry(module) for module in collection.modules],
            module_sets=covered,
            clusters=self._clusters,
            adapters=entries,
            skipped=[SkippedEntry(skipped.name, unmarked(skipped.reason)) for skipped in collection.skipped],
            files=self.writer.files,
        )
        return manifest, self.writer.finish(manifest)

    def _entry(
        self, number: int, adapter: Adapter, module_set: int, modules: list[int], parameters: Parameters
    ) -> AdapterEntry:
        name = safe_name(adapter.name)
        extras = None
        if adapter.extras:
            tensors = {key: adapter.extra(key) for key in adapter.extras}
            extras = self.writer.add_shared(f"extras/{name}.safetensors", tensors).path
        config = self.writer.add_shared_bytes(f"configs/{name}.json", adapter.config_text).path
        base_model = self.scan.collection.base_model
        kept = self._individual.get(number)
        losses = Losses(self.scan.collection.modules[module].name for module in modules)
        norms, lost = self.scan.norms[number, modules].tolist(), self._lost[number, modules].tolist()
        for module, norm, own in zip(list(losses.norms), norms, lost, strict=True):
            losses.put(module, norm, own)
        return AdapterEntry(
            name=adapter.name,
            scheme=kept.scheme if kept else self._clusters[self._cluster_of[number]].method,
            cluster=None if kept else self._cluster_of[number],
            module_set=module_set,
            rank=kept.rank if kept else None,
            individual=self._paths.get(number),
            extras=extras,
            config=config,
            base_model=UNSET if adapter.config.base_model == base_model else adapter.config.base_model,
            files=[file for file in self.scan.files[number] if file.path != CONFIG_NAME],
            squared_norm=losses.squared_norm,
            squared_error=losses.squared_error,
            mean_module_squared_error=losses.mean_module_squared_error,
            worst_module=losses.worst_module,
            because="method" if kept is None or kept.as_asked else "max_error",
            origin=self.scan.origins[number],
            left_out=list(self.scan.collection.left_out.get(adapter.name, ())),
        )


def _module_entry(module: Module) -> ModuleEntry:
    parameter = ParameterEntry(*module.parameter) if module.parameter else UNSET
    return ModuleEntry(
        name=module.name,
        kind=module.kind,
        d_out=module.d_out,
        d_in=module.d_in,
        kernel=list(module.kernel),
        parameter=parameter,
    )
