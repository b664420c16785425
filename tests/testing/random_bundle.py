"""A small valid bundle of random adapters with everything a format knows, 2 or 1, made without the encoder.

Errors are computed from dense updates with numpy, so that what reads the bundle can be judged by it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from lorazip_core.adapter.formats.writer import write_adapter
from lorazip_core.adapter.lock import Origin
from lorazip_core.adapter.module import Module
from lorazip_core.base.digests import canonical_json, safe_name, sha256_bytes, sha256_file
from lorazip_core.bundle.manifest import (
    SHARED_EXTRAS,
    AdapterEntry,
    ClusterEntry,
    Manifest,
    ModuleEntry,
    ModuleError,
    Parameters,
    ShardEntry,
    SkippedEntry,
    SourceEntry,
    required_to_read,
)
from lorazip_core.bundle.tensor_file import DTYPES
from lorazip_core.bundle.writer import BundleWriter
from lorazip_core.schemes.joined import Joined
from lorazip_core.schemes.registry import packed_scheme

BASE = "org/base"
MODULES = [
    Module("embed", "embedding", 6, 40),
    Module("layers.0.conv", "conv", 12, 12, (2, 2)),
    Module("layers.0.q_proj", "linear", 24, 20),
    Module("layers.0.v_proj", "linear", 8, 20),
]
JOINT_RANK, DIAG_RANK, SVD_RANK = 10, 7, 2
LARGEST_CODES = (60, 7, 2, 1)  # of components, the last one's last: one for each way to pack codes
EXTRA = "base_model.model.score.weight"


@dataclass
class Sketch:
    """An adapter to make: its modules by position, its rank, and how the bundle keeps it."""

    name: str
    scheme: str
    modules: list[int]
    rank: int
    zero: bool = False
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    scale: float = 2.0
    origin: Origin | None = None
    dropped: list[int] = field(default_factory=list)
    """Modules of which nothing is kept, where the scheme can do that."""


HUB = Origin(repository="alice/loras", revision="main", commit="0123456789" * 4, subfolder="a b", license="apache-2.0")
LOCAL = Origin(directory="/home/bob/adapters", subfolder="c")
SKETCHES = [
    Sketch("a", "joint", [0, 1, 2, 3], 3, extras={EXTRA: torch.arange(6.0).reshape(2, 3)}, origin=HUB),
    Sketch("b/c", "joint", [2, 3], 4, dtype=torch.bfloat16, scale=0.5, origin=LOCAL),
    Sketch("d", "joint", [1, 2], 3),
    Sketch("e", "diag", [0, 2, 3], 2),
    Sketch("f", "diag", [2], 5, dtype=torch.float16),
    Sketch("g", "svd", [0, 1, 2, 3], 3),
    Sketch("h", "original", [1, 3], 2, extras={EXTRA: torch.tensor([[1, 2]])}, dtype=torch.bfloat16, scale=1 / 3),
    Sketch("z", "joint", [2, 3], 3, zero=True),
    Sketch("za", "coded", [0, 1, 2, 3], 4, dtype=torch.bfloat16),
    Sketch("zb", "coded", [1, 2, 3], 2, scale=0.25, dropped=[3]),
]
ALIKE = [replace(sketch, extras=SKETCHES[0].extras) if sketch.name in "dg" else sketch for sketch in SKETCHES]
"""The same where three adapters have equal extras."""
OF_FORMAT_1 = [sketch for sketch in SKETCHES if sketch.scheme != "coded"]
UNEVEN = [
    Sketch("d", "joint", [1, 3], 3),
    Sketch("f", "diag", [0, 1], 2),
    Sketch("g", "original", [0, 1, 2, 3], 19, dtype=torch.float16),
    Sketch("h", "original", [2], 1, dtype=torch.float32),
    Sketch("i", "svd", [1, 2, 3], 3),
    Sketch("za", "coded", [0, 2, 3], 4, dropped=[2]),
]
"""Ranks of 0 to 19, each adapter with modules of its own."""
Clusters = tuple[tuple[str, list[list[str]]], ...]
"""Of every cluster its scheme and the adapters of its shards."""
CLUSTERS: Clusters = (("joint", [["a", "b/c", "z"], ["d"]]), ("diag", [["e", "f"]]))


PACKED = "individual/coded-0.safetensors"


def make_bundle(
    root: Path,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    sketches: list[Sketch] = SKETCHES,
    modules: list[Module] = MODULES,
    clusters: Clusters = CLUSTERS,
    version: Literal[1, 2] = 2,
) -> Path:
    """Write originals to ``root/originals`` and their bundle to ``root/bundle``; returns the latter.

    Every sketch of a scheme with clusters has to be in one of the ``clusters``, which may name others.
    """
    maker = _Maker(root, dtype, seed, sketches, modules, clusters)
    maker.make()
    if version == 1:
        _as_format_1(maker)
    return maker.bundle


class _Maker:
    def __init__(
        self, root: Path, dtype: str, seed: int, sketches: list[Sketch], modules: list[Module], clusters: Clusters
    ) -> None:
        self.originals, self.bundle = root / "originals", root / "bundle"
        self.dtype_name, self.dtype = dtype, DTYPES[dtype]
        self.generator = torch.Generator().manual_seed(seed)
        self.sketches, self.modules = sketches, modules
        self.by_name = {sketch.name: sketch for sketch in sketches}
        here = [
            (scheme, [[name for name in shard if self._is_of(name, scheme)] for shard in all_])
            for scheme, all_ in clusters
        ]
        self.clusters = [(scheme, [*filter(None, shards)]) for scheme, shards in here if any(shards)]
        """Those of the sketches."""
        self.factors: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.stored: dict[tuple[str, int], np.ndarray] = {}
        self.bundle.mkdir(parents=True)
        self.writer = BundleWriter(self.bundle)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def make(self) -> None:
        for sketch in self.sketches:
            if sketch.scheme != "coded":
                self._original(sketch)
        clusters = [self._cluster(number, scheme, shards) for number, (scheme, shards) in enumerate(self.clusters)]
        ranks = self._packed()
        sets = sorted({tuple(sketch.modules) for sketch in self.sketches})
        adapters = [self._entry(sketch, clusters, sets, ranks.get(sketch.name)) for sketch in self.sketches]
        used = sorted({index for each in sets for index in each})
        assert used == list(range(len(self.modules)))
        extras = {"extras"} if any(sketch.extras for sketch in self.sketches) else set()
        self.writer.finish(
            Manifest(
                created_by="lorazip tests",
                requires={
                    "read": required_to_read(adapters),
                    "export": sorted({module.kind for module in self.modules} | extras),
                },
                base_model=BASE,
                parameters=Parameters("joint", JOINT_RANK, 1, self.dtype_name, 0, "adapter", None),
                modules=[
                    ModuleEntry(name=m.name, kind=m.kind, d_out=m.d_out, d_in=m.d_in, kernel=list(m.kernel))
                    for m in self.modules
                ],
                module_sets=[list(each) for each in sets],
                clusters=clusters,
                adapters=adapters,
                skipped=[SkippedEntry("bad", "module layers.0.q_proj has lora_A but no lora_B")],
                files=self.writer.files,
            )
        )

    def _original(self, sketch: Sketch) -> None:
        factors = {}
        for index in sketch.modules:
            module = self.modules[index]
            b, a = self.normal(module.d_out, sketch.rank), self.normal(sketch.rank, module.d_in)
            b, a = (b * 0 if sketch.zero else b).to(sketch.dtype), a.to(sketch.dtype)
            factors[module] = (b, a)
            self.factors[sketch.name, index] = (b, a)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": BASE,
            "r": sketch.rank,
            "lora_alpha": sketch.scale * sketch.rank,
            "target_modules": [self.modules[index].name for index in sketch.modules],
        }
        (self.originals / sketch.name).parent.mkdir(parents=True, exist_ok=True)
        write_adapter(self.originals / sketch.name, config, factors, sketch.extras, "random")

    def _is_of(self, name: str, scheme: str) -> bool:
        return name in self.by_name and self.by_name[name].scheme == scheme

    def dense(self, sketch: Sketch, index: int) -> np.ndarray:
        b, a = (factor.double().numpy() for factor in self.factors[sketch.name, index])
        return sketch.scale * b @ a

    def _cluster(self, number: int, scheme: str, names_of_shards: list[list[str]]) -> ClusterEntry:
        rank = JOINT_RANK if scheme == "joint" else DIAG_RANK
        members = [self.by_name[name] for names in names_of_shards for name in names]
        assert {sketch.scheme for sketch in members} == {scheme}
        bases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        tensors = {}
        for index in sorted({index for sketch in members for index in sketch.modules}):
            module = self.modules[index]
            sides = []
            for side, size in (("U", module.d_out), ("V", module.d_in)):
                if scheme == "joint":
                    basis = torch.linalg.qr(self.normal(size, min(rank, size))).Q
                else:
                    basis = torch.nn.functional.normalize(self.normal(size, rank), dim=0)
                tensors[f"{module.name}.{side}"] = basis.to(self.dtype)
                sides.append(basis.to(self.dtype).double())
            bases[index] = (sides[0], sides[1])
        path = f"bases/{number:03d}.safetensors"
        digest = self.writer.add_tensors(path, tensors).sha256
        shards = []
        for part, names in enumerate(names_of_shards):
            shard_path = f"cores/{number:03d}-{part:03d}.safetensors"
            cores = self._cores(scheme, [self.by_name[name] for name in names], bases)
            self.writer.add_tensors(shard_path, cores, basis_sha256=digest)
            indices = [[sketch.name for sketch in self.sketches].index(name) for name in names]
            shards.append(ShardEntry(shard_path, indices, digest))
        return ClusterEntry(scheme, rank, path, shards)

    def _cores(
        self, scheme: str, members: list[Sketch], bases: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        tensors = {}
        for index, (u, v) in bases.items():
            rows = []
            for sketch in members:
                if index in sketch.modules:
                    full = u.mT @ torch.from_numpy(self.dense(sketch, index)) @ v
                    core = (full if scheme == "joint" else full.diagonal()).to(self.dtype)
                    rows.append(core)
                    middle = core.double() if scheme == "joint" else torch.diag(core.double())
                    self.stored[sketch.name, index] = (u @ middle @ v.mT).numpy()
            if rows:
                tensors[f"{self.modules[index].name}.core"] = torch.stack(rows)
        return tensors

    def _individual(self, sketch: Sketch) -> str:
        tensors = {}
        for index in sketch.modules:
            name = self.modules[index].name
            b, a = self.factors[sketch.name, index]
            if sketch.scheme == "original":
                tensors[f"{name}.scale"] = torch.tensor(sketch.scale, dtype=torch.float64)
                scale = sketch.scale
            else:
                u, s, vt = np.linalg.svd(self.dense(sketch, index))
                b = torch.from_numpy(u[:, :SVD_RANK] * s[:SVD_RANK]).to(self.dtype)
                a = torch.from_numpy(vt[:SVD_RANK]).to(self.dtype)
                scale = 1.0
            tensors[f"{name}.B"], tensors[f"{name}.A"] = b, a
            self.stored[sketch.name, index] = scale * b.double().numpy() @ a.double().numpy()
        path = f"individual/{safe_name(sketch.name)}.safetensors"
        self.writer.add_tensors(path, tensors)
        return path

    def _packed(self) -> dict[str, int]:
        """Write the file of all adapters of scheme `coded`; the rank of each."""
        ranks, adapters = {}, []
        for sketch in self.sketches:
            if sketch.scheme == "coded":
                self._original(sketch)  # so late that others have the numbers that they have without these
                modules = [self._coded(sketch, index) for index in sketch.modules]
                ranks[sketch.name] = max(len(module["scale"]) for module in modules)
                adapters.append(
                    {suffix: Joined.of([module[suffix] for module in modules]) for suffix in ("u", "v", "scale")}
                )
        if adapters:
            scheme = packed_scheme("coded")
            assert scheme is not None
            self.writer.add_tensors(PACKED, scheme.pack(adapters))
        return ranks

    def _coded(self, sketch: Sketch, index: int) -> dict[str, torch.Tensor]:
        """The components of a module, the entries of each rounded to as many steps as it has."""
        kept = 0 if index in sketch.dropped else sketch.rank
        largest = np.array(LARGEST_CODES[len(LARGEST_CODES) - kept :])[:, None]
        u, s, vt = np.linalg.svd(self.dense(sketch, index))
        sides = [np.rint(side / np.abs(side).max(1, keepdims=True) * largest) for side in (u.T[:kept], vt[:kept])]
        lengths = np.prod([np.linalg.norm(side, axis=1) for side in sides], axis=0)
        scales = np.rint(32 * np.log2(s[:kept] / lengths))
        self.stored[sketch.name, index] = (sides[0] * 2.0 ** (scales / 32)[:, None]).T @ sides[1]
        codes = [torch.from_numpy(side.astype(np.int8)) for side in sides]
        return {"u": codes[0], "v": codes[1], "scale": torch.from_numpy(scales.astype(np.int16))}

    def _entry(
        self, sketch: Sketch, clusters: list[ClusterEntry], sets: list[tuple[int, ...]], rank: int | None
    ) -> AdapterEntry:
        individual = extras = cluster = None
        if sketch.scheme in ("joint", "diag"):
            [cluster] = [
                number
                for number, (_, shards) in enumerate(self.clusters)
                if any(sketch.name in names for names in shards)
            ]
        elif sketch.scheme == "coded":
            individual = PACKED
        else:
            individual = self._individual(sketch)
        if sketch.extras:
            extras = f"extras/{safe_name(sketch.name)}.safetensors"
            extras = self.writer.add_shared(extras, sketch.extras).path
        folder = self.originals / sketch.name
        config = f"configs/{safe_name(sketch.name)}.json"
        config = self.writer.add_shared_bytes(config, (folder / "adapter_config.json").read_bytes()).path
        norms = {i: float((self.dense(sketch, i) ** 2).sum()) for i in sketch.modules}
        gaps = {i: float(((self.dense(sketch, i) - self.stored[sketch.name, i]) ** 2).sum()) for i in sketch.modules}
        ratios = {i: gaps[i] / norms[i] if norms[i] else 0.0 for i in sketch.modules}
        worst = max(ratios, key=lambda index: ratios[index])
        return AdapterEntry(
            name=sketch.name,
            scheme=sketch.scheme,
            cluster=cluster,
            module_set=sets.index(tuple(sketch.modules)),
            rank=SVD_RANK if sketch.scheme == "svd" else rank,
            individual=individual,
            extras=extras,
            config=config,
            files=[_source(folder, "adapter_model.safetensors")],
            squared_norm=sum(norms.values()),
            squared_error=0.0 if sketch.zero else sum(gaps.values()) / sum(norms.values()),
            mean_module_squared_error=sum(ratios.values()) / len(ratios),
            worst_module=None if sketch.zero else ModuleError(self.modules[worst].name, ratios[worst]),
            because="method",
            origin=sketch.origin,
        )


def _source(folder: Path, name: str) -> SourceEntry:
    return SourceEntry(name, (folder / name).stat().st_size, sha256_file(folder / name))


def _as_format_1(maker: _Maker) -> None:
    """Write what may be left out, and give every adapter a configuration of its own."""
    fields, bundle = load_manifest(maker.bundle), maker.bundle
    left_out = {"cluster": None, "module_set": 0, "rank": None, "individual": None, "extras": None, "because": "method"}
    for place, module in enumerate(fields["modules"]):
        fields["modules"][place] = {"kind": "linear", "kernel": []} | module
    configs = {}
    for place, adapter in enumerate(fields["adapters"]):
        config = _source(maker.originals / adapter["name"], "adapter_config.json")
        path = f"configs/{safe_name(adapter['name'])}.json"
        configs[path] = as_json(config) | {"path": path}
        (bundle / path).write_bytes((maker.originals / adapter["name"] / config.path).read_bytes())
        own = {"config": path, "files": [as_json(config), *adapter["files"]]}
        fields["adapters"][place] = left_out | {"base_model": BASE} | adapter | own
    others = [entry for entry in fields["files"] if not entry["path"].startswith("configs/")]
    fields["files"] = sorted([*others, *configs.values()], key=lambda entry: str(entry["path"]))
    fields["format_version"] = 1
    extras = [adapter["extras"] for adapter in fields["adapters"] if adapter["extras"]]
    if len(set(extras)) < len(extras):
        fields["requires"]["read"] = sorted([*fields["requires"]["read"], SHARED_EXTRAS])
    store_manifest(bundle, fields)


def store_manifest(bundle: Path, fields: dict[str, Any]) -> None:
    """Write a manifest, with its digest."""
    digest = sha256_bytes(canonical_json(fields))
    (bundle / "manifest.json").write_bytes(canonical_json(fields | {"manifest_sha256": digest}))


def load_manifest(bundle: Path) -> dict:
    """The manifest as plain JSON, without its digest."""
    fields = json.loads((bundle / "manifest.json").read_bytes())
    del fields["manifest_sha256"]
    return fields


def as_json(report: msgspec.Struct) -> dict:
    """A report as `--json` prints it."""
    return json.loads(msgspec.json.encode(report))
