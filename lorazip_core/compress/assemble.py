"""What was encoded, laid out as a bundle of format 1."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from .. import __version__
from ..adapter import Adapter
from ..bundle import (
    AdapterEntry,
    BundleWriter,
    ClusterEntry,
    FileEntry,
    Manifest,
    ModuleEntry,
    ModuleError,
    Parameters,
    ShardEntry,
    SkippedEntry,
)
from ..files import safe_name
from ..scan import Scan
from .individual import Individual
from .shared import Encoded

_SHARD_ADAPTERS = 512


@dataclass
class Assembly:
    """Writes what a bundle consists of, piece by piece, and then its manifest."""

    writer: BundleWriter
    scan: Scan
    _clusters: list[ClusterEntry] = field(default_factory=list)
    _cluster_of: dict[int, int] = field(default_factory=dict)
    _individual: dict[int, tuple[Individual, FileEntry]] = field(default_factory=dict)
    _lost: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    def add_clusters(self, encoded: Encoded, method: Literal["joint", "diag"]) -> None:
        """Write bases and cores. Clusters are numbered anew, in the order of their numbers in ``encoded``."""
        modules = self.scan.collection.modules
        for new, old in enumerate(sorted({cluster for cluster, _ in encoded})):
            own = {modules[m].name: shared for (cluster, m), shared in encoded.items() if cluster == old}
            basis = {f"{name}.U": shared.u for name, shared in own.items()}
            basis |= {f"{name}.V": shared.v for name, shared in own.items()}
            basis_file = self.writer.add_tensors(f"bases/{new}.safetensors", basis)
            members = sorted({member for shared in own.values() for member in shared.members})
            shards: list[ShardEntry] = []
            for start in range(0, len(members), _SHARD_ADAPTERS):
                held = members[start : start + _SHARD_ADAPTERS]
                parts = {name: shared.only(set(held)) for name, shared in own.items()}
                cores = {f"{name}.core": part.cores for name, part in parts.items() if part.members}
                path = f"cores/{new}-{len(shards)}.safetensors"
                self.writer.add_tensors(path, cores, basis_sha256=basis_file.sha256)
                shards.append(ShardEntry(path, held, basis_file.sha256))
            rank = max(max(shared.u.shape[1], shared.v.shape[1]) for shared in own.values())
            self._clusters.append(ClusterEntry(method, rank, basis_file.path, shards))
            self._cluster_of |= dict.fromkeys(members, new)
            for name, shared in own.items():
                for member, error in zip(shared.members, shared.squared_errors.tolist(), strict=True):
                    self._lost[member][name] = error

    def add_individual(self, number: int, kept: Individual) -> None:
        """Write an adapter that is kept on its own."""
        name = safe_name(self.scan.collection.adapters[number].name)
        entry = self.writer.add_tensors(f"individual/{name}.safetensors", kept.tensors)
        self._individual[number] = kept, entry
        self._lost[number] = kept.squared_errors

    def finish(self, parameters: Parameters) -> Manifest:
        """Write extras, configurations and the manifest."""
        collection = self.scan.collection
        numbers = {module.name: number for number, module in enumerate(collection.modules)}
        module_sets: dict[tuple[int, ...], int] = {}
        entries = []
        for number, adapter in enumerate(collection.adapters):
            covered = tuple(numbers[name] for name in adapter.parts)
            entries.append(self._entry(number, adapter, module_sets.setdefault(covered, len(module_sets)), parameters))
        kinds: set[str] = {module.kind for module in collection.modules}
        manifest = Manifest(
            created_by=f"lorazip {__version__}",
            requires={
                "read": sorted({entry.scheme for entry in entries}),
                "export": sorted(kinds | ({"extras"} if any(entry.extras for entry in entries) else set())),
            },
            base_model=collection.base_model,
            parameters=parameters,
            modules=[ModuleEntry(m.name, m.kind, m.d_out, m.d_in, list(m.kernel)) for m in collection.modules],
            module_sets=[list(covered) for covered in module_sets],
            clusters=self._clusters,
            adapters=entries,
            skipped=[SkippedEntry(*skipped) for skipped in collection.skipped],
            files=self.writer.files,
        )
        self.writer.finish(manifest)
        return manifest

    def _entry(self, number: int, adapter: Adapter, module_set: int, parameters: Parameters) -> AdapterEntry:
        name = safe_name(adapter.name)
        extras = None
        if adapter.extras:
            tensors = {key: adapter.extra(key) for key in adapter.extras}
            extras = self.writer.add_tensors(f"extras/{name}.safetensors", tensors).path
        config = self.writer.add_bytes(f"configs/{name}.json", adapter.config_text).path
        kept, file = self._individual.get(number, (None, None))
        norms = dict(zip((m.name for m in self.scan.collection.modules), self.scan.norms[number].tolist(), strict=True))
        shares = {module: _share(lost, norms[module]) for module, lost in self._lost[number].items()}
        total = sum(norms[module] for module in adapter.parts)
        worst = max(sorted(shares), key=shares.__getitem__)
        return AdapterEntry(
            name=adapter.name,
            scheme=kept.scheme if kept else self._clusters[self._cluster_of[number]].method,
            cluster=None if kept else self._cluster_of[number],
            module_set=module_set,
            rank=kept.rank if kept else None,
            individual=file.path if file else None,
            extras=extras,
            config=config,
            base_model=adapter.config.base_model,
            files=self.scan.files[number],
            squared_norm=total,
            squared_error=_share(sum(self._lost[number].values()), total),
            mean_module_squared_error=sum(shares.values()) / len(shares),
            worst_module=ModuleError(worst, shares[worst]),
            because="method" if kept is None or _as_asked(kept, parameters) else "max_error",
            origin=self.scan.origins[number],
        )


def _as_asked(kept: Individual, parameters: Parameters) -> bool:
    return kept.scheme == parameters.method and kept.rank == parameters.rank


def _share(lost: float, total: float) -> float:
    """lost / total, 0 for an update that is all zero; rounding must not make it negative."""
    return max(lost, 0.0) / total if total > 0 else 0.0
