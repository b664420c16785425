"""LoRA files of other tools: each is refused by its own name, with what makes a PEFT adapter of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from testing import peft_fixtures as fixtures

from lorazip_cli.main import main
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.base.errors import AdapterError

UNET = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DIFFUSERS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
# Names of tensors as the tools write them, by the file that they are in.
FILES: dict[str, tuple[str, list[str], list[str]]] = {
    "kohya": (
        "my_style.safetensors",
        [f"lora_unet_{UNET}.lora_down.weight", f"lora_unet_{UNET}.lora_up.weight", f"lora_unet_{UNET}.alpha"],
        ["kohya's sd-scripts", "convert_kohya_ss_sd_lora_to_peft.py"],
    ),
    "kohya, text encoder": (
        "te.safetensors",
        [f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{end}" for end in ("alpha", "lora_down.weight")],
        ["kohya's sd-scripts"],
    ),
    "diffusers": (
        "pytorch_lora_weights.safetensors",
        [f"unet.{DIFFUSERS}.to_q.lora.down.weight", f"unet.{DIFFUSERS}.to_q.lora.up.weight"],
        ["diffusers", "convert_state_dict_to_peft"],
    ),
    "diffusers, before 0.22": (
        "weights.safetensors",
        [f"{DIFFUSERS}.processor.to_q_lora.down.weight", f"{DIFFUSERS}.processor.to_q_lora.up.weight"],
        ["diffusers"],
    ),
    "diffusers, through PEFT": (
        "flux.safetensors",
        [f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight" for side in "AB"],
        ["diffusers"],
    ),
    "diffusers, pickled": ("pytorch_lora_weights.bin", [], ["diffusers"]),
    "MLX": (
        "adapters.safetensors",
        ["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"],
        ["MLX (mlx-lm)", "transposed"],
    ),
    "torchtune": ("adapter_0.pt", [], ["torchtune", "tune_to_peft_adapter_weights"]),
    "torchtune, in epochs": ("adapter_model.pt", [], ["torchtune"]),
    "torchtune, safetensors": (
        "adapter.safetensors",
        ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"],
        ["torchtune"],
    ),
}
MLX_CONFIG = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}


def write(path: Path, tensors: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: torch.ones(4, 4) for name in tensors}, path)
    else:
        torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 4)}, path)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What ``compress`` says when it refuses with exit code 3."""
    assert main(["compress", *arguments]) == 3
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", FILES)
def test_a_directory_and_a_file(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, tensors, words = FILES[kind]
    write(tmp_path / "in" / name, tensors)
    for place in (tmp_path / "in", tmp_path / "in" / name):
        said = refusal(capsys, str(place), "-o", str(tmp_path / "b"))
        for word in (*words, name):
            assert word in said
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", [kind for kind in FILES if FILES[kind][0].endswith(".safetensors")])
def test_beside_a_configuration_of_peft(tmp_path: Path, kind: str) -> None:
    """Under its own name, and renamed to what PEFT reads."""
    name, tensors, words = FILES[kind]
    (tmp_path / fixtures.CONFIG).write_text('{"peft_type": "LORA"}')
    write(tmp_path / name, tensors)
    for _ in range(2):
        with pytest.raises(AdapterError) as caught:
            open_adapter("a", tmp_path)
        for word in words:
            assert word in str(caught.value)
        (tmp_path / name).replace(tmp_path / fixtures.WEIGHTS)
        name = fixtures.WEIGHTS


def test_configuration_of_mlx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "adapters.safetensors", FILES["MLX"][1])
    (tmp_path / "in" / fixtures.CONFIG).write_text(json.dumps(MLX_CONFIG))
    said = refusal(capsys, str(tmp_path / "in"), "-o", str(tmp_path / "b"))
    assert "adapter_config.json is of MLX (mlx-lm), not of PEFT" in said
    assert said.count("lorazip: error: adapter") == 1


def test_beside_adapters_they_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixtures.save_adapter(tmp_path / "in" / "good", fixtures.tokens(), target_modules=["q"], r=2)
    write(tmp_path / "in" / "good" / "adapters.safetensors", FILES["MLX"][1])  # a folder of PEFT stays one
    write(tmp_path / "in" / "styles" / "one.safetensors", FILES["kohya"][1])
    write(tmp_path / "in" / "styles" / "two.safetensors", FILES["kohya"][1])
    write(tmp_path / "in" / ".hidden" / "one.safetensors", FILES["kohya"][1])
    save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, tmp_path / "in" / "model.safetensors")
    said = refusal(capsys, str(tmp_path / "in"), "-o", str(tmp_path / "b"))
    assert "adapter 'styles': one.safetensors is a LoRA of kohya's sd-scripts, not of PEFT (and 1 more)" in said
    assert said.count("lorazip: error: adapter") == 1
    options = ["--skip-bad", "--json", "-q", "--rank", "2"]
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [skipped["name"] for skipped in report["skipped"]] == ["styles"]
    assert main(["verify", str(tmp_path / "b"), "--against", str(tmp_path / "in"), "-q"]) == 0


def test_names_of_base_models_are_not_taken_for_others(tmp_path: Path) -> None:
    """GPT-2's modules begin with ``transformer.``, as those of diffusers do."""
    fixtures.save_adapter(tmp_path, fixtures.gpt2(), target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    fixtures.edit_weights(
        tmp_path,
        lambda tensors: [
            tensors.update({key.removeprefix("base_model.model."): tensors.pop(key)}) for key in list(tensors)
        ],
    )
    with pytest.raises(AdapterError, match="no tensor is named"):
        open_adapter("a", tmp_path)
