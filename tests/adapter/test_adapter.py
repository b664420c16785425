"""The reader against what PEFT itself writes, and every refusal by name."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from testing import peft_fixtures as fixtures
from torch import Tensor

from lorazip_core.adapter.formats.registry import parse_config
from lorazip_core.adapter.formats.writer import write_adapter
from lorazip_core.adapter.layout import TensorInfo, Views, aligned, view
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.base.errors import AdapterError

DATA = Path(__file__).parents[3] / "shared" / "data"
Q = "base_model.model.layers.0.q"


def check_updates(folder: Path, model: Any, **options: Any) -> None:
    """The reader finds PEFT's modules, with PEFT's updates, and every other tensor as an extra."""
    adapter = open_adapter("a", folder, **options)
    updates = fixtures.peft_updates(model)
    assert sorted(adapter.parts) == sorted(updates)
    for name, delta in updates.items():
        b, a = adapter.factors(name)
        assert b.shape == (adapter.parts[name].module.d_out, adapter.parts[name].rank)
        tolerance = 1e-5 if adapter.stored_factors(name)[0].dtype == torch.float32 else 4e-3
        torch.testing.assert_close(b @ a, delta, rtol=tolerance, atol=tolerance * float(delta.abs().max()))
    with fixtures.quiet():
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    factors = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    assert set(adapter.extras) == {key for key in state if not key.endswith(factors)}


LINEAR = {"target_modules": ["q", "up"], "r": 4, "lora_alpha": 12}
ACCEPTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (fixtures.tokens, LINEAR),
    "rslora": (fixtures.tokens, LINEAR | {"use_rslora": True}),
    "float alpha": (fixtures.tokens, LINEAR | {"lora_alpha": 5.5}),
    "rank_pattern": (fixtures.tokens, LINEAR | {"rank_pattern": {"layers.0.q": 2, "up": 7}}),
    "alpha_pattern": (fixtures.tokens, LINEAR | {"alpha_pattern": {"layers.1.q": 3, "up": 9.5}}),
    "regex patterns": (
        fixtures.tokens,
        LINEAR
        | {
            "rank_pattern": {r"^layers\.0\..*": 3, r"layers\.\d+\.up": 5},
            "alpha_pattern": {r".*\.(q|k)": 1, "^up": 99},
            "use_rslora": True,
        },
    ),
    "regex targets": (fixtures.tokens, LINEAR | {"target_modules": r"layers\.1\.(q|down)"}),
    "layers_to_transform": (fixtures.tokens, LINEAR | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "lora_bias": (fixtures.tokens, LINEAR | {"target_modules": ["up", "down"], "lora_bias": True}),
    "bias all": (fixtures.tokens, LINEAR | {"bias": "all"}),
    "bias lora_only": (fixtures.tokens, LINEAR | {"bias": "lora_only"}),
    "modules_to_save": (fixtures.tokens, LINEAR | {"modules_to_save": ["head"]}),
    "trainable tokens": (fixtures.llama, {"target_modules": ["q_proj"], "r": 2, "trainable_token_indices": [1, 5]}),
    "embedding": (fixtures.tokens, {"target_modules": ["embed_tokens", "q"], "r": 3, "lora_alpha": 8}),
    "convolution": (fixtures.image, {"target_modules": ["stem", "mix", "head"], "r": 3, "lora_alpha": 5}),
    "convolution, lora_bias": (fixtures.image, {"target_modules": ["stem"], "r": 2, "lora_bias": True}),
    "Conv1D": (fixtures.gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    "causal LM": (fixtures.llama, {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"}),
    "classifier": (fixtures.llama_classifier, {"target_modules": ["q_proj"], "r": 2, "task_type": "SEQ_CLS"}),
    "rank above the layer": (fixtures.tokens, LINEAR | {"r": 20}),
    "gaussian": (fixtures.tokens, LINEAR | {"init_lora_weights": "gaussian"}),
    "orthogonal": (fixtures.tokens, LINEAR | {"init_lora_weights": "orthogonal"}),
    "mica": (fixtures.tokens, LINEAR | {"init_lora_weights": "mica"}),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_update_is_pefts(tmp_path: Path, kind: str) -> None:
    make, fields = ACCEPTED[kind]
    check_updates(tmp_path, fixtures.save_adapter(tmp_path, make(), **fields))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = fixtures.save_adapter(tmp_path, fixtures.tokens(), dtype=dtype, **LINEAR)
    check_updates(tmp_path, model)
    adapter = open_adapter("a", tmp_path)
    assert {adapter.stored_factors(name)[0].dtype for name in adapter.parts} == {dtype}


def test_bias_of_b_is_scaled_like_b(tmp_path: Path) -> None:
    fields = {"target_modules": ["up"], "r": 4, "lora_alpha": 12, "lora_bias": True}
    model = fixtures.save_adapter(tmp_path, fixtures.tokens(), **fields)
    key = "base_model.model.layers.0.up.lora_B.bias"
    bias = model.base_model.model.layers[0].up.lora_B["default"].bias.detach()
    torch.testing.assert_close(open_adapter("a", tmp_path).extra(key), 3 * bias.double(), rtol=0, atol=0)


def test_saved_embedding_with_a_factor_is_an_extra(tmp_path: Path) -> None:
    """PEFT saves the whole base embedding beside its factors when it thinks that the vocabulary may have changed."""
    model = fixtures.save_adapter(tmp_path, fixtures.llama(), target_modules=["embed_tokens", "q_proj"], r=2)
    adapter = open_adapter("a", tmp_path)
    assert sorted(adapter.parts) == sorted(fixtures.peft_updates(model))
    assert "base_model.model.model.embed_tokens.base_layer.weight" in adapter.extras


@pytest.fixture
def linear(tmp_path: Path) -> tuple[Path, Any]:
    folder = tmp_path / "linear"
    return folder, fixtures.save_adapter(folder, fixtures.tokens(), **LINEAR)


def test_shards(linear: tuple[Path, Any]) -> None:
    folder, model = linear
    fixtures.to_shards(folder)
    check_updates(folder, model)
    assert len(open_adapter("a", folder).files) == 5


def test_pickle_only_when_allowed(linear: tuple[Path, Any]) -> None:
    folder, model = linear
    fixtures.to_pickle(folder)
    refused(folder, "pickled", "«allow_pickle»")
    check_updates(folder, model, allow_pickle=True)


def cut(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)


def as_written_before_torch_1_6(size: int) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
        os.truncate(file, size)

    return write


def protocol_5(file: Path) -> None:
    file.write_bytes(pickle.dumps({"x": os.mkdir}, protocol=5))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: torch.save({"x": os.mkdir}, file), "holds more than tensors (GLOBAL posix.mkdir)"),
        (lambda file: torch.save({"x": numpy.ones(2)}, file), "holds more than tensors (GLOBAL numpy."),
        (lambda file: torch.save(torch.nn.Linear(2, 2), file), "(GLOBAL torch.nn.modules.linear.Linear)"),
        (lambda file: file.write_bytes(b"<html>Not Found</html>"), "is truncated, or nothing that torch.save wrote"),
        (lambda file: file.write_bytes(bytes(1000)), "is truncated, or nothing that torch.save wrote"),
        (cut(0), "is truncated, or nothing that torch.save wrote"),
        (cut(2000), "is truncated, or nothing that torch.save wrote"),
        (as_written_before_torch_1_6(100), "is truncated, or nothing that torch.save wrote"),
        (as_written_before_torch_1_6(2000), "is truncated, or nothing that torch.save wrote"),
        (protocol_5, "is truncated, or nothing that torch.save wrote"),
    ],
)
def test_pickle_that_is_not_tensors_alone(
    linear: tuple[Path, Any], spoil: Callable[[Path], object], words: str
) -> None:
    """It is said in one line what is wrong; torch's advice to load it all the same is never passed on."""
    folder, _ = linear
    fixtures.to_pickle(folder)
    spoil(folder / "adapter_model.bin")
    with pytest.raises(AdapterError) as caught:
        open_adapter("some/name", folder, allow_pickle=True)
    said = str(caught.value)
    assert said.startswith("adapter 'some/name': adapter_model.bin ")
    assert words in said
    assert "save it again as safetensors" in said
    for advice in ("weights_only", "torch.load", "safe_globals", "likely succeed", "\n"):
        assert advice not in said


