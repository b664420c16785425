"""Exported adapters, loaded by PEFT itself, answer as the base model with U Σ Vᵀ added to its weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from testing import peft_fixtures as fixtures
from testing import random_adapters as ra
from testing.reference_reader import ReferenceReader
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.formats.writer import write_adapter
from lorazip_core.adapter.module import Module
from lorazip_core.adapter.reader import Adapter, open_adapter
from lorazip_core.base.digests import safe_name, sha256_file
from lorazip_core.base.errors import BundleDamaged, OutputExists, Unsupported, UsageError
from lorazip_core.base.filesystem import tree
from lorazip_core.base.threads import at_most
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.manifest import (
    AdapterEntry,
    ClusterEntry,
    Manifest,
    ModuleEntry,
    Parameters,
    ShardEntry,
    SourceEntry,
    required_to_read,
)
from lorazip_core.bundle.reader import Bundle
from lorazip_core.bundle.tensor_file import DTYPES
from lorazip_core.bundle.writer import BundleWriter
from lorazip_core.compress.run import compress
from lorazip_core.export import exporter, vllm
from lorazip_core.export.exporter import ExportReport, export
from lorazip_core.export.size import export_bytes
from lorazip_core.maths.factored import truncated_svd
from lorazip_core.planning.options import CompressOptions
from lorazip_core.schemes.coded import Coded
from lorazip_core.schemes.joined import Joined
from lorazip_core.verify.run import verify


def bundle_of(
    root: Path, out: Path, scheme: str, rank: int, *, dtype: str = "f32", rename: Any = None, error: float = 0.125
) -> Path:
    """A bundle of the adapters below ``root`` that all have one scheme, on random bases: a crude encoder."""
    out.mkdir()
    collection = open_collection(root)
    generator = torch.Generator().manual_seed(0)
    writer, kind = BundleWriter(out), DTYPES[dtype]
    modules = list(collection.modules)
    entries, clusters, packed = [], [], []
    shared = scheme in ("joint", "diag")
    if shared:
        basis, cores = {}, {}
        for module in modules:
            u = torch.linalg.qr(torch.randn(module.d_out, min(rank, module.d_out), generator=generator)).Q
            v = torch.linalg.qr(torch.randn(module.d_in, min(rank, module.d_in), generator=generator)).Q
            if scheme == "diag":
                u, v = (side[:, : min(u.shape[1], v.shape[1])] for side in (u, v))
            updates = [product(adapter, module.name) for adapter in collection.adapters if module.name in adapter.parts]
            core = torch.stack([u.T @ update @ v for update in updates])
            basis |= {f"{module.name}.U": u.to(kind), f"{module.name}.V": v.to(kind)}
            cores[f"{module.name}.core"] = (core.diagonal(dim1=1, dim2=2) if scheme == "diag" else core).to(kind)
        digest = writer.add_tensors("bases/0.safetensors", basis).sha256
        writer.add_tensors("cores/0.safetensors", cores, basis_sha256=digest)
        shard = ShardEntry("cores/0.safetensors", list(range(len(collection.adapters))), digest)
        clusters.append(ClusterEntry(scheme, rank, "bases/0.safetensors", [shard]))
    sets: list[list[int]] = []
    for adapter in collection.adapters:
        safe = safe_name(adapter.name)
        module_set = [number for number, module in enumerate(modules) if module.name in adapter.parts]
        if module_set not in sets:
            sets.append(module_set)
        config = writer.add_bytes(f"configs/{safe}.json", adapter.config_text).path
        individual = extras = None
        if scheme == "coded":
            own = [coded(adapter, module.name, rank) for module in modules if module.name in adapter.parts]
            packed.append({suffix: Joined.of([tensors[suffix] for tensors in own]) for suffix in Coded.own})
            individual = "individual/coded.safetensors"
        elif not shared:
            tensors = individual_tensors(adapter, scheme, rank, kind)
            individual = writer.add_tensors(f"individual/{safe}.safetensors", tensors).path
        if adapter.extras:
            heads = {key: adapter.extra(key) for key in adapter.extras}
            extras = writer.add_tensors(f"extras/{safe}.safetensors", heads).path
        read = [path for path in adapter.files if path.name != "adapter_config.json"]
        files = [SourceEntry(path.name, path.stat().st_size, sha256_file(path)) for path in read]
        entries.append(
            AdapterEntry(
                name=rename(adapter.name) if rename else adapter.name,
                scheme=scheme,
                cluster=0 if shared else None,
                module_set=sets.index(module_set),
                rank=rank if scheme in ("svd", "coded") else None,
                individual=individual,
                extras=extras,
                config=config,
                base_model=adapter.config.base_model,
                files=files,
                squared_norm=1.0,
                squared_error=error,
                mean_module_squared_error=0.25,
                worst_module=None,
                because="method",
            )
        )
    if packed:
        writer.add_tensors("individual/coded.safetensors", Coded().pack(packed))
    method = "svd" if scheme == "original" else scheme
    features = {module.kind for module in modules} | ({"extras"} if any(entry.extras for entry in entries) else set())
    writer.finish(
        Manifest(
            created_by="a test",
            requires={"read": required_to_read(entries), "export": sorted(features)},
            base_model=collection.base_model,
            parameters=Parameters(method, rank, 1, dtype, 0, "adapter", None),
            modules=[
                ModuleEntry(name=m.name, kind=m.kind, d_out=m.d_out, d_in=m.d_in, kernel=list(m.kernel))
                for m in modules
            ],
            module_sets=sets,
            clusters=clusters,
            adapters=entries,
            skipped=[],
            files=writer.files,
        )
    )
    return out


def readme_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def product(adapter: Adapter, module: str) -> Tensor:
    b, a = adapter.factors(module)
    return b @ a


def individual_tensors(adapter: Adapter, scheme: str, rank: int, kind: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for name, part in adapter.parts.items():
        if scheme == "original":
            b, a = adapter.stored_factors(name)
            tensors[f"{name}.scale"] = torch.tensor(part.scale, dtype=torch.float64)
        else:
            b, a = (factor.to(kind) for factor in truncated_svd(*adapter.factors(name), rank))
        tensors |= {f"{name}.B": b, f"{name}.A": a}
    return tensors


def coded(adapter: Adapter, module: str, rank: int) -> dict[str, Tensor]:
    """Singular components whose entries are rounded to 127 steps."""
    us, vt = truncated_svd(*adapter.factors(module), rank)
    sides = [(side / side.abs().amax(1, keepdim=True).clamp_min(1e-30) * 127).round() for side in (us.mT, vt)]
    lengths = sides[0].norm(dim=1) * sides[1].norm(dim=1)
    scale = (32 * (us.norm(dim=0) / lengths.clamp_min(1)).clamp_min(1e-30).log2()).round()
    return {"u": sides[0].to(torch.int8), "v": sides[1].to(torch.int8), "scale": scale.to(torch.int16)}


def stored_updates(path: Path, name: str) -> dict[str, Tensor]:
    """ΔŴ of every module of an adapter, straight from the files of a bundle."""
    bundle = Bundle(path)
    entry = next(entry for entry in bundle.manifest.adapters if entry.name == name)
    updates = {}
    for module in (module.name for module in bundle.modules(entry)):
        if entry.scheme == "coded":
            updates[module] = torch.from_numpy(ReferenceReader(path).update(name, module)).float()
            continue
        if entry.individual is not None:
            tensors = load_file(path / entry.individual)
            scale = float(tensors.get(f"{module}.scale", torch.tensor(1.0)))
            updates[module] = scale * (tensors[f"{module}.B"].float() @ tensors[f"{module}.A"].float())
            continue
        basis, cores = load_file(path / "bases/0.safetensors"), load_file(path / "cores/0.safetensors")
        having = [other.name for other in bundle.manifest.adapters if module in {m.name for m in bundle.modules(other)}]
        core = cores[f"{module}.core"][having.index(name)].float()
        core = core.diag() if core.ndim == 1 else core
        updates[module] = basis[f"{module}.U"].float() @ core @ basis[f"{module}.V"].float().T
    return updates


def with_updates(base: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    """``base`` with the updates added to its weights."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, update in updates.items():
            layer = model.get_submodule(name)
            turned = update.T if isinstance(layer, (Conv1D, nn.Embedding)) else update
            layer.weight.add_(turned.reshape(layer.weight.shape))
    return model


