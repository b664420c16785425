"""Which adapters differ between two bundles, told from their manifests: what a server has to load, and to drop."""

from __future__ import annotations

from typing import NamedTuple

from ..adapter.formats.names import CONFIG_NAME
from ..base.errors import UsageError
from .manifest import AdapterEntry, Manifest


class Changes(NamedTuple):
    """Names of adapters, each list in the order of its manifest."""

    added: list[str]
    """Only in the new one."""
    removed: list[str]
    """Only in the old one."""
    changed: list[str]
    """In both, but other tensors, on another basis, or from other sources."""


def changes(old: Manifest, new: Manifest) -> Changes:
    """What is different in ``new``. Whoever has the tensors of ``old`` needs those of ``added`` and ``changed``.

    An adapter is the same if the digests of the file of its own tensors and of its basis are, and those of its extras,
    its configuration and its sources. A file that is the rest of another one counts as that, since its tensors are.

    Raises UsageError if the bundles are not of one base model.
    """
    if old.base_model != new.base_model:
        raise UsageError(
            f"a bundle of the base model {new.base_model!r} is no successor of one of {old.base_model!r}",
            "compress its adapters into a bundle of their own",
        )
    before, after = _identities(old), _identities(new)
    return Changes(
        [name for name in after if name not in before],
        [name for name in before if name not in after],
        [name for name, identity in after.items() if name in before and before[name] != identity],
    )


def _identities(manifest: Manifest) -> dict[str, object]:
    """By name, what an adapter is the same by."""
    files = {entry.path: entry.origin for entry in manifest.files}
    shards = {
        index: shard.path for cluster in manifest.clusters for shard in cluster.shards for index in shard.adapters
    }
    modules = [tuple(manifest.modules[index] for index in indices) for indices in manifest.module_sets]
    return {
        adapter.name: (
            adapter.scheme,
            files[shards[index] if adapter.individual is None else adapter.individual],
            None if adapter.cluster is None else files[manifest.clusters[adapter.cluster].basis],
            None if adapter.extras is None else files[adapter.extras],
            files[adapter.config],
            _sources(adapter),
            modules[adapter.module_set],
        )
        for index, adapter in enumerate(manifest.adapters)
    }


def _sources(adapter: AdapterEntry) -> frozenset[tuple[str, str]]:
    """Which of those in a file it is: two with equal names may lie in equal files in different places.

    Less the configuration, which counts by itself: format 1 lists it here, too.
    """
    return frozenset((file.path, file.sha256) for file in adapter.files if file.path != CONFIG_NAME)
