"""What a manifest says of adapters that were read, and of their modules; extras and configurations are written."""

from __future__ import annotations

from typing import Literal, NamedTuple

from msgspec import UNSET
from torch import Tensor

from ..adapter.collection import Collection
from ..adapter.formats.names import CONFIG_NAME
from ..adapter.module import Module
from ..base.digests import safe_name
from ..base.text import unmarked
from ..bundle.losses import Losses
from ..bundle.manifest import AdapterEntry, ModuleEntry, ParameterEntry, SkippedEntry
from ..bundle.writer import BundleWriter
from ..reading.scan import Scan
from .individual import Kept


class Placed(NamedTuple):
    """How an adapter is kept: its scheme, and its cluster or the file of its own tensors."""

    scheme: str
    cluster: int | None = None
    individual: str | None = None
    rank: int | None = None
    because: Literal["method", "max_error"] = "method"

    @classmethod
    def alone(cls, kept: Kept, path: str) -> Placed:
        """On its own, in the file ``path``."""
        return cls(kept.scheme, None, path, kept.rank, "method" if kept.as_asked else "max_error")


def adapter_entry(
    writer: BundleWriter,
    scan: Scan,
    number: int,
    placed: Placed,
    *,
    module_set: int,
    lost: Tensor,
    base_model: str | None,
    name: str | None = None,
    added: bool = False,
) -> AdapterEntry:
    """The entry of adapter ``number`` of ``scan``, called ``name`` if that differs; its extras and configuration.

    ``lost`` [M] is ‖ΔW−ΔŴ‖² of every module, ``base_model`` that of the bundle.
    """
    adapter = scan.collection.adapters[number]
    name = adapter.name if name is None else name
    extras = None
    if adapter.extras:
        tensors = {key: adapter.extra(key) for key in adapter.extras}
        extras = writer.add_shared(writer.free(f"extras/{safe_name(name)}.safetensors"), tensors).path
    path = writer.free(f"configs/{safe_name(name)}.json")
    config = writer.add_shared_bytes(path, adapter.config_text).path
    modules = scan.ranks[number].nonzero()[:, 0].tolist()
    losses = Losses(scan.collection.modules[module].name for module in modules)
    norms, own = scan.norms[number, modules].tolist(), lost[modules].tolist()
    for module, norm, distance in zip(list(losses.norms), norms, own, strict=True):
        losses.put(module, norm, distance)
    return AdapterEntry(
        name=name,
        scheme=placed.scheme,
        cluster=placed.cluster,
        module_set=module_set,
        rank=placed.rank,
        individual=placed.individual,
        extras=extras,
        config=config,
        base_model=UNSET if adapter.config.base_model == base_model else adapter.config.base_model,
        files=[file for file in scan.files[number] if file.path != CONFIG_NAME],
        squared_norm=losses.squared_norm,
        squared_error=losses.squared_error,
        mean_module_squared_error=losses.mean_module_squared_error,
        worst_module=losses.worst_module,
        because=placed.because,
        origin=scan.origins[number],
        left_out=list(scan.collection.left_out.get(adapter.name, ())),
        added=added,
    )


def module_entry(module: Module) -> ModuleEntry:
    """What a manifest says of a module."""
    parameter = ParameterEntry(*module.parameter) if module.parameter else UNSET
    return ModuleEntry(
        name=module.name,
        kind=module.kind,
        d_out=module.d_out,
        d_in=module.d_in,
        kernel=list(module.kernel),
        parameter=parameter,
    )


def skipped_entries(collection: Collection) -> list[SkippedEntry]:
    """What was left out, with the reasons as they are stored."""
    return [SkippedEntry(skipped.name, unmarked(skipped.reason)) for skipped in collection.skipped]