def test_pickle_cannot_run_code(linear: tuple[Path, Any]) -> None:
    folder, _ = linear
    marker = folder / "ran"

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    (folder / fixtures.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": Attack()}, protocol=2))
    refused(folder, "holds more than tensors (GLOBAL posix.mkdir)", allow_pickle=True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "up", "up", "q", "not_there"]},
        {"a_field_from_the_future": {"x": [1]}, "peft_version": "9.9"},
        {"lora_alpha": 12.0, "rank_pattern": None, "alpha_pattern": None},
        {"use_rslora": None, "use_dora": None, "init_lora_weights": None},
    ],
)
def test_config_may_differ(linear: tuple[Path, Any], fields: dict[str, Any]) -> None:
    folder, model = linear
    fixtures.edit_config(folder, **fields)
    check_updates(folder, model)


def test_config_may_lack_optional_fields(tmp_path: Path) -> None:
    fields = {"target_modules": ["q"], "r": 8, "lora_alpha": 8}  # PEFT's own defaults
    model = fixtures.save_adapter(tmp_path, fixtures.tokens(), **fields)
    (tmp_path / fixtures.CONFIG).write_text('{"peft_type": "LORA"}')
    check_updates(tmp_path, model)


def test_zero_b_is_legal(linear: tuple[Path, Any]) -> None:
    folder, _ = linear
    fixtures.edit_weights(folder, lambda tensors: [t.zero_() for key, t in tensors.items() if "lora_B" in key])
    b, _ = open_adapter("a", folder).factors("layers.0.q")
    assert not b.any()