def loads_as(folder: Path, make: Callable[[], nn.Module], expected: nn.Module, tolerance: float = 2e-5) -> nn.Module:
    """PEFT loads the folder: every factor used, scaled as lorazip reads it, and the logits of ``expected``."""
    model = fixtures.load_strictly(folder, make())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    adapter = open_adapter("exported", folder)
    assert {name.removeprefix("base_model.model.") for name in layers} == set(adapter.parts)
    scales = {name.removeprefix("base_model.model."): layer.scaling["default"] for name, layer in layers.items()}
    assert scales == {name: part.scale for name, part in adapter.parts.items()}
    base = make()
    answer, wanted = fixtures.logits(model, base), fixtures.logits(expected, base)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(answer, wanted, rtol=0, atol=tolerance * scale)
    assert (answer - fixtures.logits(base, base)).abs().max() > 50 * tolerance * scale
    return model


Q_UP = {"target_modules": ["q", "up"], "r": 4, "lora_alpha": 6}
LLAMA = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (fixtures.tokens, Q_UP),
    "rslora with patterns": (
        fixtures.tokens,
        Q_UP | {"use_rslora": True, "rank_pattern": {"layers.0.q": 2, "up": 7}, "alpha_pattern": {"layers.1.q": 3}},
    ),
    "layers_to_transform": (fixtures.tokens, Q_UP | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "regex targets": (fixtures.tokens, Q_UP | {"target_modules": r"layers\.1\.(q|down)"}),
    "exclude_modules": (fixtures.tokens, Q_UP | {"exclude_modules": ["layers.0.q"]}),
    "embedding": (fixtures.tokens, {"target_modules": ["embed_tokens", "q"], "r": 3}),
    "convolution": (fixtures.image, {"target_modules": ["stem", "mix", "head"], "r": 3, "lora_alpha": 5}),
    "Conv1D": (fixtures.gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    "causal LM": (fixtures.llama, {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"}),
    "name at the top": (fixtures.twins, {"target_modules": r"proj|inner\.other", "r": 4}),
    "name that ends another": (
        fixtures.twins,
        {"target_modules": ["proj", "other"], "r": 4, "rank_pattern": {"^proj": 2}, "alpha_pattern": {"^proj": 3}},
    ),
    "initialised otherwise": (fixtures.tokens, Q_UP | {"init_lora_weights": "eva"}),
}


def make_collection(root: Path, kind: str, count: int = 3) -> tuple[Any, dict[str, nn.Module]]:
    make, fields = KINDS[kind]
    return make, {f"a{i}": fixtures.save_adapter(root / f"a{i}", make(), seed=i, **fields) for i in range(count)}


# What a kind of adapter asks of an export has little to do with the scheme: all kinds with one, all schemes with one.
STORED = [
    pytest.param(scheme, kind, marks=[] if scheme == "coded" or kind == "rslora with patterns" else pytest.mark.slow)
    for scheme in ("joint", "diag", "svd", "coded", "original")
    for kind in KINDS
]


@pytest.mark.parametrize(("scheme", "kind"), STORED)
def test_export_is_the_stored_update(tmp_path: Path, scheme: str, kind: str) -> None:
    make, _ = make_collection(tmp_path / "in", kind, 2)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", scheme, 3)
    report = export(bundle, tmp_path / "out")
    assert [adapter.path for adapter in report.adapters] == ["a0", "a1"]
    for name in ("a0", "a1"):
        expected = with_updates(make(), stored_updates(bundle, name))
        loads_as(tmp_path / "out" / name, make, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_full_rank_is_the_original(tmp_path: Path, kind: str) -> None:
    make, originals = make_collection(tmp_path / "in", kind, 1)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 1000)
    export(bundle, tmp_path / "out")
    loads_as(tmp_path / "out" / "a0", make, originals["a0"])


def test_adapters_of_different_modules(tmp_path: Path) -> None:
    targets = {"a": ["q"], "b": ["up", "down"], "c": ["q", "head"]}
    for name, modules in targets.items():
        fixtures.save_adapter(tmp_path / "in" / name, fixtures.tokens(), seed=1, target_modules=modules, r=2)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 9)
    export(bundle, tmp_path / "out")
    for name in targets:
        expected = with_updates(fixtures.tokens(), stored_updates(bundle, name))
        loads_as(tmp_path / "out" / name, fixtures.tokens, expected)


EXTRAS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (fixtures.llama_classifier, {"target_modules": ["q_proj"], "r": 2, "task_type": "SEQ_CLS"}),
    "modules_to_save": (fixtures.tokens, Q_UP | {"modules_to_save": ["head"]}),
    "lora_bias": (fixtures.tokens, Q_UP | {"target_modules": ["up"], "lora_bias": True}),
    "bias all": (fixtures.tokens, Q_UP | {"bias": "all"}),
    "bias lora_only": (fixtures.tokens, Q_UP | {"bias": "lora_only"}),
    "trainable tokens": (fixtures.llama, {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [1, 5]}),
}


@pytest.mark.parametrize("kind", EXTRAS)
def test_extras_come_back(tmp_path: Path, kind: str) -> None:
    make, fields = EXTRAS[kind]
    original = fixtures.save_adapter(tmp_path / "in" / "a", make(), **fields)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 1000)
    export(bundle, tmp_path / "out")
    exported = fixtures.load_strictly(tmp_path / "out" / "a", make())
    torch.testing.assert_close(
        fixtures.logits(exported, make()), fixtures.logits(original, make()), rtol=1e-4, atol=1e-4
    )
    before, after = (load_file(tmp_path / folder / "a" / fixtures.WEIGHTS) for folder in ("in", "out"))
    assert set(before) == set(after)
    # Without the extras the answer is another one, so they are used.
    fixtures.edit_weights(
        tmp_path / "out" / "a",
        lambda tensors: [tensor.zero_() for key, tensor in tensors.items() if "lora_" not in key or "bias" in key],
    )
    emptied = fixtures.load_adapter(tmp_path / "out" / "a", make())
    assert (fixtures.logits(emptied, make()) - fixtures.logits(original, make())).abs().max() > 1e-2


