"""Adapters with ``target_parameters``: the parameter of a mixture of experts is as many updates as it has experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import peft_fixtures as fixtures
from testing.reference_reader import ReferenceReader
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.formats.target_parameters import apart
from lorazip_core.adapter.module import Module, Parameter
from lorazip_core.adapter.reader import Adapter, open_adapter
from lorazip_core.base.errors import AdapterError, AdapterErrors
from lorazip_core.bundle.check import contradictions
from lorazip_core.bundle.manifest import ParameterEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.maths.stack import Stack
from lorazip_core.planning.options import CompressOptions
from lorazip_core.reading import blocks, buffers, runs
from lorazip_core.reading.sources import Files
from lorazip_core.reading.stacks import Stacks
from lorazip_core.verify.run import verify

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
EXPERTS = 4
PARAMETERS = ["gate.weight", "down_proj", "gate_up_proj"]
LAYER = "model.layers.0.mlp"


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def qwen3(experts: int = EXPERTS) -> nn.Module:
    sizes = {**SIZES, "moe_intermediate_size": 12, "num_experts": experts, "head_dim": 4}
    return _seeded(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))


def qwen2() -> nn.Module:
    sizes = {**SIZES, "moe_intermediate_size": 12, "num_experts": EXPERTS, "shared_expert_intermediate_size": 20}
    return _seeded(lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)))


def mixtral() -> nn.Module:
    return _seeded(lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS)))


def save(folder: Path, base: nn.Module, seed: int = 0, **fields: object) -> nn.Module:
    """An adapter of the attention, and of router and experts in whichever form ``fields`` have them."""
    usual = {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "target_parameters": PARAMETERS}
    return fixtures.save_adapter(folder, base, seed, **{**usual, **fields})


def updates(adapter: Adapter) -> dict[str, Tensor]:
    """ΔW of every module."""
    return {name: b @ a for name in adapter.parts for b, a in [adapter.factors(name, torch.float64)]}


UNEVEN = {
    "rank_pattern": {r".*\.gate_up_proj": 5, "layers.1.mlp.experts.down_proj": 2},
    "alpha_pattern": {r".*\.gate_up_proj": 16},
}


ONE = {"target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True}
MIXED_NAMES = {"target_parameters": ["experts.down_proj", "gate_up_proj"]}


@pytest.mark.parametrize(
    ("make", "fields", "methods"),
    [
        pytest.param(qwen3, UNEVEN, ["svd", "joint", "diag"], id="qwen3, patterns"),
        pytest.param(qwen3, ONE, ["svd"], id="qwen3, one parameter"),
        pytest.param(qwen2, {"target_modules": []}, ["svd"], id="qwen2, no modules"),
        pytest.param(mixtral, MIXED_NAMES, ["svd"], id="mixtral"),
    ],
)
def test_logits_after_a_round_trip(
    make: Callable[[], nn.Module], fields: dict[str, object], methods: list[str], tmp_path: Path
) -> None:
    base = make()
    expected = fixtures.logits(save(tmp_path / "in" / "one", make(), seed=1, **fields), base)
    assert (fixtures.logits(make(), base) - expected).abs().max() > 1e-2
    for method in methods:
        bundle, output = tmp_path / method, tmp_path / f"{method}-exported"
        words = ["--method", method, "--rank", "64", "--dtype", "f32"]
        assert main(["compress", str(tmp_path / "in"), "-o", str(bundle), *words]) == 0
        assert main(["verify", str(bundle), "--against", str(tmp_path / "in"), "--max-error", "1e-9"]) == 0
        assert main(["export", str(bundle), "-o", str(output)]) == 0
        found = fixtures.logits(fixtures.load_strictly(output / "one", make()), base)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields", [{}, UNEVEN, {"use_rslora": True}], ids=["even", "patterns", "rslora"])
def test_updates_are_those_of_peft(fields: dict[str, object], tmp_path: Path) -> None:
    model = save(tmp_path, qwen3(), **fields)
    found = updates(open_adapter("a", tmp_path))
    wrapped = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()}
    gate_up, down = wrapped[f"{LAYER}.experts.base_layer"], wrapped[f"{LAYER}.experts"]
    for parameter, wrapper in (("gate_up_proj", gate_up), ("down_proj", down)):
        assert wrapper.parameter_name == parameter
        for expert, delta in enumerate(wrapper.get_delta_weight("default").double()):
            torch.testing.assert_close(found.pop(f"{LAYER}.experts.{parameter}.{expert}"), delta, check_dtype=False)
    gate = wrapped[f"{LAYER}.gate"].get_delta_weight("default")
    torch.testing.assert_close(found.pop(f"{LAYER}.gate.weight"), gate.double())
    assert len(found) == 2 * 2 + 2 * EXPERTS + 1  # what the attention has, and the other layer


def test_modules_say_what_they_are_part_of(tmp_path: Path) -> None:
    save(tmp_path / "in" / "one", qwen3())
    compress(tmp_path / "in", tmp_path / "bundle", CompressOptions(method="svd", rank=2, dtype="f32"))
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    modules = {module["name"]: module for module in manifest["modules"]}
    expert = modules[f"{LAYER}.experts.gate_up_proj.3"]
    assert expert["parameter"] == {"name": "gate_up_proj", "expert": 3, "experts": EXPERTS}
    assert (expert.get("kind", "linear"), expert["d_out"], expert["d_in"]) == ("linear", 24, 16)
    assert modules[f"{LAYER}.gate.weight"]["parameter"] == {"name": "weight"}
    assert "parameter" not in modules["model.layers.0.self_attn.q_proj"]
    assert manifest["requires"]["export"] == ["linear", "target_parameters"]
    assert manifest["requires"]["read"] == ["svd"]
    reader = ReferenceReader(tmp_path / "bundle")
    exact = updates(open_adapter("one", tmp_path / "in" / "one"))[expert["name"]]
    left, sizes, right = torch.linalg.svd(exact)
    stored = torch.from_numpy(reader.update("one", expert["name"]))
    rank = int(torch.linalg.matrix_rank(stored, rtol=1e-5))  # as the spectrum asks for: 2 on average
    best = left[:, :rank] * sizes[:rank] @ right[:rank]
    torch.testing.assert_close(stored, best, atol=1e-6, rtol=0)


def test_ordinary_bundles_do_not_mention_parameters(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path / "in" / "one", fixtures.tokens(), r=2, target_modules=["up"])
    compress(tmp_path / "in", tmp_path / "bundle", CompressOptions(method="svd", rank=2))
    manifest = (tmp_path / "bundle" / "manifest.json").read_text()
    assert 'parameter"' not in manifest
    assert "target_parameters" not in manifest


def test_an_export_keeps_target_parameters_and_pads_experts(tmp_path: Path) -> None:
    save(tmp_path / "in" / "one", qwen3())
    folder = tmp_path / "in" / "one"
    expected = updates(open_adapter("one", folder))
    key = f"base_model.model.{LAYER}.experts.lora_B.weight"

    def lower_rank_of_one(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(16, 3, EXPERTS)[:, 1:, 2] = 0

    fixtures.edit_weights(folder, lower_rank_of_one)
    expected = updates(open_adapter("one", folder))
    assert (
        main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), "--max-error", "0", "--dtype", "f32"]) == 0
    )
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "one" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == sorted(PARAMETERS)
    assert not any("experts" in name or "gate" in name for name in config["target_modules"])
    found = updates(open_adapter("one", tmp_path / "out" / "one"))
    assert found.keys() == expected.keys()
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, atol=1e-6, rtol=0)


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, update in before.items():
        assert torch.equal(after[name], update), name


@pytest.mark.parametrize("change", [fixtures.to_pickle, fixtures.to_shards], ids=["pickle", "shards"])
def test_other_weight_files(change: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / "in" / "one", qwen3())
    expected = updates(open_adapter("one", tmp_path / "in" / "one"))
    change(tmp_path / "in" / "one")
    same(expected, updates(open_adapter("one", tmp_path / "in" / "one", allow_pickle=True)))
    words = ["--method", "joint", "--rank", "16", "--dtype", "f32", "--allow-pickle"]
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), *words]) == 0
    words = ["--against", str(tmp_path / "in"), "--allow-pickle", "--max-error", "1e-9"]
    assert main(["verify", str(tmp_path / "b"), *words]) == 0


def test_adapters_too_large_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their experts are read from the files, each tensor once for experts that follow each other."""
    save(tmp_path / "in" / "one", qwen3(), **UNEVEN)
    monkeypatch.setattr(blocks, "_HOST_BYTES", 64)
    monkeypatch.setattr(blocks, "PIECE", 64)
    monkeypatch.setattr(buffers.InMemory, "piece", 64)
    compress(tmp_path / "in", tmp_path / "b", CompressOptions(method="svd", rank=8, dtype="f32"))
    report = verify(tmp_path / "b", against=tmp_path / "in")
    assert report.ok
    assert report.adapters[0].squared_error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("most", [1, 2**12, 2**28])
