"""A reader of format 1 written from docs/format.md alone: numpy, json and hashlib, nothing of lorazip."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np

KNOWN = {"joint", "diag", "svd", "original", "shared-extras"}
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BF16": "<u2"}


class DamagedError(Exception):
    pass


class ReferenceReader:
    """Opens a bundle; `update(adapter, module)` is ΔŴ [d_out, d_in] in float64."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = (path / "manifest.json").read_bytes()
        self.manifest = json.loads(data)
        rest, count = re.subn(rb'"manifest_sha256":"[0-9a-f]{64}",', b"", data)
        if count != 1 or hashlib.sha256(rest).hexdigest() != self.manifest["manifest_sha256"]:
            raise DamagedError("manifest.json: digest")
        if (self.manifest["format"], self.manifest["format_version"]) != ("lorazip.bundle", 1):
            raise DamagedError("manifest.json: format")
        if unknown := set(self.manifest["requires"].get("read", [])) - KNOWN:
            raise DamagedError(f"requires {unknown}")
        self.files = {entry["path"]: entry for entry in self.manifest["files"]}
        self.adapters = {adapter["name"]: adapter for adapter in self.manifest["adapters"]}

    def modules(self, adapter: str) -> list[str]:
        indices = self.manifest["module_sets"][self.adapters[adapter]["module_set"]]
        return [self.manifest["modules"][index]["name"] for index in indices]

    def update(self, adapter: str, module: str) -> np.ndarray:
        entry = self.adapters[adapter]
        if entry["scheme"] in ("svd", "original"):
            tensors, _ = self.tensors(entry["individual"])
            scale = tensors[f"{module}.scale"] if entry["scheme"] == "original" else 1.0
            return scale * (tensors[f"{module}.B"] @ tensors[f"{module}.A"])
        cluster = self.manifest["clusters"][entry["cluster"]]
        basis, _ = self.tensors(cluster["basis"])
        u, v = basis[f"{module}.U"], basis[f"{module}.V"]
        (shard,) = [each for each in cluster["shards"] if adapter in self._names(each)]
        cores, metadata = self.tensors(shard["path"])
        if metadata != {"basis_sha256": self.files[cluster["basis"]]["sha256"]}:
            raise DamagedError(f"{shard['path']}: of another basis")
        row = [name for name in self._names(shard) if module in self.modules(name)].index(adapter)
        core = cores[f"{module}.core"][row]
        return (u * core if entry["scheme"] == "diag" else u @ core) @ v.T

    def extras(self, adapter: str) -> dict[str, np.ndarray]:
        path = self.adapters[adapter]["extras"]
        return {} if path is None else self.tensors(path)[0]

    def config(self, adapter: str) -> dict:
        return json.loads(self.bytes_of(self.adapters[adapter]["config"]))

    def bytes_of(self, path: str) -> bytes:
        data = (self.path / path).read_bytes()
        if len(data) != self.files[path]["size_bytes"]:
            raise DamagedError(f"{path}: size")
        if hashlib.sha256(data).hexdigest() != self.files[path]["sha256"]:
            raise DamagedError(f"{path}: digest")
        return data

    def tensors(self, path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The tensors of a safetensors file, floats in float64, and its metadata."""
        data = self.bytes_of(path)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, info in header.items():
            start, end = info["data_offsets"]
            flat = np.frombuffer(data[8 + length + start : 8 + length + end], DTYPES[info["dtype"]])
            if info["dtype"] == "BF16":  # the upper half of a float32
                flat = (flat.astype("<u4") << 16).view("<f4")
            wide = flat.astype(np.float64) if flat.dtype.kind == "f" else flat
            tensors[name] = wide.reshape(info["shape"])
        return tensors, metadata

    def _names(self, shard: dict) -> list[str]:
        return [self.manifest["adapters"][index]["name"] for index in shard["adapters"]]
