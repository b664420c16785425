"""Inputs modelled on public bug reports: after compress (svd, full rank, f32) and export, PEFT answers as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import peft_fixtures as fixtures
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorazip_cli.main import main

FOUND = Path(__file__).parents[3] / "shared" / "data" / "found"
DATA = pytest.mark.skipif(not FOUND.is_dir(), reason=f"{FOUND} is not there")
pytestmark = DATA


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.enc(x))
        return out


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def net() -> nn.Module:
    return seeded(Net)


def llama() -> nn.Module:
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)))


def answers(folder: Path, make: Callable[[], nn.Module], *, strictly: bool) -> Tensor:
    model = (fixtures.load_strictly if strictly else fixtures.load_adapter)(folder, make())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        out = model(
            torch.randn(4, 16, generator=generator) if make is net else torch.arange(12, dtype=torch.int64).view(2, 6)
        )
    logits: Tensor = getattr(out, "logits", out)
    return logits


def round_trip(source: Path, folder: Path) -> Path:
    bundle, out = folder / "b", folder / "out"
    options = ["--method", "svd", "--rank", "64", "--dtype", "f32", "-q"]
    assert main(["compress", str(source), "-o", str(bundle), *options]) == 0
    assert main(["verify", str(bundle), "--against", str(source), "--max-error", "1e-9", "-q"]) == 0
    assert main(["export", str(bundle), "-o", str(out), "-q"]) == 0
    return out


@pytest.mark.parametrize(
    ("name", "make"),
    [("scalar-in-saved-module/a0", net), ("scalar-in-saved-module/a1", net), ("adapter-name-in-keys/a0", llama)],
)
def test_same_answers_as_the_original(tmp_path: Path, name: str, make: Callable[[], nn.Module]) -> None:
    source = FOUND / name
    out = round_trip(source, tmp_path)
    expected = answers(source, make, strictly=False)
    torch.testing.assert_close(answers(out, make, strictly=True), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["compiled", "fsdp"])
def test_wrapped_adapters_are_applied(tmp_path: Path, name: str) -> None:
    """PEFT applies nothing of the originals; the answers are those with the wrapper's name taken out by hand."""
    source = FOUND / "wrapper-names" / name / "a0"
    out = round_trip(source, tmp_path)
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / fixtures.CONFIG).write_bytes((source / fixtures.CONFIG).read_bytes())
    tensors = load_file(source / fixtures.WEIGHTS)
    wrapper = {"compiled": "_orig_mod.", "fsdp": "_fsdp_wrapped_module."}[name]
    save_file({key.replace(wrapper, ""): tensor for key, tensor in tensors.items()}, plain / fixtures.WEIGHTS)
    expected = answers(plain, llama, strictly=True)
    torch.testing.assert_close(answers(out, llama, strictly=True), expected, rtol=1e-5, atol=1e-5)
    assert (expected - answers(source, llama, strictly=False)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["empty-factors", "empty-saved-tensors"])
def test_leftovers_of_zero_3_are_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(FOUND / name), "-o", str(tmp_path / "b")]) == 3
    said = capsys.readouterr().err
    assert "adapter 'a0': tensor " in said
    assert "DeepSpeed ZeRO-3" in said


def test_rare_float8_is_carried(tmp_path: Path) -> None:
    out = round_trip(FOUND / "rare-float8", tmp_path)
    key = "base_model.model.lm_head.weight"
    before, after = (load_file(folder / "x" / fixtures.WEIGHTS)[key] for folder in (FOUND / "rare-float8", out))
    assert after.dtype == torch.float8_e8m0fnu
    assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))
