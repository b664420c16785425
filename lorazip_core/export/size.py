"""What an export will take on disk, before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence

from ..adapter.formats.registry import parse_config
from ..base.errors import AdapterError, BundleDamaged
from ..bundle.manifest import AdapterEntry
from ..bundle.reader import Bundle
from ..bundle.tensor_file import DTYPES
from ..schemes.registry import packed_scheme
from ..schemes.scheme import Size, itemsize

_ORIGINAL_ITEMSIZE = 2
"""Bytes of an element of the original factors: at least, as the manifest does not say their dtype."""


def export_bytes(
    bundle: Bundle,
    adapters: Sequence[AdapterEntry],
    rank: int | None,
    dtype: str | None,
    *,
    pad: bool = True,
    one_rank: bool = False,
) -> int:
    """About the bytes of ``adapters`` written out, each truncated to ``rank`` and stored in ``dtype``, where given.

    The factors of one in a cluster take as much as the shared bases of its modules do, or with ``pad`` as much as if
    all had its largest rank; ``one_rank`` pads the originals with patterns, too. Raises BundleDamaged for a
    configuration that is not what the manifest says.
    """
    manifest = bundle.manifest
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    sides = [module.d_out + module.d_in for module in manifest.modules]
    widths = [sum(sides[index] for index in indices) for indices in manifest.module_sets]
    inputs = [max(manifest.modules[index].d_in for index in indices) for indices in manifest.module_sets]
    whole = []  # per cluster, d_out + d_in over all modules of its basis
    for cluster in manifest.clusters:
        sets = {manifest.adapters[index].module_set for shard in cluster.shards for index in shard.adapters}
        whole.append(sum(sides[index] for index in {i for each in sets for i in manifest.module_sets[each]}))
    total = 0.0
    for adapter in adapters:
        width = widths[adapter.module_set]
        original = bundle.scheme(adapter).keeps_factors
        if adapter.cluster is None:
            size, (kept, patterns) = float(sizes[str(adapter.individual)]), _own_rank(bundle, adapter)
            if packed_scheme(adapter.scheme):
                size = 0.0  # what is packed tells nothing of what is written: its rank does
        else:
            cluster = manifest.clusters[adapter.cluster]
            size, patterns = sizes[cluster.basis] * width / whole[adapter.cluster], False
            kept = min(cluster.rank, inputs[adapter.module_set])
        stored = _ORIGINAL_ITEMSIZE if original else DTYPES[manifest.parameters.dtype].itemsize
        itemsize = stored if dtype is None else DTYPES[dtype].itemsize
        size *= itemsize / stored
        if kept is not None:
            kept = max(kept, 1)  # of nothing that is kept, a column of zeros is written
            truncated = rank is not None and rank < kept
            written = min(kept, rank or kept)
            padded = pad and (not original or truncated or (one_rank and patterns))
            of_one_rank = float(width * written * itemsize)
            # Modules below the largest rank lose less of theirs than its share, or are padded to it.
            size = max(size * written / kept, of_one_rank if padded else min(size, of_one_rank))
        total += size + (sizes[adapter.extras] if adapter.extras is not None else 0)
    return round(total)


def check_room(bundle: Bundle, adapters: Sequence[AdapterEntry]) -> None:
    """Raise BundleDamaged where the manifest has modules larger than the files that their tensors are in.

    So `export_bytes` is no more than what is there lets it be, and not a lack of space on the disk.
    """
    manifest = bundle.manifest
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    dtype = DTYPES[manifest.parameters.dtype].itemsize
    least: dict[tuple[str, int], int] = {}
    for adapter in adapters:
        key = adapter.scheme, adapter.module_set
        if key not in least:
            scheme, modules = bundle.scheme(adapter), bundle.modules(adapter)
            tensors_of = scheme.shared_tensors if scheme.shared else scheme.own_tensors
            specs = [spec for each in modules for spec in tensors_of(Size(each.d_out, each.d_in), 1).values()]
            least[key] = sum(spec.least_elements * min(map(itemsize, spec.dtypes), default=dtype) for spec in specs)
        file = str(adapter.individual) if adapter.cluster is None else manifest.clusters[adapter.cluster].basis
        if sizes[file] < least[key]:
            raise BundleDamaged(f"{bundle.path / file}: {sizes[file]} bytes, too few for modules of these sizes")


def _own_rank(bundle: Bundle, adapter: AdapterEntry) -> tuple[int | None, bool]:
    """The largest rank of an adapter kept individually, if known, and whether its configuration has patterns.

    An SVD keeps no more than the configuration's rank and the smaller side of a module, whatever rank was asked for;
    the updates of DoRA have a higher rank than their configuration.
    """
    svd = adapter.rank
    if svd is not None:
        svd = min(svd, max(min(module.d_out, module.d_in) for module in bundle.modules(adapter)))
    try:
        config = parse_config(adapter.name, bundle.config_text(adapter))
    except AdapterError:  # a configuration that did not make these factors
        return svd, False
    known = [rank for rank in (svd, config.largest_rank) if rank is not None]
    return min(known, default=None), config.has_patterns
