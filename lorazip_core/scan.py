"""The first pass over the weights: digests, also against a lock, NaN and Inf, and the energy of every update."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .adapter import Adapter, Collection
from .bundle import SourceEntry, Weights
from .errors import AdapterError, AdapterErrors
from .files import canonical_json, sha256_bytes, sha256_file
from .linalg import squared_norm
from .lock import LOCK_NAME, LockedAdapter, Origin, read_lock
from .progress import Advance
from .stack import Stack
from .updates import Updates
from .workers import in_order


@dataclass(frozen=True)
class Scan:
    """A collection whose tensors are all finite, with ‖ΔW_im‖² [n, M] in float64 and, by adapter, the source files."""

    collection: Collection
    norms: Tensor
    files: list[list[SourceEntry]]
    origins: list[Origin | None]
    """Where the lock of the collection says that each adapter comes from; None for those that it does not name."""

    def updates(self, per: Weights, device: torch.device) -> Updates:
        """The collection's updates, weighted by w_im = 1/Σ_m‖ΔW_im‖², or per module by 1/‖ΔW_im‖²; 0 for zero ones."""
        adapters, modules = self.collection.adapters, self.collection.modules

        def load(module: int) -> Stack:
            name = modules[module].name
            members = [number for number, adapter in enumerate(adapters) if name in adapter.parts]
            return Stack.of([adapters[number].factors(name) for number in members], members).to(device)

        energy = self.norms.sum(1, keepdim=True).expand_as(self.norms) if per == "adapter" else self.norms
        shapes = [(module.d_out, module.d_in) for module in modules]
        ranks = torch.tensor(
            [[adapter.parts[m.name].rank if m.name in adapter.parts else 0 for m in modules] for adapter in adapters]
        )
        return Updates(load, shapes, ranks, self.norms, torch.where(energy > 0, 1 / energy, 0.0), device)

    def digests(self) -> list[str]:
        """One digest of each adapter's files, their names and what is in them."""
        return [
            sha256_bytes(canonical_json([[source.path, source.sha256] for source in files])) for files in self.files
        ]


def scan(collection: Collection, *, skip_bad: bool, advance: Advance) -> Scan:
    """Read every tensor once, adapter by adapter. ``advance`` is called with 1 for each.

    Raises AdapterErrors for NaN and Inf and for files that are not those of the collection's lock, unless ``skip_bad``:
    then these adapters leave the collection. A lock that cannot be read raises as `read_lock` does.
    """
    lock = read_lock(collection.root)
    locked = {adapter.name: adapter for adapter in lock.adapters} if lock else {}

    def read_one(adapter: Adapter) -> tuple[dict[str, float], list[SourceEntry]] | AdapterError:
        return _read(adapter, locked.get(adapter.name))

    found = in_order(read_one, collection.adapters, torch.device("cpu"))
    read: dict[str, tuple[dict[str, float], list[SourceEntry]]] = {}
    bad: list[AdapterError] = []
    for adapter, result in zip(collection.adapters, found, strict=True):
        if isinstance(result, AdapterError):
            bad.append(result)
        else:
            read[adapter.name] = result
        advance(1)
    if bad and not skip_bad:
        raise AdapterErrors(bad)
    collection = collection.without(bad)
    norms = [
        [read[adapter.name][0].get(module.name, 0.0) for module in collection.modules]
        for adapter in collection.adapters
    ]
    return Scan(
        collection,
        torch.tensor(norms, dtype=torch.float64),
        [read[adapter.name][1] for adapter in collection.adapters],
        [locked[adapter.name].origin if adapter.name in locked else None for adapter in collection.adapters],
    )


def _read(adapter: Adapter, locked: LockedAdapter | None) -> tuple[dict[str, float], list[SourceEntry]] | AdapterError:
    """‖ΔW‖² of every module and the digests of the files, or what is wrong."""
    files = [_source(adapter, path) for path in adapter.files]
    try:
        if locked is not None:  # first: NaN in a file that is another one by now says nothing about the adapter
            _check_locked(adapter, files, locked)
        norms = _module_norms(adapter)
        for key in adapter.extras:
            _check_finite(adapter, key)
    except AdapterError as error:
        return error
    return norms, files


def _check_locked(adapter: Adapter, files: list[SourceEntry], locked: LockedAdapter) -> None:
    """What is read is what was fetched. A file that the lock has and nobody reads, like a model card, may change."""
    digests = {file.path: file.sha256 for file in locked.files}
    for file in files:
        if digests.get(file.path) != file.sha256:
            what = f"not what {LOCK_NAME} has" if file.path in digests else f"not in {LOCK_NAME}"
            hint = f"fetch again with --force, or remove {LOCK_NAME}"
            raise AdapterError(adapter.name, f"{file.path} is {what}", hint)


def _module_norms(adapter: Adapter) -> dict[str, float]:
    """‖ΔW‖² of every module, computed in batches of equal shape."""
    batches: defaultdict[tuple[int, int, int], list[str]] = defaultdict(list)
    for name, part in adapter.parts.items():
        batches[part.module.d_out, part.module.d_in, part.rank].append(name)
    norms: dict[str, float] = {}
    for names in batches.values():
        b, a = zip(*(adapter.factors(name) for name in names), strict=True)
        found = squared_norm(torch.stack(b), torch.stack(a))
        if not torch.isfinite(found).all():
            for name in names:
                for key in (adapter.parts[name].key_a, adapter.parts[name].key_b):
                    _check_finite(adapter, key)
            name = names[int((~torch.isfinite(found)).nonzero()[0])]
            raise AdapterError(adapter.name, f"module {name}: its update overflows float32", "its training diverged")
        norms |= dict(zip(names, found.tolist(), strict=True))
    return norms


def _check_finite(adapter: Adapter, key: str) -> None:
    tensor = adapter.tensor(key)
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise AdapterError(adapter.name, f"tensor {key} has NaN or Inf", "its training diverged; leave it out")


def _source(adapter: Adapter, path: Path) -> SourceEntry:
    return SourceEntry(path.relative_to(adapter.folder).as_posix(), path.stat().st_size, sha256_file(path))
