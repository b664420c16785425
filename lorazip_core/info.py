"""``info``: what is inside a bundle, from its manifest alone, and what a device holds of it if that is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from msgspec import Struct

from .adapter.lock import Origin
from .bundle.contradictions import refuse_contradictions
from .bundle.manifest import AdapterEntry, ModuleEntry, Parameters, ShardEntry, SkippedEntry
from .bundle.reader import Bundle
from .bundle.refit import reasons_to_refit
from .schemes.scheme import Size
from .vllm.capacity import ServingInfo, serving_info

if TYPE_CHECKING:
    from .serving.resident_size import ResidentSize


class ModuleShape(Struct, frozen=True):
    """A shape of target modules, and how many have it."""

    kind: str
    d_out: int
    d_in: int
    kernel: list[int]
    count: int


class ClusterInfo(Struct, frozen=True):
    """Adapters that share a basis; ``bytes_basis`` is what they share."""

    method: str
    rank: int
    adapters: int
    bytes_basis: int
    bytes_cores: int


class AdapterInfo(Struct, frozen=True):
    """An adapter; ``bytes_own`` are those of its own files and its share of files that it has with others.

    These are files of cores, and of extras that are equal.
    """

    name: str
    scheme: str
    cluster: int | None
    rank: int | None
    modules: int
    squared_error: float
    bytes_original: int
    bytes_own: int
    origin: Origin | None
    left_out: list[str] = []
    """Files that were beside it with weights that are not its own, and are not in the bundle."""
    bytes_resident: int | None = None
    """What it adds to what a device holds; null if that was not asked for."""
    added: bool = False
    """Whether it was added to the bundle after that was made."""


class ResidentInfo(Struct, frozen=True):
    """What a device holds to serve all adapters, and what of that is shared: the rest is their own."""

    bytes: int
    bytes_shared: int
    mean_bytes_own: float
    max_bytes_own: int


class InfoReport(Struct, frozen=True, kw_only=True):
    """The result of ``info``, and what ``info --json`` prints."""

    schema: Literal["lorazip.info/1"] = "lorazip.info/1"
    bundle: str
    format_version: int
    created_by: str
    base_model: str | None
    parameters: Parameters
    bytes_original: int
    bytes_bundle: int
    modules: int
    shapes: list[ModuleShape]
    clusters: list[ClusterInfo]
    adapters: list[AdapterInfo]
    skipped: list[SkippedEntry]
    resident: ResidentInfo | None = None
    """Null if it was not asked for."""
    serving: ServingInfo | None = None
    """Null if it was not asked for."""
    refit: list[str] = []
    """Why compressing all adapters again would pay; empty if it would not."""


class Serving(NamedTuple):
    """What to compare with what a device holds; sizes in bytes, as `serving_info` takes them."""

    gpu_memory: int | None = None
    cache_share: float = 0.3
    model: Path | None = None


def info(path: Path, *, resident: bool = False, serving: Serving | None = None) -> InfoReport:
    """Describe the bundle at ``path`` as its manifest does, without reading tensors: what it claims, nothing proven.

    With ``resident`` or ``serving`` all tensors are read, and what they take on a device is counted; with ``serving``
    that is compared with ordinary LoRA in vLLM, and with the memory of a GPU.

    Raises UsageError, BundleDamaged and Unsupported as opening a bundle does, and BundleDamaged for a manifest that
    contradicts itself; with ``resident`` also for tensors that do, and with ``serving`` as `serving_info`.
    """
    bundle = Bundle(path)
    manifest = bundle.manifest
    refuse_contradictions(path, manifest)
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    owners = Counter(
        path for adapter in manifest.adapters for path in (adapter.individual, adapter.config, adapter.extras) if path
    )
    shares = {index: share for shard in _shards(bundle) for index, share in _shares(bundle, shard, sizes).items()}
    held, own_resident, compared = None, None, None
    if resident or serving is not None:
        on_device = _held(bundle)
        own_resident, total = on_device.own_bytes, on_device.nbytes
        own = sum(own_resident)
        held = ResidentInfo(total, total - own, own / len(own_resident), max(own_resident))
        if serving is not None:
            compared = serving_info(bundle, on_device, **serving._asdict())
    shapes = Counter((module.kind, module.d_out, module.d_in, tuple(module.kernel)) for module in manifest.modules)
    return InfoReport(
        bundle=str(path),
        format_version=manifest.format_version,
        created_by=manifest.created_by,
        base_model=manifest.base_model,
        parameters=manifest.parameters,
        bytes_original=sum(_original(bundle, adapter) for adapter in manifest.adapters),
        bytes_bundle=bundle.size_bytes,
        modules=len(manifest.modules),
        shapes=[
            ModuleShape(kind, d_out, d_in, list(kernel), count)
            for (kind, d_out, d_in, kernel), count in sorted(shapes.items())
        ],
        clusters=[
            ClusterInfo(
                method=cluster.method,
                rank=cluster.rank,
                adapters=sum(len(shard.adapters) for shard in cluster.shards),
                bytes_basis=sizes[cluster.basis],
                bytes_cores=sum(sizes[shard.path] for shard in cluster.shards),
            )
            for cluster in manifest.clusters
        ],
        adapters=[
            AdapterInfo(
                name=adapter.name,
                scheme=adapter.scheme,
                cluster=adapter.cluster,
                rank=adapter.rank if adapter.cluster is None else manifest.clusters[adapter.cluster].rank,
                modules=len(manifest.module_sets[adapter.module_set]),
                squared_error=adapter.squared_error,
                bytes_original=_original(bundle, adapter),
                bytes_own=shares.get(index, 0)
                + sum(
                    sizes[own] // owners[own]
                    for own in (adapter.individual, adapter.config, adapter.extras)
                    if own is not None
                ),
                origin=adapter.origin,
                left_out=adapter.left_out,
                bytes_resident=None if own_resident is None else own_resident[index],
                added=adapter.added,
            )
            for index, adapter in enumerate(manifest.adapters)
        ],
        skipped=manifest.skipped,
        resident=held,
        serving=compared,
        refit=reasons_to_refit(manifest),
    )


def _held(bundle: Bundle) -> ResidentSize:
    """What a device holds of the bundle."""
    from .serving.resident_size import resident_size  # loads PyTorch: not for whoever reads the manifest only

    return resident_size(bundle)


def _original(bundle: Bundle, adapter: AdapterEntry) -> int:
    return sum(source.size_bytes for source in bundle.sources(adapter))


def _shards(bundle: Bundle) -> list[ShardEntry]:
    return [shard for cluster in bundle.manifest.clusters for shard in cluster.shards]


def _shares(bundle: Bundle, shard: ShardEntry, sizes: dict[str, int]) -> dict[int, int]:
    """A shard's bytes, divided among its adapters by the elements in their rows."""
    adapters = bundle.manifest.adapters
    elements = {
        index: sum(_own_elements(bundle, adapters[index], module) for module in bundle.modules(adapters[index]))
        for index in shard.adapters
    }
    total = sum(elements.values())
    return {index: sizes[shard.path] * own // max(total, 1) for index, own in elements.items()}


def _own_elements(bundle: Bundle, adapter: AdapterEntry, module: ModuleEntry) -> int:
    assert adapter.cluster is not None
    own = bundle.scheme(adapter).own_tensors(
        Size(module.d_out, module.d_in), bundle.manifest.clusters[adapter.cluster].rank
    )
    return sum(spec.most_elements for spec in own.values())
