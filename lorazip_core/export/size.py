"""What an export will take on disk, from the manifest alone."""

from __future__ import annotations

from collections.abc import Sequence

from ..bundle import DTYPES, AdapterEntry, Bundle


def export_bytes(bundle: Bundle, adapters: Sequence[AdapterEntry], rank: int | None, dtype: str | None) -> int:
    """About the bytes of ``adapters`` written out, each truncated to ``rank`` and stored in ``dtype``, where given.

    The factors of one in a cluster take as much as the shared bases of its modules do.
    """
    manifest = bundle.manifest
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    sides = [module.d_out + module.d_in for module in manifest.modules]
    widths = [sum(sides[index] for index in indices) for indices in manifest.module_sets]
    whole = []  # per cluster, d_out + d_in over all modules of its basis
    for cluster in manifest.clusters:
        sets = {manifest.adapters[index].module_set for shard in cluster.shards for index in shard.adapters}
        whole.append(sum(sides[index] for index in {i for each in sets for i in manifest.module_sets[each]}))
    stored = DTYPES[manifest.parameters.dtype].itemsize
    total = 0.0
    for adapter in adapters:
        if adapter.cluster is None:
            size, kept = float(sizes[str(adapter.individual)]), adapter.rank
        else:
            cluster = manifest.clusters[adapter.cluster]
            size = sizes[cluster.basis] * widths[adapter.module_set] / whole[adapter.cluster]
            kept = cluster.rank
        if rank is not None and kept is not None:
            size *= min(1, rank / kept)
        if dtype is not None and adapter.scheme != "original":
            size *= DTYPES[dtype].itemsize / stored
        total += size + (sizes[adapter.extras] if adapter.extras is not None else 0)
    return round(total)
