"""A reader of formats 1 and 2 written from docs/format.md alone: numpy, json, hashlib and zlib, nothing of lorazip."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np

KNOWN = {1: {"joint", "diag", "svd", "original", "shared-extras"}, 2: {"joint", "diag", "svd", "coded", "original"}}
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "BF16": "<u2",
}  # fmt: skip
LARGEST = {1: 127, 2: 7, 3: 2, 5: 1}


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
        version = self.manifest["format_version"]
        if self.manifest["format"] != "lorazip.bundle" or version not in KNOWN:
            raise DamagedError("manifest.json: format")
        if unknown := set(self.manifest["requires"].get("read", [])) - KNOWN[version]:
            raise DamagedError(f"requires {unknown}")
        self.files = {entry["path"]: entry for entry in self.manifest["files"]}
        self.adapters = {adapter["name"]: adapter for adapter in self.manifest["adapters"]}

    def modules(self, adapter: str) -> list[str]:
        return [module["name"] for module in self._modules(adapter)]

    def base_model(self, adapter: str) -> str | None:
        return self.adapters[adapter].get("base_model", self.manifest["base_model"])

    def sources(self, adapter: str) -> dict[str, str]:
        """The digests of the files that an adapter was read from."""
        entry = self.adapters[adapter]
        found = {source["path"]: source["sha256"] for source in entry["files"]}
        if self.manifest["format_version"] == 2:
            found["adapter_config.json"] = self.files[entry["config"]]["sha256"]
        return found

    def update(self, adapter: str, module: str) -> np.ndarray:
        entry = self.adapters[adapter]
        if entry["scheme"] in ("svd", "original"):
            tensors, _ = self.tensors(entry["individual"])
            scale = tensors[f"{module}.scale"] if entry["scheme"] == "original" else 1.0
            return scale * (tensors[f"{module}.B"] @ tensors[f"{module}.A"])
        if entry["scheme"] == "coded":
            u, v, scale = self.components(entry["individual"])[adapter, module]
            return (u.T * 2.0 ** (scale / 32)) @ v
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
        path = self.adapters[adapter].get("extras")
        return {} if path is None else self.tensors(path)[0]

    def components(self, path: str) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of every adapter and module in a file of scheme `coded`: û [k, d_out], v̂ [k, d_in] and the scales [k]."""
        tensors, _ = self.tensors(path)
        names = [name for name, entry in self.adapters.items() if entry.get("individual") == path]
        owners = [(name, module) for name in names for module in self._modules(name)]
        data = tensors["index"].tobytes()

        def column(count: int) -> np.ndarray:
            nonlocal data
            inflated, data = _inflate(path, data, count)
            return np.frombuffer(inflated, np.uint8).astype(np.int64)

        counts = column(len(owners)) + 256 * column(len(owners))
        if any(k > min(module["d_out"], module["d_in"]) for k, (_, module) in zip(counts, owners, strict=True)):
            raise DamagedError(f"{path}: more components than there can be")
        codes = sum(k * (module["d_out"] + module["d_in"]) for k, (_, module) in zip(counts, owners, strict=True))
        longest = max(module[side] for _, module in owners for side in ("d_out", "d_in"))
        if longest > 2**28 or len(owners) > 2**20 or codes > 64 * len(tensors["codes"]):
            raise DamagedError(f"{path}: more than there may be")
        total = counts.sum()
        streams_u, apart = column(total), column(total)
        streams = np.concatenate([streams_u, (streams_u + apart) % 256])
        rest = column(total) + 256 * column(total)
        rest[rest >= 2**15] -= 2**16
        lengths = [
            module[side] for side in ("d_out", "d_in") for k, (_, module) in zip(counts, owners, strict=True)
            for _ in range(k)
        ]  # fmt: skip
        if data or any(stream >= len(tensors["kinds"]) for stream in streams):
            raise DamagedError(f"{path}: index")
        data = tensors["codes"].tobytes()
        vectors: dict[int, np.ndarray] = {}
        for stream, kind in enumerate(tensors["kinds"].tolist()):
            if kind not in LARGEST:
                raise DamagedError(f"{path}: kind {kind}")
            members = [number for number in range(2 * total) if streams[number] == stream]
            count = sum(lengths[number] for number in members)
            inflated, data = _inflate(path, data, -(-count // kind))
            codes = []
            base = 2 * LARGEST[kind] + 1
            for byte in inflated:
                if byte >= base**kind:
                    raise DamagedError(f"{path}: byte {byte}")
                codes += [byte // base**place % base - LARGEST[kind] for place in range(kind)]
            start = 0
            for number in members:
                vectors[number] = np.array(codes[start : start + lengths[number]], np.int64)
                start += lengths[number]
        if data:
            raise DamagedError(f"{path}: codes")
        found, first = {}, 0
        for k, (name, module) in zip(counts, owners, strict=True):
            mine = range(first, first + k)
            u = np.array([vectors[number] for number in mine]).reshape(k, module["d_out"])
            v = np.array([vectors[total + number] for number in mine]).reshape(k, module["d_in"])
            expected = -np.rint(16 * np.log2(np.maximum((u**2).sum(1), 1)))
            scale = rest[first : first + k] + tensors["bases"][names.index(name)] + expected
            if ((scale < -(2**15)) | (scale >= 2**15)).any():
                raise DamagedError(f"{path}: scale")
            found[name, module["name"]] = u, v, scale
            first += k
        return found

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

    def _modules(self, adapter: str) -> list[dict]:
        indices = self.manifest["module_sets"][self.adapters[adapter].get("module_set", 0)]
        return [self.manifest["modules"][index] for index in indices]

    def _names(self, shard: dict) -> list[str]:
        return [self.manifest["adapters"][index]["name"] for index in shard["adapters"]]


def _inflate(path: str, data: bytes, size: int) -> tuple[bytes, bytes]:
    """The first raw deflate stream of ``data``, which has to be of ``size`` bytes, and what is after it."""
    decoder = zlib.decompressobj(wbits=-15)
    try:
        inflated = decoder.decompress(data, size + 1)
    except zlib.error as error:
        raise DamagedError(f"{path}: {error}") from None
    if len(inflated) != size or not decoder.eof:
        raise DamagedError(f"{path}: a stream of another length")
    return inflated, decoder.unused_data