def test_head_saved_without_modules_to_save(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), **Q_UP)
    head = torch.full((5, 12), 0.5)
    key = "base_model.model.head.weight"
    fixtures.edit_weights(tmp_path / "in" / "a", lambda tensors: tensors.update({key: head}))
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 4), tmp_path / "out")
    model = fixtures.load_strictly(tmp_path / "out" / "a", fixtures.tokens())
    torch.testing.assert_close(model.base_model.model.head.weight.detach(), head)


@pytest.fixture
def simple(tmp_path: Path) -> Path:
    """A bundle of three adapters a0, a1, a2 on linear layers."""
    make_collection(tmp_path / "in", "linear")
    return bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 6)


def test_config_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "a"
    fixtures.save_adapter(folder, fixtures.tokens(), **Q_UP, use_rslora=True, lora_dropout=0.25)
    fixtures.edit_config(
        folder,
        base_model_name_or_path="org/base",
        revision="abc",
        target_modules=["q", "q", "up", "not_there"],
        task_type="FEATURE_EXTRACTION",
        auto_mapping={"base_model_class": "Tokens", "parent_library": "fixtures"},
        loftq_config={"loftq_bits": 4},
        eva_config={"rho": 2.0},
        a_field_from_the_future=[1],
    )
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 3), tmp_path / "out")
    before, after = (json.loads((tmp_path / side / "a" / fixtures.CONFIG).read_text()) for side in ("in", "out"))
    changed = {key: after[key] for key in after if before.get(key) != after[key]}
    assert changed == {
        "r": 3,
        "lora_alpha": 3,
        "use_rslora": False,
        "loftq_config": {},
        "eva_config": None,
    }


