"""The manifest of a bundle that comes after another one: who stays, who joins, and all of it numbered anew."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from .. import __version__
from ..adapter.formats.names import CONFIG_NAME
from ..base.errors import Unsupported
from ..bundle.manifest import (
    AdapterEntry,
    ClusterEntry,
    Manifest,
    ModuleEntry,
    ShardEntry,
    SkippedEntry,
    required_to_export,
    required_to_read,
)
from ..bundle.writer import BundleWriter
from .carry import Staying


class Joining(NamedTuple):
    """Adapters that join, and all that a manifest says of them.

    Clusters go by their numbers in the bundle that was; what ``entries`` say of module sets does not count.
    """

    entries: Sequence[AdapterEntry] = ()
    """In the order of their names, as their files have them."""
    modules: Mapping[str, ModuleEntry] = {}
    """All that any of them has, by name."""
    modules_of: Mapping[str, Sequence[str]] = {}
    """By adapter, the names of its modules."""
    shards: Sequence[tuple[int, str, Sequence[str]]] = ()
    """New ones: the cluster, the path, and the names of its adapters in order."""
    skipped: Sequence[SkippedEntry] = ()


def successor(staying: Staying, joining: Joining, writer: BundleWriter) -> Manifest:
    """The manifest of the files that ``writer`` has written, of format 2.

    Raises Unsupported for a bundle whose modules are not in the order of their names, as those of lorazip are: the
    order of codes in files would change with that of modules.
    """
    before = staying.bundle.manifest
    modules = _modules(staying, joining)
    place = {module.name: number for number, module in enumerate(modules)}
    old = [(before.adapters[index], _names(before, before.adapters[index])) for index in staying.indices]
    new = [(entry, joining.modules_of[entry.name]) for entry in joining.entries]
    everyone = list(heapq.merge(old, new, key=lambda each: each[0].name.encode()))
    sets: dict[tuple[int, ...], int] = {}
    cluster_of = {cluster: number for number, cluster in enumerate(staying.clusters)}
    adapters = [
        msgspec.structs.replace(
            _as_format_2(entry, before),
            module_set=sets.setdefault(tuple(sorted(place[name] for name in names)), len(sets)),
            cluster=None if entry.cluster is None else cluster_of[entry.cluster],
        )
        for entry, names in everyone
    ]
    index_of = {entry.name: index for index, entry in enumerate(adapters)}
    return Manifest(
        created_by=f"lorazip {__version__}",
        requires={"read": required_to_read(adapters), "export": required_to_export(modules, adapters)},
        base_model=before.base_model,
        parameters=before.parameters,
        modules=modules,
        module_sets=[list(indices) for indices in sets],
        clusters=_clusters(staying, joining, writer, index_of),
        adapters=adapters,
        skipped=_skipped(before, joining, index_of),
        files=writer.files,
    )


def _modules(staying: Staying, joining: Joining) -> list[ModuleEntry]:
    """Those that any adapter has."""
    all_of_old = staying.bundle.manifest.modules
    if [module.name for module in all_of_old] != sorted(module.name for module in all_of_old):
        raise Unsupported(
            f"{staying.bundle.path}: its modules are not in the order of their names", "compress its adapters anew"
        )
    old = [all_of_old[module] for module in staying.modules(staying.indices)]
    every = {**joining.modules, **{module.name: module for module in old}}
    return [every[name] for name in sorted(every)]


def _names(manifest: Manifest, adapter: AdapterEntry) -> list[str]:
    return [manifest.modules[index].name for index in manifest.module_sets[adapter.module_set]]


def _clusters(
    staying: Staying, joining: Joining, writer: BundleWriter, index_of: Mapping[str, int]
) -> list[ClusterEntry]:
    before = staying.bundle.manifest
    clusters = []
    for cluster in staying.clusters:
        own = before.clusters[cluster]
        shards = [
            (shard.path, [before.adapters[index].name for index in held]) for shard, held in staying.shards(cluster)
        ]
        shards += [(path, list(names)) for number, path, names in joining.shards if number == cluster]
        basis = writer.digest(own.basis)
        entries = [ShardEntry(path, [index_of[name] for name in names], basis) for path, names in shards]
        clusters.append(ClusterEntry(own.method, own.rank, own.basis, entries))
    return clusters


def _skipped(before: Manifest, joining: Joining, there: Collection[str]) -> list[SkippedEntry]:
    """Who was left out, then or now, of those that are not ``there`` by their names."""
    anew = [entry for entry in joining.skipped if entry.name not in there]
    names = {entry.name for entry in anew}
    left = [entry for entry in before.skipped if entry.name not in names and entry.name not in there]
    return sorted([*left, *anew], key=lambda entry: (entry.name, entry.reason)) if anew else left


def _as_format_2(entry: AdapterEntry, manifest: Manifest) -> AdapterEntry:
    """Without what only format 1 says: of the configuration, and of a base model that is that of the bundle."""
    if manifest.format_version > 1:
        return entry
    return msgspec.structs.replace(
        entry,
        files=[file for file in entry.files if file.path != CONFIG_NAME],
        base_model=UNSET if entry.base_model == manifest.base_model else entry.base_model,
    )
