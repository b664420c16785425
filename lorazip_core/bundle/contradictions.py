"""What in a manifest contradicts itself, though every index and path points at something.

`verify` names all of it beside other damage; `info`, `export`, `add`, `remove`, `serve` and `attach` refuse a bundle
for it before they use anything. No tensor is read, and torch is not needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from msgspec import UNSET

from ..adapter.lock import is_path_below
from ..base.errors import BundleDamaged
from ..schemes.registry import SCHEMES, packed_scheme
from .kinds import MANIFEST_NAME
from .manifest import SHARED_EXTRAS, Manifest, ModuleEntry, ParameterEntry


def refuse_contradictions(bundle: Path, manifest: Manifest) -> None:
    """Raise BundleDamaged, naming the first contradiction in the manifest of ``bundle``, if there is one."""
    found = list(contradictions(manifest))
    if found:
        more = f", and {len(found) - 1:,} more" if found[1:] else ""
        raise BundleDamaged(
            f"{bundle / MANIFEST_NAME} contradicts itself: {found[0]}{more}",
            "restore the bundle, or compress again; 'lorazip verify' names all damage",
        )


def contradictions(manifest: Manifest) -> Iterator[str]:
    """Each contradiction in words."""
    yield from _of_modules(manifest)
    yield from _of_features(manifest)
    yield from _of_adapters(manifest)
    yield from _of_files(manifest)


def _of_modules(manifest: Manifest) -> Iterator[str]:
    for name, count in Counter(module.name for module in manifest.modules).items():
        if count > 1:
            yield f"{_number(count)} modules are named {name}"
    for module in manifest.modules:
        if (module.kind == "conv") != bool(module.kernel) or module.d_in % math.prod(module.kernel):
            yield f"module {module.name}: kind, kernel and d_in do not fit"
        if module.parameter is not UNSET:
            yield from _of_parameter(module, module.parameter)
    for number, indices in enumerate(manifest.module_sets):
        if not indices:
            yield f"module set {number} is empty"
        elif indices != sorted(set(indices)):
            yield f"module set {number} is not ascending, or has a module twice"
    for count in Counter(map(tuple, manifest.module_sets)).values():
        if count > 1:
            yield f"{_number(count)} module sets are the same"


def _of_parameter(module: ModuleEntry, parameter: ParameterEntry) -> Iterator[str]:
    number = f".{parameter.expert}" if parameter.experts > 1 else ""
    if module.kind != "linear" or not module.name.endswith(f".{parameter.name}{number}"):
        yield f"module {module.name}: kind, name and parameter do not fit"
    if parameter.expert >= parameter.experts:
        yield f"module {module.name} is expert {parameter.expert} of {parameter.experts}"


def _of_features(manifest: Manifest) -> Iterator[str]:
    """What is in use has to be required, or a reader that does not know it would not be warned."""
    read, export = (manifest.requires.get(operation, []) for operation in ("read", "export"))
    for kind in dict.fromkeys(module.kind for module in manifest.modules):
        if kind not in export:
            yield f"the kind {kind} is in use, but not required to export"
    if "target_parameters" not in export and any(module.parameter is not UNSET for module in manifest.modules):
        yield "a module is of a parameter, but target_parameters are not required to export"
    for scheme in dict.fromkeys(adapter.scheme for adapter in manifest.adapters):
        if scheme not in read:
            yield f"the scheme {scheme} is in use, but not required to read"
    if "extras" not in export and any(adapter.extras is not None for adapter in manifest.adapters):
        yield "an adapter has extras, but they are not required to export"


def _of_adapters(manifest: Manifest) -> Iterator[str]:
    if not manifest.adapters:
        yield "it has no adapters"
    for before, after in pairwise(adapter.name for adapter in manifest.adapters):
        if before.encode() > after.encode():
            yield f"adapter {after!r} comes after {before!r}: names have to ascend"
    names = [{manifest.modules[index].name for index in indices} for indices in manifest.module_sets]
    for adapter in manifest.adapters:
        called = f"adapter {adapter.name!r}"
        if adapter.name != "." and not is_path_below(adapter.name):
            yield f"{called}: the name is no path below a folder"
        if adapter.cluster is not None and manifest.clusters[adapter.cluster].method != adapter.scheme:
            yield f"{called} is {adapter.scheme}, its cluster is not"
        nothing = adapter.rank == 0 and not packed_scheme(adapter.scheme)  # which may keep no component at all
        if nothing or SCHEMES[adapter.scheme].has_own_rank != (adapter.rank is not None):
            yield f"{called}: scheme {adapter.scheme} with rank {adapter.rank}"
        if adapter.worst_module is not None and adapter.worst_module.name not in names[adapter.module_set]:
            yield f"{called}: its worst module is none of its modules"


def _of_files(manifest: Manifest) -> Iterator[str]:
    digests = {entry.path: entry.sha256 for entry in manifest.files}
    shards = [shard for cluster in manifest.clusters for shard in cluster.shards]
    paths = Counter(cluster.basis for cluster in manifest.clusters) + Counter(shard.path for shard in shards)
    extras = [adapter.extras for adapter in manifest.adapters if adapter.extras is not None]
    shared_extras = manifest.format_version > 1 or SHARED_EXTRAS in manifest.requires.get("read", [])
    paths.update(set(extras) if shared_extras else extras)
    configs = [adapter.config for adapter in manifest.adapters]
    paths.update(set(configs) if manifest.format_version > 1 else configs)
    individual = [(adapter.individual, packed_scheme(adapter.scheme)) for adapter in manifest.adapters]
    paths.update(path for path, packed in individual if path is not None and packed is None)
    paths.update({path for path, packed in individual if path is not None and packed is not None})
    for path, count in paths.items():
        if count > 1:
            yield f"{path} has {_number(count)} owners"
    for cluster in manifest.clusters:
        for shard in cluster.shards:
            if shard.basis_sha256 != digests[cluster.basis]:
                yield f"{shard.path} belongs to the basis {shard.basis_sha256}, not to {cluster.basis}"


def _number(count: int) -> str:
    return "two" if count == 2 else f"{count:,}"
