"""What a bundle has of the adapters that stay, taken over into another one.

A file whose adapters all stay is linked, or copied where the file system does not link: not a byte of it changes. Of
one that others share with them, what is left is written again, with the same tensors. A file of which nothing is left
is not there any more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..base.errors import BundleDamaged
from ..base.filesystem import on_one_file_system
from ..base.progress import Progress
from ..base.threads import in_order
from ..bundle.manifest import FileEntry, ShardEntry
from ..bundle.reader import Bundle
from ..bundle.writer import BundleWriter
from ..schemes.registry import SCHEMES, packed_scheme

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Staying:
    """The adapters of a bundle that stay, by index, ascending; at least one of them, or others are to join."""

    bundle: Bundle
    indices: Sequence[int]

    @classmethod
    def without(cls, bundle: Bundle, gone: Collection[str]) -> Staying:
        """All of a bundle but those of the names ``gone``."""
        adapters = bundle.manifest.adapters
        return cls(bundle, [index for index, adapter in enumerate(adapters) if adapter.name not in gone])

    @cached_property
    def clusters(self) -> list[int]:
        """The clusters that any of them is in, by their numbers in the bundle; they are numbered anew in this order."""
        adapters = self.bundle.manifest.adapters
        return sorted({number for index in self.indices if (number := adapters[index].cluster) is not None})

    def members(self, cluster: int) -> list[int]:
        """Those that are in a cluster."""
        return [index for index in self.indices if self.bundle.manifest.adapters[index].cluster == cluster]

    def modules(self, indices: Iterable[int]) -> list[int]:
        """The modules that any adapter of these ``indices`` has, by number, ascending."""
        manifest = self.bundle.manifest
        sets = {manifest.adapters[index].module_set for index in indices}
        return sorted({module for number in sets for module in manifest.module_sets[number]})

    def shards(self, cluster: int) -> list[tuple[ShardEntry, list[int]]]:
        """The shards of a cluster, with those of their adapters that stay; none without any."""
        shards = self.bundle.manifest.clusters[cluster].shards
        left = [(shard, [index for index in shard.adapters if index in self._there]) for shard in shards]
        return [(shard, held) for shard, held in left if held]

    @cached_property
    def whole(self) -> list[FileEntry]:
        """The files that are taken over as they are."""
        return [entry for entry in self.bundle.manifest.files if entry.path in self._used - self.cut]

    @cached_property
    def cut(self) -> set[str]:
        """The paths of files of which a part is left."""
        manifest = self.bundle.manifest
        packed = [path for path in self._packed if not self._there.issuperset(self._packed[path])]
        found = self._used & set(packed)
        for cluster in self.clusters:
            own = manifest.clusters[cluster]
            everyone = [index for shard in own.shards for index in shard.adapters]
            if self.modules(everyone) != self.modules(self.members(cluster)):
                found.add(own.basis)
            for shard, held in self.shards(cluster):
                if len(held) < len(shard.adapters) or own.basis in found:
                    found.add(shard.path)  # a shard names the digest of its basis
        return found

    @cached_property
    def dropped(self) -> list[str]:
        """The paths of files of which nothing is left."""
        return [entry.path for entry in self.bundle.manifest.files if entry.path not in self._used]

    def written_bytes(self, output: Path) -> int:
        """About the bytes that taking them over to ``output`` takes: of parts of files, and of files to be copied."""
        written = self.cut if on_one_file_system(self.bundle.path, output) else self._used
        return sum(entry.size_bytes for entry in self.bundle.manifest.files if entry.path in written)

    @cached_property
    def _there(self) -> frozenset[int]:
        return frozenset(self.indices)

    @cached_property
    def _used(self) -> set[str]:
        """The paths of all files that have anything of these adapters."""
        manifest = self.bundle.manifest
        adapters = [manifest.adapters[index] for index in self.indices]
        used = {path for each in adapters for path in (each.individual, each.extras, each.config) if path is not None}
        for cluster in self.clusters:
            used |= {manifest.clusters[cluster].basis, *(shard.path for shard, _ in self.shards(cluster))}
        return used

    @cached_property
    def _packed(self) -> dict[str, list[int]]:
        """By path, the adapters of a file that several share because their scheme packs them."""
        found: defaultdict[str, list[int]] = defaultdict(list)
        for index, adapter in enumerate(self.bundle.manifest.adapters):
            if adapter.individual is not None and packed_scheme(adapter.scheme):
                found[adapter.individual].append(index)
        return found

    def write(self, writer: BundleWriter, progress: Progress) -> None:
        """Take all files over. Raises BundleDamaged for one that is not what the manifest says."""
        files = {entry.path: entry for entry in self.bundle.manifest.files}
        with progress.stage("taking over files", len(self.whole) + len(self.cut)) as advance:
            with closing(in_order(self._checked, self.whole, _CPU)) as sound:
                for entry in sound:
                    writer.carry(self.bundle.path, entry)
                    advance(1)
            for path in sorted(self.cut & self._packed.keys()):
                self._write_packed(writer, path)
                advance(1)
            for cluster in self.clusters:
                own = self.bundle.manifest.clusters[cluster]
                if own.basis in self.cut:
                    self._write_basis(writer, cluster)
                    advance(1)
                for shard, held in self.shards(cluster):
                    if shard.path in self.cut:
                        self._write_shard(writer, shard, held, own.method, own.basis)
                        advance(1)
        for path in self.cut:
            writer.mark_as_rest(path, files[path])

    def _checked(self, entry: FileEntry) -> FileEntry:
        if damage := self.bundle.damage_to(entry.path):
            hint = "restore the bundle, or compress again; 'lorazip verify' names all damage"
            raise BundleDamaged(f"{self.bundle.path / entry.path}: {damage[1]}", hint)
        return entry

    def _write_packed(self, writer: BundleWriter, path: str) -> None:
        held = [index for index in self._packed[path] if index in self._there]
        scheme = packed_scheme(self.bundle.manifest.adapters[held[0]].scheme)
        assert scheme is not None
        unpacked = self.bundle.unpacked_in(path)
        writer.add_tensors(path, scheme.pack([unpacked[index].joined for index in held]))

    def _write_basis(self, writer: BundleWriter, cluster: int) -> None:
        """What is shared, less modules that none of those who stay has."""
        own = self.bundle.manifest.clusters[cluster]
        tensors = {
            f"{name}.{suffix}": tensor
            for name in self._names(self.members(cluster))
            for suffix, tensor in self.bundle.shared(own, name).items()
        }
        writer.add_tensors(own.basis, tensors)

    def _write_shard(
        self, writer: BundleWriter, shard: ShardEntry, held: Collection[int], method: str, basis: str
    ) -> None:
        """The rows of those who stay."""
        tensors = {}
        for name in self._names(held):
            rows = [row for index, row in self.bundle.rows(shard, name).items() if index in self._there]
            for suffix in SCHEMES[method].own:
                tensors[f"{name}.{suffix}"] = self.bundle.tensor(shard.path, f"{name}.{suffix}")[rows]
        writer.add_tensors(shard.path, tensors, basis_sha256=writer.digest(basis))

    def _names(self, indices: Iterable[int]) -> list[str]:
        return [self.bundle.manifest.modules[module].name for module in self.modules(indices)]