def test_stacks_of_experts_from_files(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many experts are held at a time; adapters differ in scales, layouts and modules."""
    for name, fields in {
        "a": {},
        "b": {"lora_alpha": 7},
        "c": UNEVEN,
        "d": {"target_parameters": ["down_proj"]},
    }.items():
        save(tmp_path / name, qwen3(), seed=ord(name), **fields)
    collection = open_collection(tmp_path)
    cpu = torch.device("cpu")
    files = Files(collection.adapters, cpu)
    monkeypatch.setattr(files, "_runs", runs.ExpertRuns(most))
    stacks = Stacks(collection, cpu, files)
    for number, module in enumerate(collection.modules):
        having = [i for i, adapter in enumerate(collection.adapters) if module.name in adapter.parts]
        expected = Stack.of([collection.adapters[i].factors(module.name, torch.float64) for i in having], having)
        loaded = stacks.load(number)
        assert loaded.adapters == expected.adapters
        found = loaded.exact()
        assert torch.equal(found.bt, expected.bt)
        assert torch.equal(found.a, expected.a)


def test_a_tensor_is_read_once_for_all_its_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in" / "one", qwen3())
    read: list[str] = []
    usual = Adapter.tensor

    def tensor(self: Adapter, key: str) -> Tensor:
        read.append(key)
        return usual(self, key)

    monkeypatch.setattr(Adapter, "tensor", tensor)
    for method in ("svd", "joint"):
        read.clear()
        compress(tmp_path / "in", tmp_path / method, CompressOptions(method=method, rank=16))
        experts = [key for key in read if "experts" in key]
        assert experts
        assert len(experts) == len(set(experts))


@pytest.mark.parametrize("method", ["joint", "svd"])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(({"target_modules": ["w1"]}, {"target_parameters": ["w1.weight"]}), id="module and matrix"),
        pytest.param(({"target_parameters": ["mlp.w1"]}, {"target_parameters": ["mlp.v1"]}), id="two parameters"),
    ],
)
def test_equal_tensors_of_other_parameters(
    fields: tuple[dict[str, object], ...], method: Literal["joint", "svd"], tmp_path: Path
) -> None:
    """What tensors belong to is in the configuration; those of two adapters are named and shaped alike."""
    holder = "m.mlp.w1" if "target_modules" in fields[0] else "m.mlp"
    for seed, own in enumerate(fields):
        torch.manual_seed(seed)
        folder = tmp_path / "adapters" / str(seed)
        folder.mkdir(parents=True)
        rows = 4 if "target_modules" in fields[0] else 8
        save_file(
            {
                f"base_model.model.{holder}.lora_A.weight": torch.randn(rows, 12),
                f"base_model.model.{holder}.lora_B.weight": torch.randn(16, rows),
            },
            folder / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": None} | own
        (folder / "adapter_config.json").write_text(json.dumps(config))
    compress(tmp_path / "adapters", tmp_path / "bundle", CompressOptions(method=method, rank=8, dtype="f32"))
    report = verify(tmp_path / "bundle", against=tmp_path / "adapters")
    assert report.findings == []
    assert report.summary is not None
    assert report.summary.max_squared_error == pytest.approx(0, abs=1e-9)


def test_all_adapters_of_one_layout_are_together(tmp_path: Path) -> None:
    save(tmp_path / "a", qwen3())
    save(tmp_path / "b", qwen3(), seed=1, lora_alpha=9)
    one, other = open_collection(tmp_path).adapters
    assert one.layout is other.layout


def test_target_parameters_that_match_nothing(tmp_path: Path) -> None:
    fixtures.save_adapter(tmp_path, fixtures.tokens(), r=2, target_modules=["up", "q"])
    expected = updates(open_adapter("a", tmp_path))
    fixtures.edit_config(tmp_path, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    same(expected, updates(open_adapter("a", tmp_path)))
    fixtures.edit_config(tmp_path, target_parameters=["gate_up_proj", "down_proj"], target_modules=["else"])
    same(expected, updates(open_adapter("a", tmp_path)))


def swap_wrappers(tensors: dict[str, Tensor]) -> None:
    for side in "AB":
        outer = f"base_model.model.{LAYER}.experts.lora_{side}.weight"
        inner = f"base_model.model.{LAYER}.experts.base_layer.lora_{side}.weight"
        tensors[outer], tensors[inner] = tensors[inner], tensors[outer]


def drop_wrapper(tensors: dict[str, Tensor]) -> None:
    for side in "AB":
        del tensors[f"base_model.model.{LAYER}.experts.lora_{side}.weight"]


@pytest.mark.parametrize(
    ("fields", "change", "words"),
    [
        pytest.param({"use_dora": True}, None, "DoRA", id="DoRA"),
        pytest.param({"target_parameters": ["gate.weight"]}, None, "experts has 2 pairs", id="nothing matches"),
        pytest.param({"target_parameters": ["gate.weight", "x", "y"]}, None, "perhaps x, y", id="unknown order"),
        pytest.param({"target_parameters": "down_proj"}, None, "target_parameters", id="no list"),
        pytest.param({}, drop_wrapper, "experts has one pair", id="a pair is missing"),
        pytest.param({}, swap_wrappers, "nested in another order", id="order"),
        pytest.param({"rank_pattern": {"q_proj": 5}}, None, "has rank 3", id="rank of a module"),
        pytest.param({"rank_pattern": {"down_proj": 5}}, None, "12 rows, no multiple of", id="rank of a parameter"),
        pytest.param({"rank_pattern": {"down_proj": 6}}, None, "different numbers of experts", id="experts"),
    ],
)
def test_what_is_not_decided_is_refused(
    fields: dict[str, object], change: Callable[[dict[str, Tensor]], None] | None, words: str, tmp_path: Path
) -> None:
    save(tmp_path, qwen3())
    fixtures.edit_config(tmp_path, **fields)
    if change is not None:
        fixtures.edit_weights(tmp_path, change)
    with pytest.raises(AdapterError, match=words) as caught:
        open_adapter("one", tmp_path)
    assert "\n" not in str(caught.value)


def test_another_number_of_experts_is_another_model(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / name, qwen3())
    fixtures.edit_config(tmp_path / "b", rank_pattern={"gate_up_proj": 6, "down_proj": 6})
    with pytest.raises(AdapterErrors, match=r"one of 2 experts.*one of 4 experts"):
        open_collection(tmp_path)


def test_a_lora_for_each_expert_shares_nothing_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "fused", qwen3())
    name = f"base_model.model.{LAYER}.experts.3.gate_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(3, 16), f"{name}.lora_B.weight": torch.ones(12, 3)}
    (tmp_path / "in" / "old").mkdir()
    save_file(tensors, tmp_path / "in" / "old" / fixtures.WEIGHTS)
    config = json.loads((tmp_path / "in" / "fused" / fixtures.CONFIG).read_text())
    config |= {"target_modules": ["gate_proj"], "target_parameters": None}
    (tmp_path / "in" / "old" / fixtures.CONFIG).write_text(json.dumps(config))
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), "--method", "svd"]) == 0
    assert "experts.3.gate_proj" in capsys.readouterr().err
    of_parameter = Module("m.experts.down_proj.0", "linear", 4, 4, parameter=Parameter("down_proj", 0, 2))
    assert not list(apart([of_parameter, Module("m.experts_2.0.down_proj", "linear", 4, 4)]))


def test_vllm_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "one", qwen3())
    compress(tmp_path / "in", tmp_path / "b", CompressOptions(method="svd"))
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "x"), "--target", "vllm"]) == 5
    assert "target_parameters" in capsys.readouterr().err


def test_originals_keep_their_factors(tmp_path: Path) -> None:
    """Where only they meet the limit: dtype and bytes are those of the adapter."""
    save(tmp_path / "in" / "one", qwen3(), dtype=torch.bfloat16)
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), "--max-error", "0"]) == 0
    (entry,) = Bundle(tmp_path / "b").manifest.adapters
    assert entry.scheme == "original"
    before = load_file(tmp_path / "in" / "one" / fixtures.WEIGHTS)
    fused = before[f"base_model.model.{LAYER}.experts.base_layer.lora_B.weight"]
    b = Bundle(tmp_path / "b").own(entry, f"{LAYER}.experts.gate_up_proj.2")["B"]
    assert torch.equal(b, fused.view(24, 3, EXPERTS)[:, :, 2])


def test_what_a_manifest_says_of_parameters_must_fit(tmp_path: Path) -> None:
    save(tmp_path / "in" / "one", qwen3())
    compress(tmp_path / "in", tmp_path / "b", CompressOptions(method="svd"))
    manifest = Bundle(tmp_path / "b").manifest
    assert not list(contradictions(manifest))
    number = next(i for i, module in enumerate(manifest.modules) if module.name.endswith("down_proj.3"))
    changed = msgspec.structs.replace(manifest.modules[number], parameter=ParameterEntry("down_proj", 3, 3))
    modules = [*manifest.modules[:number], changed, *manifest.modules[number + 1 :]]
    assert list(contradictions(msgspec.structs.replace(manifest, modules=modules)))
    requires = {"read": ["svd"], "export": ["linear"]}
    assert list(contradictions(msgspec.structs.replace(manifest, requires=requires)))
