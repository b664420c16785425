"""About what a bundle takes on disk, from shapes alone: no weight is read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..schemes.registry import SCHEMES
from ..schemes.scheme import PackedScheme, Scheme, Size, TensorSpec, itemsize
from .manifest import Dtype, Method

if TYPE_CHECKING:
    from ..adapter.collection import Collection

_ITEM_BYTES: dict[Dtype, int] = {"bf16": 2, "f16": 2, "f32": 4}

# Measured on real bundles, besides names: what a tensor adds to the header of its file, and what an adapter, a module,
# a file and a cluster add to the manifest.
_TENSOR_BYTES = 72
_ADAPTER_BYTES = 470
_MODULE_BYTES = 40
_FILE_BYTES = 130
_CLUSTER_BYTES = 240

PACKED_ADAPTERS = 32
"""In one file of a scheme that packs them: enough to share tables of codes, few enough to be unpacked at no cost."""
PACKED_MODULES = 2**20
"""In one file at most, each counted for every adapter that has it: a small manifest can name many times more."""


def equal_groups(adapters: int, clusters: int) -> list[range]:
    """Clusters of equal size, to plan with while nobody knows better."""
    return [range(first, adapters, clusters) for first in range(clusters)]


def bundle_bytes(
    collection: Collection, method: Method, rank: int | None, groups: Sequence[Sequence[int]], dtype: Dtype
) -> int:
    """About the bytes of a bundle. ``groups`` are the numbers of the adapters that share a basis; empty where none do.

    Extras count for every adapter: that some are equal, and stored once, shows only when they are read.
    """
    item, scheme = _ITEM_BYTES[dtype], SCHEMES[method]
    if rank is None or not scheme.shared:
        tensors, files = _individual_bytes(collection, scheme, rank, item), _individual_files(collection, scheme)
    else:
        tensors = sum(_shared_bytes(collection, group, scheme, rank, item) for group in groups)
        files = 2 * len(groups)
    return tensors + _other_bytes(collection, files) + len(groups) * _CLUSTER_BYTES


def bytes_besides_updates(collection: Collection, scheme: Scheme) -> int:
    """About the bytes of a bundle of adapters on their own, less those of the data of their own tensors."""
    headers = 0
    if not isinstance(scheme, PackedScheme):
        names = (name for adapter in collection.adapters for name in adapter.parts)
        headers = sum(len(scheme.own) * _tensor_bytes(name, 0) for name in names)
    return headers + _other_bytes(collection, _individual_files(collection, scheme))


def _individual_files(collection: Collection, scheme: Scheme) -> int:
    """The files that adapters on their own have, when nothing sends one to another scheme."""
    count = len(collection.adapters)
    return -(-count // PACKED_ADAPTERS) if isinstance(scheme, PackedScheme) else count


def _other_bytes(collection: Collection, files: int) -> int:
    """Extras, configurations and the manifest, of a bundle with so many files of other tensors."""
    adapters = collection.adapters
    extras = sum(_tensor_bytes(key, info.size_bytes) for each in adapters for key, info in each.extras.items())
    configs = {adapter.config_text for adapter in adapters}
    files += len(configs) + sum(bool(adapter.extras) for adapter in adapters)
    manifest = files * _FILE_BYTES
    manifest += sum(_ADAPTER_BYTES + len(adapter.name) for adapter in adapters)
    manifest += sum(_MODULE_BYTES + len(module.name) for module in collection.modules)
    return extras + sum(map(len, configs)) + manifest


def _tensor_bytes(name: str, data: int) -> int:
    return data + _TENSOR_BYTES + len(name)


def _individual_bytes(collection: Collection, scheme: Scheme, rank: int | None, item: int) -> int:
    """Bytes of adapters on their own; without a rank, at the rank that they have."""
    total = 0
    for adapter in collection.adapters:
        for name, part in adapter.parts.items():
            size = Size(part.module.d_out, part.module.d_in)
            if isinstance(scheme, PackedScheme):
                total += scheme.typical_bytes(size)
                continue
            total += _tensors_bytes(name, scheme.own_tensors(size, min(rank or part.rank, part.rank)), item)
    return total


def _shared_bytes(collection: Collection, group: Sequence[int], scheme: Scheme, rank: int, item: int) -> int:
    """Bytes of what one cluster shares, and of its adapters' own tensors."""
    stacked: defaultdict[str, int] = defaultdict(int)
    having: Counter[str] = Counter()
    for number in group:
        for name, part in collection.adapters[number].parts.items():
            stacked[name] += part.rank
            having[name] += 1
    total = 0
    for module in collection.modules:
        name = module.name
        if name in having:
            size, most = Size(module.d_out, module.d_in), min(rank, stacked[name])
            total += _tensors_bytes(name, scheme.shared_tensors(size, most), item)
            total += _tensors_bytes(name, scheme.own_tensors(size, most), item, having[name])
    return total


def _tensors_bytes(module: str, specs: Mapping[str, TensorSpec], item: int, rows: int = 1) -> int:
    """Bytes of tensors of a module, which have ``item`` bytes an element where they have the dtype of the bundle."""
    return sum(
        _tensor_bytes(module, rows * spec.most_elements * (itemsize(spec.dtypes[0]) if spec.dtypes else item))
        for spec in specs.values()
    )
