"""A bundle, read: one tensor at a time, straight from its files."""

from __future__ import annotations

import json
import os
import stat
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BundleDamaged
from .manifest import MANIFEST_NAME, AdapterEntry, ClusterEntry, Manifest, ModuleEntry, ShardEntry, read_manifest

_OPEN_FILES = 128


class Bundle:
    """An opened bundle. Opening reads the manifest only; `lorazip verify` is what checks the rest."""

    def __init__(self, path: Path, operations: tuple[str, ...] = ("read",)) -> None:
        """Raises as `read_manifest`; ``operations`` ("read", "export") say which required features matter."""
        self.path = path
        self.manifest: Manifest = read_manifest(path, operations)
        self._lock = Lock()
        self._handles: OrderedDict[str, Any] = OrderedDict()
        self._rows: dict[tuple[str, frozenset[int]], dict[int, int]] = {}

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all its files, the manifest included."""
        return sum(entry.size_bytes for entry in self.manifest.files) + (self.path / MANIFEST_NAME).stat().st_size

    @cached_property
    def digest(self) -> str:
        """The ``manifest_sha256`` of its manifest, which stands for all of the bundle."""
        return str(json.loads((self.path / MANIFEST_NAME).read_bytes())["manifest_sha256"])

    def index(self, adapter: AdapterEntry) -> int:
        """The position of an adapter in the manifest."""
        return self._indices[adapter.name]

    def shard(self, adapter: AdapterEntry) -> ShardEntry:
        """The shard that holds the cores of an adapter in a cluster."""
        return self._shards[self.index(adapter)]

    def modules(self, adapter: AdapterEntry) -> list[ModuleEntry]:
        """The modules that an adapter has."""
        return [self.manifest.modules[index] for index in self.manifest.module_sets[adapter.module_set]]

    def rows(self, shard: ShardEntry, module: str) -> dict[int, int]:
        """The row of every adapter, by its index, in the stacked cores of ``module`` in ``shard``; rows ascend."""
        having = self._having[module]
        key = shard.path, having  # few, since most modules are in the same module sets
        if key not in self._rows:
            adapters = self.manifest.adapters
            held = [index for index in shard.adapters if adapters[index].module_set in having]
            self._rows[key] = {index: row for row, index in enumerate(held)}
        return self._rows[key]

    def basis(self, cluster: ClusterEntry, module: str) -> tuple[Tensor, Tensor]:
        """U [d_out, R_U] and V [d_in, R_V], in the dtype of the bundle."""
        return self.tensor(cluster.basis, f"{module}.U"), self.tensor(cluster.basis, f"{module}.V")

    def core(self, adapter: AdapterEntry, module: str) -> Tensor:
        """Σ of an adapter in a cluster: [R_U, R_V], or its diagonal [R]."""
        shard = self.shard(adapter)
        return self.tensor(shard.path, f"{module}.core", row=self.rows(shard, module)[self.index(adapter)])

    def cores(self, shard: ShardEntry, module: str) -> Tensor:
        """All Σ of a shard, stacked by `rows`: [n, R_U, R_V], or their diagonals [n, R]; mapped, not in memory."""
        return self.tensor(shard.path, f"{module}.core")

    def individual(self, adapter: AdapterEntry, module: str) -> tuple[Tensor, Tensor, float]:
        """B [d_out, r], A [r, d_in] and the scale of an adapter kept on its own: ΔŴ = scale · B A."""
        if adapter.individual is None:
            raise ValueError(f"{adapter.name} is not kept individually")
        b, a = self.tensor(adapter.individual, f"{module}.B"), self.tensor(adapter.individual, f"{module}.A")
        scale = 1.0
        if adapter.scheme == "original":
            scale = float(self.tensor(adapter.individual, f"{module}.scale"))
        return b, a, scale

    def extras(self, adapter: AdapterEntry) -> dict[str, Tensor]:
        """The tensors of an adapter that are no LoRA factors, by their names in the source."""
        if adapter.extras is None:
            return {}
        return {name: self.tensor(adapter.extras, name) for name in self.names(adapter.extras)}

    def config(self, adapter: AdapterEntry) -> dict[str, Any]:
        """The adapter's original ``adapter_config.json``."""
        try:
            return dict(json.loads((self.path / adapter.config).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise BundleDamaged(f"{self.path / adapter.config}: not the JSON of a configuration: {error}") from None

    def names(self, file: str) -> list[str]:
        """The names of the tensors in a file of the bundle."""
        return list(self._handle(file).keys())

    def metadata(self, file: str) -> dict[str, str]:
        """The metadata in the header of a file of the bundle."""
        return self._handle(file).metadata() or {}

    def tensor(self, file: str, name: str, row: int | None = None) -> Tensor:
        """One tensor of a file of the bundle, or one row of it. Raises BundleDamaged when it is not there."""
        try:
            handle = self._handle(file)
            tensor: Tensor = handle.get_tensor(name) if row is None else handle.get_slice(name)[row]
        except SafetensorError as error:
            raise BundleDamaged(f"{self.path / file}: tensor {name}: {error}") from None
        return tensor

    def _handle(self, file: str) -> Any:
        with self._lock:
            if file not in self._handles:
                try:
                    if not stat.S_ISREG(os.stat(self.path / file).st_mode):  # opening a pipe would wait for ever
                        raise BundleDamaged(f"{self.path / file}: not a file")
                    self._handles[file] = safe_open(self.path / file, framework="pt")
                except (SafetensorError, OSError) as error:
                    raise BundleDamaged(f"{self.path / file}: {error}", "run 'lorazip verify' for all damage") from None
                while len(self._handles) > _OPEN_FILES:
                    self._handles.popitem(last=False)
            self._handles.move_to_end(file)
            return self._handles[file]

    @cached_property
    def _shards(self) -> dict[int, ShardEntry]:
        shards = [shard for cluster in self.manifest.clusters for shard in cluster.shards]
        return {index: shard for shard in shards for index in shard.adapters}

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {adapter.name: index for index, adapter in enumerate(self.manifest.adapters)}

    @cached_property
    def _having(self) -> dict[str, frozenset[int]]:
        """The module sets that every module is in."""
        sets = [frozenset(indices) for indices in self.manifest.module_sets]
        return {
            module.name: frozenset(number for number, indices in enumerate(sets) if index in indices)
            for index, module in enumerate(self.manifest.modules)
        }
