"""DoRA: magnitudes are carried exactly, ΔW is compressed, and the export is DoRA with the same logits at full rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from testing import peft_fixtures as fixtures
from torch import Tensor, nn

from lorazip_cli.main import main
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.base.errors import AdapterError

LINEAR = {"target_modules": ["q", "up"], "r": 4, "lora_alpha": 12, "use_dora": True}
KEY = "base_model.model.layers.0.q.lora_magnitude_vector"
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (fixtures.tokens, LINEAR),
    "causal LM": (fixtures.llama, {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"}),
    "Conv1D": (fixtures.gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4, "fan_in_fan_out": True}),
    "convolution": (fixtures.image, {"target_modules": ["stem", "mix", "head"], "r": 3, "lora_alpha": 5}),
    "embedding": (fixtures.tokens, {"target_modules": ["embed_tokens", "q"], "r": 3, "lora_alpha": 8}),
    "rsLoRA, patterns": (
        fixtures.tokens,
        LINEAR | {"use_rslora": True, "rank_pattern": {"layers.0.q": 2}, "alpha_pattern": {"up": 5}},
    ),
}


def save(folder: Path, kind: str, seed: int = 0) -> Any:
    """A DoRA adapter with magnitudes as training leaves them: near to those that it began with, and positive."""
    make, fields = KINDS[kind]
    model = fixtures.save_adapter(folder, make(), seed=seed, **(fields | {"use_dora": True}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.copy_(1 + parameter.abs())
    with fixtures.quiet():
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("method", ["svd", "joint", "diag"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_answers_as_the_original(tmp_path: Path, kind: str, method: str) -> None:
    """At full rank; beside a LoRA of the same modules, with which it shares bases."""
    make, fields = KINDS[kind]
    base = make()
    expected = fixtures.logits(save(tmp_path / "in" / "dora", kind), base)
    fixtures.save_adapter(tmp_path / "in" / "lora", make(), seed=1, **(fields | {"use_dora": False}))
    options = ["--method", method, "--rank", "64", "--dtype", "f32", "-q"]
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), *options]) == 0
    assert main(["verify", str(tmp_path / "b"), "--against", str(tmp_path / "in"), "-q"]) == 0
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "out"), "-q"]) == 0
    out = tmp_path / "out" / "dora"
    assert json.loads((out / fixtures.CONFIG).read_text())["use_dora"] is True
    before, after = (load_file(folder / fixtures.WEIGHTS) for folder in (tmp_path / "in" / "dora", out))
    magnitudes = [key for key in before if key.endswith("lora_magnitude_vector")]
    assert magnitudes
    assert all(torch.equal(before[key], after[key]) for key in magnitudes)
    actual = fixtures.logits(fixtures.load_strictly(out, make()), base)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    plain = fixtures.logits(base, base)
    assert (actual - plain).abs().max() > 1e-2


def test_truncated_export_is_dora_too(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a", "linear")
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), "--method", "svd", "-q"]) == 0
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "out"), "--rank", "1", "-q"]) == 0
    fixtures.load_strictly(tmp_path / "out" / "a", fixtures.tokens())


def test_vllm_refuses_it_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in" / "a", "causal LM")
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), "-q"]) == 0
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "out"), "--target", "vllm"]) == 5
    assert "'a': it is DoRA" in capsys.readouterr().err


Change = Callable[[dict[str, Tensor]], Any]


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (lambda tensors: tensors.pop(KEY), {}, ["layers.0.q", "no lora_magnitude_vector"]),
        (lambda tensors: tensors.update({KEY: torch.ones(5)}), {}, [KEY, "[5]", "[12, 12]"]),
        (lambda tensors: tensors.update({KEY.replace(".q.", ".down."): torch.ones(5)}), {}, ["layers.0.down"]),
        (lambda tensors: tensors.pop(KEY.replace("magnitude_vector", "A.weight")), {}, ["no lora_A"]),
        (lambda tensors: None, {"use_dora": False}, [KEY, "use_dora is not set"]),
    ],
)
def test_magnitudes_that_do_not_fit_are_refused(
    tmp_path: Path, change: Change, fields: dict[str, Any], words: list[str]
) -> None:
    save(tmp_path, "linear")
    fixtures.edit_weights(tmp_path, change)
    fixtures.edit_config(tmp_path, **fields)
    with pytest.raises(AdapterError) as caught:
        open_adapter("some/name", tmp_path)
    for word in ("some/name", *words):
        assert word in str(caught.value)


def test_magnitudes_of_a_raw_state_dict(tmp_path: Path) -> None:
    """``.lora_magnitude_vector.weight``, as the layer has it, and with the name of the adapter."""
    save(tmp_path, "linear")
    own = open_adapter("a", tmp_path).extras.keys()
    for end in (".weight", ".default.weight"):

        def rename(tensors: dict[str, Tensor], end: str = end) -> None:
            for key in [key for key in tensors if ".lora_magnitude_vector" in key]:
                tensors[key.partition(".lora_magnitude_vector")[0] + ".lora_magnitude_vector" + end] = tensors.pop(key)
            if "default" in end:
                for key in [key for key in tensors if key.endswith(("lora_A.weight", "lora_B.weight"))]:
                    tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

        fixtures.edit_weights(tmp_path, rename)
        assert open_adapter("a", tmp_path).extras.keys() == own