def test_only_those_named(simple: Path, tmp_path: Path) -> None:
    report = export(simple, tmp_path / "out", adapters=["a2", "a0", "a2"])
    assert [adapter.name for adapter in report.adapters] == ["a0", "a2"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a0", "a2", "export.json"]


def test_unknown_name_lists_the_closest(simple: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no adapter 'a9'.*did you mean 'a\d'"):
        export(simple, tmp_path / "out", adapters=["a0", "a9"])
    with pytest.raises(UsageError, match="lorazip info"):
        export(simple, tmp_path / "out", adapters=["unheard of"])
    assert not (tmp_path / "out").exists()


def test_names_may_be_patterns(tmp_path: Path) -> None:
    for name in ("fv_a", "fv_b", "team/fv_c", "x[1]"):
        fixtures.save_adapter(tmp_path / "in" / name, fixtures.tokens(), **Q_UP)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 2)

    def names(*patterns: str) -> list[str]:
        return [one.name for one in export(bundle, tmp_path / "out", adapters=patterns, force=True).adapters]

    assert names("fv_*") == ["fv_a", "fv_b"]
    assert names("*fv_?", "fv_a") == ["fv_a", "fv_b", "team/fv_c"]
    assert names("x[1]") == ["x[1]"]  # a name is itself before it is a pattern
    with pytest.raises(UsageError, match=r"no adapter 'fv-\*'.*did you mean 'fv_"):
        names("fv_a", "fv-*")


def test_report(simple: Path, tmp_path: Path) -> None:
    report = export(simple, tmp_path / "out")
    assert (report.format, report.target, report.max_lora_rank) == ("peft", None, None)
    assert report.output == str(tmp_path / "out")
    first = report.adapters[0]
    assert (first.name, first.path, first.rank, first.scheme, first.squared_error) == ("a0", "a0", 6, "joint", None)
    assert first.squared_distance is not None
    assert 0 < first.squared_distance < 1e-12
    assert first.squared_error_bound == pytest.approx(0.125, rel=1e-5)
    written = msgspec.json.decode((tmp_path / "out" / "export.json").read_bytes(), type=ExportReport)
    assert written == msgspec.structs.replace(report, output=".")
    assert written.schema == "lorazip.export/1"


def test_same_bytes_twice(simple: Path, tmp_path: Path) -> None:
    export(simple, tmp_path / "one")
    export(simple, tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 10
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_readme_tells_the_origin(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "team" / "x"
    fixtures.save_adapter(folder, fixtures.tokens(), **Q_UP)
    fixtures.edit_config(folder, base_model_name_or_path="org/base")
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 3), tmp_path / "out")
    text = (tmp_path / "out" / "team" / "x" / "README.md").read_text()
    assert text.startswith('---\nbase_model: "org/base"\nlibrary_name: peft\n')
    for word in (sha256_file(folder / fixtures.WEIGHTS), "`team/x`", "basis of rank 3", "0.125", "PeftModel"):
        assert word in text


@pytest.mark.parametrize("base", [None, "", "/home/someone/models/base", "./base", "a/b/c", 'x"\n---\nlicense: mit'])
def test_readme_names_only_hub_models_in_its_front_matter(tmp_path: Path, base: str | None) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), **Q_UP)
    fixtures.edit_config(tmp_path / "in" / "a", base_model_name_or_path=base)
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 3), tmp_path / "out")
    front = (tmp_path / "out" / "a" / "README.md").read_text().split("---\n")[1]
    assert front == "library_name: peft\ntags:\n- lora\n- lorazip\n"
    config = json.loads((tmp_path / "out" / "a" / fixtures.CONFIG).read_text())
    assert config["base_model_name_or_path"] == base


@pytest.mark.parametrize("scheme", ["joint", "diag", "svd", "coded", "original"])
def test_rank_truncates(tmp_path: Path, scheme: str) -> None:
    make_collection(tmp_path / "in", "linear", 1)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", scheme, 6)
    report = export(bundle, tmp_path / "out", rank=2)
    assert (report.adapters[0].rank, report.adapters[0].squared_error) == (2, None)
    updates = {}
    kept = total = 0.0
    for name, update in stored_updates(bundle, "a0").items():
        u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
        updates[name] = (u[:, :2] * s[:2] @ vh[:2]).float()
        kept, total = kept + float(s[:2].square().sum()), total + float(s.square().sum())
    loads_as(tmp_path / "out" / "a0", fixtures.tokens, with_updates(fixtures.tokens(), updates))
    moved = re.search(r"truncated it further.* moved the update by ([\d.e-]+) of", readme_of(tmp_path / "out" / "a0"))
    assert moved is not None
    assert float(moved[1]) == pytest.approx(total - kept, rel=1e-3)  # the bundle claims ‖ΔW‖² = 1


