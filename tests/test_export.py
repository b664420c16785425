"""Exported adapters, loaded by PEFT itself, answer as the base model with U Σ Vᵀ added to its weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import peft_fixtures as fixtures
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorazip_core.adapter import Adapter, open_adapter, open_collection
from lorazip_core.bundle import (
    DTYPES,
    AdapterEntry,
    Bundle,
    BundleWriter,
    ClusterEntry,
    Manifest,
    ModuleEntry,
    Parameters,
    ShardEntry,
    SourceEntry,
)
from lorazip_core.errors import BundleDamaged, OutputExists, Unsupported, UsageError
from lorazip_core.export import ExportReport, export
from lorazip_core.files import safe_name, sha256_file
from lorazip_core.linalg import truncated_svd


def bundle_of(root: Path, out: Path, scheme: str, rank: int, *, dtype: str = "f32", rename: Any = None) -> Path:
    """A bundle of the adapters below ``root`` that all have one scheme, on random bases: a crude encoder."""
    out.mkdir()
    collection = open_collection(root)
    generator = torch.Generator().manual_seed(0)
    writer, kind = BundleWriter(out), DTYPES[dtype]
    modules = list(collection.modules)
    entries, clusters = [], []
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
        if not shared:
            tensors = individual_tensors(adapter, scheme, rank, kind)
            individual = writer.add_tensors(f"individual/{safe}.safetensors", tensors).path
        if adapter.extras:
            heads = {key: adapter.extra(key) for key in adapter.extras}
            extras = writer.add_tensors(f"extras/{safe}.safetensors", heads).path
        files = [SourceEntry(path.name, path.stat().st_size, sha256_file(path)) for path in adapter.files]
        entries.append(
            AdapterEntry(
                name=rename(adapter.name) if rename else adapter.name,
                scheme=scheme,
                cluster=0 if shared else None,
                module_set=sets.index(module_set),
                rank=rank if scheme == "svd" else None,
                individual=individual,
                extras=extras,
                config=config,
                base_model=adapter.config.base_model,
                files=files,
                squared_norm=1.0,
                squared_error=0.125,
                mean_module_squared_error=0.25,
                worst_module=None,
                because="method",
            )
        )
    method = "svd" if scheme == "original" else scheme
    writer.finish(
        Manifest(
            created_by="a test",
            requires={},
            base_model=collection.base_model,
            parameters=Parameters(method, rank, 1, dtype, 0, "adapter", None),
            modules=[ModuleEntry(m.name, m.kind, m.d_out, m.d_in, list(m.kernel)) for m in modules],
            module_sets=sets,
            clusters=clusters,
            adapters=entries,
            skipped=[],
            files=writer.files,
        )
    )
    return out


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


def stored_updates(path: Path, name: str) -> dict[str, Tensor]:
    """ΔŴ of every module of an adapter, straight from the files of a bundle."""
    bundle = Bundle(path)
    entry = next(entry for entry in bundle.manifest.adapters if entry.name == name)
    updates = {}
    for module in (module.name for module in bundle.modules(entry)):
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
    """PEFT loads the folder: every factor used, every scale 1, and the logits of ``expected``."""
    model = fixtures.load_strictly(folder, make())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    adapter = open_adapter("exported", folder)
    assert {name.removeprefix("base_model.model.") for name in layers} == set(adapter.parts)
    assert {layer.scaling["default"] for layer in layers.values()} == {1}
    assert {part.scale for part in adapter.parts.values()} == {1}
    base = make()
    answer, wanted = fixtures.logits(model, base), fixtures.logits(expected, base)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(answer, wanted, rtol=0, atol=tolerance * scale)
    assert (answer - fixtures.logits(base, base)).abs().max() > 50 * tolerance * scale
    return model


Q_UP = {"target_modules": ["q", "up"], "r": 4, "lora_alpha": 6}
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["joint", "diag", "svd", "original"])
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
        "target_modules": ["layers.0.q", "layers.0.up", "layers.1.q", "layers.1.up"],
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


def test_report(simple: Path, tmp_path: Path) -> None:
    report = export(simple, tmp_path / "out")
    assert (report.format, report.target, report.max_lora_rank) == ("peft", None, None)
    assert report.output == str(tmp_path / "out")
    first = report.adapters[0]
    assert (first.name, first.path, first.rank, first.scheme, first.squared_error) == ("a0", "a0", 6, "joint", 0.125)
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


@pytest.mark.parametrize("scheme", ["joint", "diag", "svd", "original"])
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
    dropped = re.search(r"dropping ([\d.e-]+) of", (tmp_path / "out" / "a0" / "README.md").read_text())
    assert dropped is not None
    assert float(dropped[1]) == pytest.approx(1 - kept / total, rel=1e-3)


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


def test_original_keeps_its_dtype(tmp_path: Path) -> None:
    fields = Q_UP | {"lora_alpha": 8}
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), dtype=torch.float16, **fields)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 4, dtype="bf16")
    export(bundle, tmp_path / "out")
    before, after = (load_file(tmp_path / side / "a" / fixtures.WEIGHTS) for side in ("in", "out"))
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor * 2 if "lora_B" in key else tensor)


def test_overflow_is_refused(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.tokens(), **Q_UP | {"lora_alpha": 4e6})
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "joint", 4)
    with pytest.raises(Unsupported, match=r"'a'.*layers\.0\.q.*float16.*--dtype"):
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
    with pytest.raises(BundleDamaged, match="adapter name"):
        export(bundle, tmp_path / "deep" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "in"]


def test_name_of_a_file_that_export_writes(tmp_path: Path) -> None:
    for name in ("export.json", "README.md/x"):
        fixtures.save_adapter(tmp_path / "in" / name, fixtures.tokens(), **Q_UP)
    report = export(bundle_of(tmp_path / "in", tmp_path / "bundle", "svd", 4), tmp_path / "out")
    assert [adapter.path for adapter in report.adapters] == [safe_name("README.md/x"), safe_name("export.json")]


LLAMA = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def test_vllm_gets_one_rank_without_patterns(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "a", fixtures.llama(), r=3, rank_pattern={"up_proj": 9}, **LLAMA)
    fixtures.save_adapter(tmp_path / "in" / "b", fixtures.llama(), r=5, use_rslora=True, **LLAMA)
    bundle = bundle_of(tmp_path / "in", tmp_path / "bundle", "original", 1)
    report = export(bundle, tmp_path / "out", target="vllm")
    assert report.max_lora_rank == 16
    assert [adapter.rank for adapter in report.adapters] == [9, 5]
    for name, rank in (("a", 9), ("b", 5)):
        config = json.loads((tmp_path / "out" / name / fixtures.CONFIG).read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
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
        (fixtures.gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}, "embedding|wte"),
        (fixtures.tokens, {"target_modules": ["embed_tokens", "q"]}, "embed_tokens is an embedding"),
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