def read_all(name: str, folder: Path, **options: Any) -> None:
    adapter = open_adapter(name, folder, **options)
    for module in adapter.parts:
        for factor in adapter.factors(module):
            assert factor.isfinite().all()
    for key in adapter.extras:
        adapter.extra(key)


def refused(folder: Path, *words: str, name: str = "some/name", **options: Any) -> None:
    """Opening (or reading) fails with exit code 3 and one line with the name and all of ``words``."""
    with pytest.raises(AdapterError) as caught:
        read_all(name, folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in (repr(name), *words):
        assert word in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"monteclora_config": {"x": 1}}, "MonteCLoRA"),
        ({"enable_lora": [True, False, True]}, "enable_lora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"peft_type": "ADALORA"}, "times lora_E"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": "LOHA"}, "peft.save_as_lora"),
        ({"r": 0}, "r must be"),
        ({"r": "8"}, "r"),
        ({"r": 5}, "has rank 4 in the weights and 5"),
        ({"rank_pattern": {"layers.1.up": 3}}, "layers.1.up"),
        ({"lora_alpha": float("nan")}, "finite"),
        ({"alpha_pattern": {"q": float("inf")}}, "finite"),
        ({"alpha_pattern": {"(": 3}}, "pattern '('"),
        ({"rank_pattern": {"q": "4"}}, "rank_pattern"),
    ],
)
def test_refused_configs(linear: tuple[Path, Any], fields: dict[str, Any], word: str) -> None:
    folder, _ = linear
    fixtures.edit_config(folder, **fields)
    refused(folder, word)


def drop(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def put(key: str, tensor: Tensor) -> Any:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{Q}.lora_B.weight"), ["layers.0.q", "no lora_B"]),
        (drop(f"{Q}.lora_A.weight"), ["layers.0.q", "no lora_A"]),
        (put(f"{Q}.lora_B.weight", torch.ones(12, 3)), ["layers.0.q", "rank 4", "rank 3"]),
        (put(f"{Q}.lora_B.weight", torch.ones(12)), ["layers.0.q", "[12]"]),
        (put(f"{Q}.lora_B.weight", torch.ones(12, 4, 1)), ["layers.0.q", "do not belong to one layer"]),
        (put(f"{Q}.lora_B.weight", torch.ones(0, 4)), ["layers.0.q", "zero"]),
        (put(f"{Q}.lora_A.weight", torch.ones(4, 12, dtype=torch.int8)), [f"{Q}.lora_A.weight", "I8"]),
        (put(f"{Q}.lora_magnitude_vector.weight", torch.ones(12)), ["DoRA", "lora_magnitude_vector"]),
        (put(f"{Q}.lora_A.weight", torch.ones(0)), [f"{Q}.lora_A.weight", "[0]", "ZeRO-3"]),
        (put("base_model.model.head.weight", torch.ones(0)), ["head.weight", "[0]", "ZeRO-3"]),
        (put(f"{Q}.lora_B.bias", torch.ones(12, dtype=torch.float8_e5m2)), [f"{Q}.lora_B.bias", "F8_E5M2"]),
        (put(f"{Q}.lora_A.default.weight", torch.ones(4, 12)), ["lora_A.default.weight"]),
        (put("layers.5.q.lora_A.weight", torch.ones(4, 12)), ["layers.5.q.lora_A.weight"]),
        (put("base_model.model.x.lora_B.bias", torch.ones(12)), ["x.lora_B.bias"]),
    ],
)
def test_refused_weights(linear: tuple[Path, Any], change: Any, words: list[str]) -> None:
    folder, _ = linear
    fixtures.edit_weights(folder, change)
    refused(folder, *words)