def test_rank_above_all_changes_nothing(simple: Path, tmp_path: Path) -> None:
    plain, ranked = export(simple, tmp_path / "one"), export(simple, tmp_path / "two", rank=6)
    assert plain.adapters == ranked.adapters
    file = Path("a1") / fixtures.WEIGHTS
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": -1}, {"dtype": "int4"}, {"format": "gguf"}, {"target": "tgi"}]
)
def test_senseless_options(simple: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises((UsageError, Unsupported), match=str(next(iter(options.values())))):
        export(simple, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stored", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("wanted", [None, "bf16", "f16", "f32"])
def test_dtype(tmp_path: Path, stored: str, wanted: str | None) -> None:
    make_collection(tmp_path / "in", "linear", 1)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 6, dtype=stored)
    export(bundle, tmp_path / "out", dtype=wanted)
    tensors = load_file(tmp_path / "out" / "a0" / fixtures.WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[wanted or stored]}
    expected = with_updates(fixtures.tokens(), stored_updates(bundle, "a0"))
    tolerance = {"bf16": 2e-2, "f16": 2e-3, "f32": 2e-5}[wanted or stored]
    model = fixtures.load_adapter(tmp_path / "out" / "a0", fixtures.tokens())
    base = fixtures.tokens()
    answer, right = fixtures.logits(model, base), fixtures.logits(expected, base)
    torch.testing.assert_close(answer, right, rtol=0, atol=tolerance * float(right.abs().max()))


MIXED = {"A": torch.float32, "B": torch.bfloat16}


@pytest.mark.parametrize("fields", [{"lora_alpha": 8}, {"use_rslora": True, "r": 8, "lora_alpha": 16}])
def test_original_comes_back_bit_for_bit(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Also with an A of another dtype than B, ranks of patterns, a scale that bf16 does not have, and a bias."""
    folder = tmp_path / "in" / "a"
    patterns = {"rank_pattern": {"layers.0.q": 2, "up": 7}, "alpha_pattern": {"layers.1.q": 3}}
    fixtures.save_adapter(folder, fixtures.tokens(), **Q_UP | fields | patterns)
    fixtures.edit_weights(
        folder,
        lambda tensors: tensors.update({key: value.to(MIXED[key[-8]]) for key, value in tensors.items()}),
    )
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 4, dtype="bf16", error=0.0)
    (one,) = export(bundle, tmp_path / "out").adapters
    assert (one.squared_error, one.squared_distance, one.squared_error_bound) == (0, 0, 0)
    before, after = (load_file(tmp_path / side / "a" / fixtures.WEIGHTS) for side in ("in", "out"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key])
    assert (tmp_path / "out" / "a" / fixtures.CONFIG).read_text() == canonical(folder / fixtures.CONFIG)
    assert "Its own factors, bfloat16, float32" in readme_of(tmp_path / "out" / "a")


def canonical(config: Path) -> str:
    return json.dumps(json.loads(config.read_text()), indent=2, sort_keys=True) + "\n"


def test_a_bias_of_lora_b_comes_back_under_the_own_scale(tmp_path: Path) -> None:
    fields = Q_UP | {"target_modules": ["up"], "lora_bias": True, "lora_alpha": 5}
    original = fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), **fields)
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 4), tmp_path / "out")
    exported, base = fixtures.load_strictly(tmp_path / "out" / "a", fixtures.tokens()), fixtures.tokens()
    torch.testing.assert_close(fixtures.logits(exported, base), fixtures.logits(original, base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bias_of_an_original_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    """Under √8, which no dtype holds."""
    fields = Q_UP | {"target_modules": ["up"], "lora_bias": True, "r": 8, "lora_alpha": 8, "use_rslora": True}
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), dtype=dtype, **fields)
    fixtures.edit_weights(
        tmp_path / "in" / "a",
        lambda tensors: tensors.update(
            {key: torch.randn(value.shape).to(dtype) for key, value in tensors.items() if key.endswith(".bias")}
        ),
    )
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 4, dtype="bf16", error=0.0)
    export(bundle, tmp_path / "out")
    before, after = (load_file(tmp_path / side / "a" / fixtures.WEIGHTS) for side in ("in", "out"))
    biases = [key for key in before if key.endswith(".lora_B.bias")]
    assert biases
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in biases)
    assert "extras-differ" not in {finding.kind for finding in verify(bundle, against=tmp_path / "in").findings}


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("joint", {}),
        ("svd", {"rank": 2}),
        ("svd", {"dtype": "bf16"}),
        ("original", {"rank": 2}),
        ("original", {"dtype": "bf16"}),
        ("original", {"target": "vllm"}),
        ("coded", {}),
        ("coded", {"rank": 2}),
    ],
)
def test_what_an_export_adds_is_measured(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    """The distance of the files written to the update stored, in dense float64, and the bound that follows."""
    fields = {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 6, "rank_pattern": {"up_proj": 7}}
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), dtype=torch.float16, use_rslora=True, **fields)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", scheme, 4, dtype="f16")
    (one,) = export(bundle, tmp_path / "out", **options).adapters
    opened, written = Bundle(bundle), open_adapter("a", tmp_path / "out" / "a")
    moved = 0.0
    entry = opened.manifest.adapters[0]
    for module in opened.modules(entry):
        b, a = decode(opened, entry, module, torch.float64)
        exported_b, exported_a = written.factors(module.name, torch.float64)
        moved += float((b @ a - exported_b @ exported_a).square().sum())
    assert one.squared_error is None
    assert one.squared_distance == pytest.approx(moved, rel=1e-9)  # the bundle claims ‖ΔW‖² = 1
    assert moved > 1e-9
    assert one.squared_error_bound == pytest.approx((0.125**0.5 + moved**0.5) ** 2)
    assert f"at most {one.squared_error_bound:.6g}" in readme_of(tmp_path / "out" / "a")


@pytest.mark.parametrize("options", [{}, {"dtype": "f32"}, {"rank": 9}])
def test_nothing_added_is_the_claim_of_the_bundle(tmp_path: Path, options: dict[str, Any]) -> None:
    make_collection(tmp_path / "in", "linear", 1)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 3, dtype="bf16")
    (one,) = export(bundle, tmp_path / "out", **options).adapters
    assert (one.squared_error, one.squared_distance, one.squared_error_bound) == (0.125, 0, 0.125)
    assert "Squared error against the original: 0.125" in readme_of(tmp_path / "out" / "a0")


def uneven(root: Path) -> Path:
    """A bundle of one adapter that svd keeps at the ranks 3 and 7."""
    fixtures.save_adapter(root / "in" / "a", fixtures.llama(), r=3, rank_pattern={"up_proj": 7}, **LLAMA)
    return bundle_of(root / "in", root / "bundle", "svd", 7)


def test_ranks_are_padded_to_one(tmp_path: Path) -> None:
    bundle = uneven(tmp_path)
    (one,) = export(bundle, tmp_path / "out").adapters
    assert (one.rank, one.squared_distance) == (7, 0)
    config = json.loads((tmp_path / "out" / "a" / fixtures.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (7, 7, {}, {})
    for key, tensor in load_file(tmp_path / "out" / "a" / fixtures.WEIGHTS).items():
        assert tensor.shape[0 if "lora_A" in key else 1] == 7
    assert "padded with zeros to one rank" in readme_of(tmp_path / "out" / "a")
    loads_as(tmp_path / "out" / "a", fixtures.llama, with_updates(fixtures.llama(), stored_updates(bundle, "a")))


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("original", {}),
        ("original", {"dtype": "f32"}),
        ("original", {"target": "vllm"}),
        ("coded", {}),
        ("coded", {"rank": 2}),
        ("original", {"rank": 5}),
        ("svd", {}),
        ("svd", {"pad": False}),
        ("svd", {"rank": 4, "dtype": "f32"}),
        ("svd", {"rank": 4, "pad": False}),
    ],
)
def test_the_space_that_is_planned_is_that_taken(tmp_path: Path, scheme: str, options: dict[str, Any]) -> None:
    """Also of ranks 3 and 31 padded to one, and where a truncated SVD was asked for more than there is."""
    fields = LLAMA | {"r": 3, "rank_pattern": {"up_proj": 31}}
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), dtype=torch.float16, **fields)
    opened = Bundle(bundle_of(tmp_path / "in", tmp_path / "bundle", scheme, 64, dtype="f16"))
    export(opened.path, tmp_path / "out", **options)
    taken = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "a" / fixtures.WEIGHTS).values())
    wanted = {"rank": None, "dtype": None} | options
    wanted["one_rank"] = wanted.pop("target", None) == "vllm"
    planned = export_bytes(opened, opened.manifest.adapters, **wanted)
    assert taken <= planned < 1.5 * taken


def test_the_space_for_what_is_nothing_is_planned(tmp_path: Path) -> None:
    """An update that is zero keeps no component, and is written as a column of zeros."""
    ra.write_collection(tmp_path / "in", (ra.Recipe("a", zero=True),))
    compress(tmp_path / "in", tmp_path / "bundle", CompressOptions())
    opened = Bundle(tmp_path / "bundle")
    assert [adapter.rank for adapter in opened.manifest.adapters] == [0]
    export(opened.path, tmp_path / "out")
    taken = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "a" / fixtures.WEIGHTS).values())
    assert export_bytes(opened, opened.manifest.adapters, None, None) == taken


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, ["its own factors, as they were.", "Its own factors, float16, with"]),
        ({"dtype": "bf16"}, ["its own factors.", "Its own factors, bfloat16, with"]),
        ({"rank": 2}, ["from which the export computed others", "of each truncated update, else its own"]),
        ({"target": "vllm"}, ["from which the export computed others", "its own A, and its own B with the scale"]),
    ],
)
def test_the_card_of_an_original_says_which_factors(tmp_path: Path, options: dict[str, Any], told: list[str]) -> None:
    fields = LLAMA | {"r": 3, "rank_pattern": {"up_proj": 7}}
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), dtype=torch.float16, **fields)
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 4), tmp_path / "out", **options)
    card = readme_of(tmp_path / "out" / "a")
    assert all(words in card for words in told)
    assert ("as they were" in card) == (not options)


def test_ranks_stay_uneven_if_asked(tmp_path: Path) -> None:
    bundle = uneven(tmp_path)
    assert main(["export", str(bundle), "-o", str(tmp_path / "out"), "--no-pad", "-q"]) == 0
    config = json.loads((tmp_path / "out" / "a" / fixtures.CONFIG).read_text())
    assert config["r"] == 7
    assert set(config["rank_pattern"].values()) == {3}
    loads_as(tmp_path / "out" / "a", fixtures.llama, with_updates(fixtures.llama(), stored_updates(bundle, "a")))
    with pytest.raises(UsageError, match="one rank"):
        export(bundle, tmp_path / "vllm", target="vllm", pad=False)


def test_experts_need_no_rank_pattern(tmp_path: Path) -> None:
    """PEFT with Transformers 5 refuses patterns for models with experts."""
    names = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(2)]
    modules = {
        Module(name, "linear", 6, 5): (torch.ones(6, 1 + i), torch.ones(1 + i, 5)) for i, name in enumerate(names)
    }
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["up_proj"],
        "rank_pattern": {"1.up_proj": 2},
    }
    write_adapter(tmp_path / "in" / "a", config, modules, {}, "")
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 2), tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "a" / fixtures.CONFIG).read_text())["rank_pattern"]


OLD_FIELDS = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "task_type")


@pytest.mark.parametrize("scheme", ["joint", "original"])
def test_no_field_is_added(tmp_path: Path, scheme: str) -> None:
    """A PEFT from before a field refuses even its default."""
    make_collection(tmp_path / "in", "causal LM", 1)
    config = json.loads((tmp_path / "in" / "a0" / fixtures.CONFIG).read_text())
    (tmp_path / "in" / "a0" / fixtures.CONFIG).write_text(json.dumps({field: config[field] for field in OLD_FIELDS}))
    export(bundle_of(tmp_path / "in", tmp_path / "bundle", scheme, 3), tmp_path / "out")
    after = json.loads((tmp_path / "out" / "a0" / fixtures.CONFIG).read_text())
    assert set(after) == set(OLD_FIELDS)
    assert after["target_modules"] == config["target_modules"]


def test_bytes_do_not_depend_on_threads(simple: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        with at_most(workers):
            export(simple, tmp_path / str(workers))
    assert list(tree(tmp_path / "1")) == list(tree(tmp_path / "3"))
    for file in tree(tmp_path / "1"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes()


def test_adapters_are_written_by_threads_of_one_core(simple: Path, tmp_path: Path) -> None:
    seen = set()
    with pytest.MonkeyPatch.context() as patch:
        real = exporter.write_adapter
        patch.setattr(exporter, "write_adapter", lambda *args: (seen.add(torch.get_num_threads()), real(*args)))
        export(simple, tmp_path / "out")
    assert seen == {1}


def test_overflow_is_refused(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), **Q_UP | {"lora_alpha": 4e6})
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 4)
    with pytest.raises(Unsupported, match=r"'a'.*layers\.0\.q.*float16.*«dtype»"):
        export(bundle, tmp_path / "out", dtype="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "in"]


def test_existing_output(simple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(simple, out)
    with pytest.raises(OutputExists):
        export(simple, out, adapters=["a1"])
    assert (out / "a0").is_dir()
    export(simple, out, adapters=["a1"], force=True)
    assert sorted(path.name for path in out.iterdir()) == ["a1", "export.json"]


@pytest.mark.parametrize("foreign", ["notes.txt", "a0/optimizer.pt", "b/adapter_config.json"])
def test_force_does_not_delete_what_others_wrote(simple: Path, tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    export(simple, out)
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    with pytest.raises(OutputExists, match="not written by lorazip"):
        export(simple, out, force=True)
    assert (out / foreign).read_text() == "mine"


def test_a_folder_in_place_of_the_report_is_not_that_of_an_export(simple: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "export.json").mkdir(parents=True)
    assert main(["export", str(simple), "-o", str(out), "--force", "-q"]) == OutputExists.exit_code
    assert (out / "export.json").is_dir()


def test_force_does_not_delete_the_bundle(simple: Path, tmp_path: Path) -> None:
    for output in (simple, simple / "cores", tmp_path / "in"):
        with pytest.raises((UsageError, OutputExists)):
            export(simple, output, force=True)
    export(simple, tmp_path / "out")


def test_collection_root_is_an_adapter(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in", fixtures.tokens(), **Q_UP)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 4)
    assert export(bundle, tmp_path / "out").adapters[0].path == "."
    loads_as(tmp_path / "out", fixtures.tokens, with_updates(fixtures.tokens(), stored_updates(bundle, ".")))
    export(bundle, tmp_path / "out", force=True)


def test_collection_root_among_others(tmp_path: Path) -> None:
    for folder in (tmp_path / "in", tmp_path / "in" / "a", tmp_path / "in" / "a" / "b"):
        fixtures.save_adapter(folder, fixtures.tokens(), **Q_UP)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 4)
    report = export(bundle, tmp_path / "out")
    assert [adapter.path for adapter in report.adapters] == [safe_name("."), "a", "a/b"]
    assert len(open_collection(tmp_path / "out").adapters) == 3
    export(bundle, tmp_path / "out", force=True)


@pytest.mark.parametrize("name", ["..", "../up", "a/../../up", "/absolute", "a//b", "a/.", "", "a\0b"])
def test_names_never_lead_outside(tmp_path: Path, name: str) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), **Q_UP)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 4, rename=lambda _: name)
    with pytest.raises(BundleDamaged, match="no path below a folder"):
        export(bundle, tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "in"]


def test_name_of_a_file_that_export_writes(tmp_path: Path) -> None:
    for name in ("export.json", "README.md/x"):
        fixtures.save_adapter(tmp_path / "in" / name, fixtures.tokens(), **Q_UP)
    report = export(bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 4), tmp_path / "out")
    assert [adapter.path for adapter in report.adapters] == [safe_name("README.md/x"), safe_name("export.json")]


def test_a_name_too_long_for_a_file_system(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), **Q_UP)
    long = f"b/{'é' * 128}"
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 4, rename=lambda _: long)
    assert export(bundle, tmp_path / "out").adapters[0].path == safe_name(long)


def test_vllm_gets_one_rank_without_patterns(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), r=3, rank_pattern={"up_proj": 9}, **LLAMA)
    fixtures.save_adapter(tmp_path / "in" / "b", fixtures.llama(), r=5, use_rslora=True, **LLAMA)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 1)
    report = export(bundle, tmp_path / "out", target="vllm")
    assert report.max_lora_rank == 16
    assert [adapter.rank for adapter in report.adapters] == [9, 5]
    for name, rank, alpha, rslora in (("a", 9, 9, False), ("b", 5, 8, True)):
        config = json.loads((tmp_path / "out" / name / fixtures.CONFIG).read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, alpha, rslora)
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        assert not config["modules_to_save"]
        for key, tensor in load_file(tmp_path / "out" / name / fixtures.WEIGHTS).items():
            assert re.fullmatch(r"base_model\.model\.model\.layers\.\d\..*\.(q|up)_proj\.lora_[AB]\.weight", key)
            assert tensor.shape[0 if "lora_A" in key else 1] == rank
        expected = with_updates(fixtures.llama(), stored_updates(bundle, name))
        loads_as(tmp_path / "out" / name, fixtures.llama, expected)


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (257, 320), (321, 512), (512, 512)])
def test_vllm_ranks(tmp_path: Path, rank: int, allowed: int) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), r=rank, **LLAMA)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 1)
    assert export(bundle, tmp_path / "out", target="vllm").max_lora_rank == allowed


def test_vllm_rank_has_an_end(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), r=513, **LLAMA)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 1)
    with pytest.raises(Unsupported, match="513"):
        export(bundle, tmp_path / "out", target="vllm")
    assert not (tmp_path / "out").exists()
    assert export(bundle, tmp_path / "out", target="vllm", rank=4).max_lora_rank == 8


@pytest.mark.parametrize(
    ("make", "fields", "reason"),
    [
        (fixtures.llama_classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, "score.weight"),
        (fixtures.tokens, {"target_modules": ["up"], "lora_bias": True}, "lora_B.bias"),
        (fixtures.tokens, {"target_modules": ["up"], "bias": "all"}, "bias"),
        (fixtures.gpt2, {"target_modules": ["wte"], "fan_in_fan_out": True}, "wte is an embedding of another name"),
        (fixtures.tokens, {"target_modules": ["embed_tokens", "head"]}, "embed_tokens is no full path"),
        (fixtures.llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}, "trainable_tokens"),
        (fixtures.image, {"target_modules": ["stem"]}, "stem is a convolution"),
        (fixtures.tokens, {"target_modules": ["q"]}, r"layers\.0\.q is no full path"),
        (fixtures.llama, {"target_modules": ["q_proj"], "modules_to_save": ["not_there"]}, "modules_to_save"),
        (fixtures.llama, {"target_modules": ["q_proj"], "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_vllm_refusals(tmp_path: Path, make: Any, fields: dict[str, Any], reason: str) -> None:
    for name in ("bad", "worse"):
        fixtures.save_adapter(tmp_path / "in" / name, make(), r=2, **fields)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 2)
    with pytest.raises(Unsupported, match=reason) as caught:
        export(bundle, tmp_path / "out", target="vllm")
    message = str(caught.value)
    assert "\n" not in message
    assert "'bad'" in message
    assert "'worse'" in message
    assert not (tmp_path / "out").exists()
    assert len(export(bundle, tmp_path / "out").adapters) == 2


def test_vllm_takes_the_good_ones(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "good", fixtures.llama(), r=2, **LLAMA)
    fixtures.save_adapter(tmp_path / "in" / "bad", fixtures.llama(), r=2, bias="all", **LLAMA)
    fixtures.edit_config(tmp_path / "in" / "bad", bias="lora_only")
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 2)
    with pytest.raises(Unsupported, match="1 of 2 adapters") as caught:
        export(bundle, tmp_path / "out", target="vllm")
    assert "'good'" not in str(caught.value)
    assert export(bundle, tmp_path / "out", target="vllm", adapters=["good"]).max_lora_rank == 8


def test_vllm_takes_an_embedding_and_a_head(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    original = fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), r=2, **fields)
    saved = "base_model.model.lm_head.base_layer.weight"  # PEFT saves the weights of the base model, vLLM skips them
    assert any(key.endswith(".base_layer.weight") for key in load_file(tmp_path / "in" / "a" / fixtures.WEIGHTS)) or (
        fixtures.edit_weights(tmp_path / "in" / "a", lambda tensors: tensors.update({saved: torch.zeros(40, 16)}))
        is None
    )
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 2)
    assert export(bundle, tmp_path / "out", target="vllm").max_lora_rank == 8
    written = load_file(tmp_path / "out" / "a" / fixtures.WEIGHTS)
    assert written["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (2, 40)
    exported = fixtures.load_adapter(tmp_path / "out" / "a", fixtures.llama())
    base = fixtures.llama()
    torch.testing.assert_close(fixtures.logits(exported, base), fixtures.logits(original, base), rtol=0, atol=1e-4)


def test_vllm_does_not_take_a_larger_head() -> None:
    head = ModuleEntry(name="lm_head", d_out=258_049, d_in=8)
    assert vllm._module_reason(head) == "module lm_head has 258049 rows, more than 258048"
    assert vllm._module_reason(msgspec.structs.replace(head, d_out=258_048)) is None