def test_grouped_convolution_of_peft(tmp_path: Path) -> None:
    """B of a grouped convolution is block diagonal, so B A is not its update."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, groups=2))
    fixtures.save_adapter(tmp_path, model, target_modules=["0"], r=4)
    refused(tmp_path, "module 0", "rank 4", "rank 2")


def test_git_lfs_pointers(linear: tuple[Path, Any]) -> None:
    folder, _ = linear
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / fixtures.WEIGHTS).write_bytes(pointer)
    refused(folder, fixtures.WEIGHTS, "Git LFS pointer", "git lfs pull")
    (folder / fixtures.CONFIG).write_bytes(pointer)
    refused(folder, fixtures.CONFIG, "Git LFS pointer", "git lfs pull")


def test_not_an_adapter(tmp_path: Path) -> None:
    refused(tmp_path, "no adapter_config.json")
    (tmp_path / fixtures.CONFIG).write_text('{"model_type": "llama"}')
    refused(tmp_path, "no peft_type")
    (tmp_path / fixtures.CONFIG).write_text('{"peft_type": "LORA"')
    refused(tmp_path, "not JSON")
    (tmp_path / fixtures.CONFIG).write_text('["peft_type"]')
    refused(tmp_path, "not a PEFT adapter")
    (tmp_path / fixtures.CONFIG).write_text('{"peft_type": "LORA"}')
    refused(tmp_path, "no weights")


def test_weights_without_factors(linear: tuple[Path, Any]) -> None:
    folder, _ = linear
    fixtures.edit_weights(folder, lambda tensors: (tensors.clear(), tensors.update(w=torch.ones(2))))
    refused(folder, "no tensor is named", "w")
    fixtures.edit_weights(folder, lambda tensors: tensors.clear())
    refused(folder, "none at all")


def test_every_truncation_is_found(linear: tuple[Path, Any]) -> None:
    folder, _ = linear
    whole = (folder / fixtures.WEIGHTS).read_bytes()
    for length in sorted({0, 1, 7, 8, 9, 40, len(whole) - 1, *range(0, len(whole), 97)}):
        (folder / fixtures.WEIGHTS).write_bytes(whole[:length])
        refused(folder, fixtures.WEIGHTS)


def test_broken_shards(linear: tuple[Path, Any]) -> None:
    folder, _ = linear
    fixtures.to_shards(folder)
    index = folder / f"{fixtures.WEIGHTS}.index.json"
    good = json.loads(index.read_text())
    first = "adapter_model-00001-of-00003.safetensors"

    def with_map(weight_map: dict[str, str]) -> None:
        index.write_text(json.dumps(good | {"weight_map": weight_map}))

    key = next(key for key, name in good["weight_map"].items() if name == first)
    with_map(good["weight_map"] | {"x": first})
    refused(folder, "tensor x", first)
    with_map(good["weight_map"] | {key: "adapter_model-00002-of-00003.safetensors"})
    refused(folder, key)
    with_map(good["weight_map"] | {key: "../outside.safetensors"})
    refused(folder, "weight_map")
    index.write_text("{}")
    refused(folder, "weight_map")
    with_map(good["weight_map"])
    second = folder / "adapter_model-00002-of-00003.safetensors"
    second.rename(folder / "elsewhere")
    refused(folder, second.name, "missing")
    (folder / first).rename(second)
    (folder / "elsewhere").rename(folder / first)
    refused(folder)


def test_a_tensor_in_two_shards(linear: tuple[Path, Any]) -> None:
    folder, _ = linear
    fixtures.to_shards(folder, 2)
    first, second = sorted(folder.glob("adapter_model-*"))
    second.write_bytes(first.read_bytes())
    refused(folder, "is also in")


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding", "Conv1D", "regex patterns", "lora_bias"])
def test_written_adapter_loads_in_peft(tmp_path: Path, kind: str) -> None:
    """Read, fold the scale in, write: PEFT answers as with the original."""
    make, fields = ACCEPTED[kind]
    base = make()
    expected = fixtures.logits(fixtures.save_adapter(tmp_path / "old", make(), **fields), base)
    adapter = open_adapter("a", tmp_path / "old")
    ranks = {name: part.rank for name, part in adapter.parts.items()}
    config = adapter.config.raw | {
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "use_rslora": False,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    factors = {part.module: adapter.factors(name) for name, part in adapter.parts.items()}
    extras = {key: adapter.extra(key) for key in adapter.extras}
    write_adapter(tmp_path / "new", config, factors, extras, "text")
    assert (tmp_path / "new" / fixtures.WEIGHTS).stat().st_mode & 0o044 == 0o044 & ~umask()
    actual = fixtures.logits(fixtures.load_strictly(tmp_path / "new", make()), base)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual - fixtures.logits(base, base)).abs().max() > 1e-2


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def wild(name: str) -> Path:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    return DATA / name


WILD = {
    "accepted": 242,
    "PEFT type": 308,
    "init_lora_weights": 8,
    "BD-LoRA": 3,
    "KaSA": 2,
    "enable_lora": 1,
    "no peft_type": 1,
    "MLX (mlx-lm)": 2,
    "Git LFS pointer": 2,
}


def test_wild_configs() -> None:
    """569 texts from public repositories: parsed, or refused in one line that names the reason."""
    counts: Counter[str] = Counter()
    for line in wild("adapter_configs.jsonl").read_text().splitlines():
        entry = json.loads(line)
        message = refusal(entry["name"], entry["text"])
        assert "\n" not in message
        counts[next(word for word in WILD if word in message)] += 1
    assert counts == WILD


def refusal(name: str, text: str) -> str:
    try:
        parse_config(name, text.encode())
    except AdapterError as error:
        return error.reason
    return "accepted"


# What opening each of them says: "ok", or a part of the refusal; first without --allow-pickle, then with it.
ODD = {
    "bert_base_bin_r8": ("is pickled", "ok"),
    "bloom560m_mergedlinear_enable_lora_bin": ("enable_lora", "enable_lora"),
    "distilbert_r4": ("ok", "ok"),
    "gpt2_targets_not_in_model": ("ok", "ok"),
    "gpt2_zeroB_r8": ("ok", "ok"),
    "lerobot_smolvla_lora_bin_notpeft": ("not a PEFT adapter", "not a PEFT adapter"),
    "lfs_pointer_bge": ("Git LFS pointer", "Git LFS pointer"),
    "peft_finegates_roberta": ("FINEGATES", "FINEGATES"),
    "peft_mt0large_ia3_bin": ("IA3", "IA3"),
    "peft_regr_adalora_mlp_bin": ("ADALORA", "ADALORA"),
    "peft_regr_ia3_conv2d_bin": ("IA3", "IA3"),
    "peft_regr_ia3_mlp_bin": ("IA3", "IA3"),
    "peft_regr_ia3_opt350m_bin": ("IA3", "IA3"),
    "peft_regr_lora_conv2d_bin": ("is pickled", "ok"),
    "peft_regr_lora_emb_conv1d_bin": ("is pickled", "ok"),
    "peft_regr_lora_mlp_bin": ("ADALORA", "ADALORA"),
    "peft_regr_lora_mlp_modules_to_save_bin": ("is pickled", "ok"),
    "peft_regr_lora_opt125m_bnb4bit_bin": ("is pickled", "ok"),
    "peft_regr_lora_opt350m_bin": ("is pickled", "ok"),
    "peft_unilora_roberta": ("UNILORA", "UNILORA"),
    "privacyfilter_moe_tokencls_r16": ("ok", "ok"),
    "roberta_bias_all_r4": ("ok", "ok"),
    "sd_unet_peft_r4": ("ok", "ok"),
}


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_adapters(name: str, allow_pickle: bool) -> None:
    expected = ODD[name][allow_pickle]
    folder = wild("odd") / name
    if expected == "ok":
        read_all(name, folder, allow_pickle=allow_pickle)
    else:
        refused(folder, expected, name=name, allow_pickle=allow_pickle)


def test_odd_table_is_complete() -> None:
    assert {path.name for path in wild("odd").iterdir()} == set(ODD)


@pytest.mark.parametrize("gap", [0, 1, 2, 8])
@pytest.mark.parametrize("dtypes", [["BF16"], ["F32"], ["F16", "F32"]])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_several_tensors_at_once_are_those_of_one_by_one(gap: int, dtypes: list[str], start: int) -> None:
    infos, end = [], gap
    for number, shape in enumerate([(3, 4), (1,), (2, 2, 2), (5, 1)]):
        info = TensorInfo(dtypes[number % len(dtypes)], shape, 0, end)
        infos.append(info)
        end = info.end + gap
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 60, (3, aligned(end) + start), dtype=torch.uint8, generator=generator)[:, start:]
    for some in (infos, infos[::-1], infos[1:3]):
        for own, info in zip(Views(some, data.shape[1]).of(data), some, strict=True):
            assert torch.equal(own, view(data, info).flatten(1))
