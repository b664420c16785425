"""`lorazip calibrate`, and the file that it writes, on tiny real models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing.input_moments import dense
from testing.tiny_models import gpt2, letters, llama, save_adapter, save_model, save_rows, tokenizer
from torch import Tensor, nn

from lorazip_cli.main import main
from lorazip_core.base.errors import Unsupported, UsageError
from lorazip_core.model.inputs import linear_modules, sharing
from lorazip_core.model.moments import Moment, Moments, to_bytes
from lorazip_core.model.prompts import Prompts
from lorazip_core.model.rows import read_rows

ATTENTION = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, adapters on it, and rows."""
    root = tmp_path_factory.mktemp("calibrate")
    save_model(root / "base", llama())
    save_adapter(root / "adapters" / "a", llama(), r=2, target_modules=["q_proj", "v_proj", "embed_tokens"])
    save_adapter(root / "adapters" / "b", llama(), r=2, target_modules=["k_proj"])
    save_rows(root / "rows.jsonl", letters(1, 7))
    return root


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def calibrate(*more: str, output: Path) -> int:
    return main(["calibrate", "base", "rows.jsonl", "-o", str(output), "-q", *more])


def plain_moments(model: nn.Module, module: str) -> Tensor:
    """E[x xᵀ], one row after another, from a hook of its own, in float64."""
    prompts = Prompts(tokenizer())
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, given: seen.append(given[0][0].double()))
    with torch.no_grad():
        for row in read_rows(Path("rows.jsonl")).all():
            model(torch.tensor([prompts.example(row).ids]))
    handle.remove()
    x = torch.cat(seen)
    return x.mT @ x / len(x)


def test_the_file_has_the_moments_of_every_linear_module(inside: Path, tmp_path: Path) -> None:
    assert calibrate("--rank", "99", output=tmp_path / "m.safetensors") == 0
    moments = Moments.open(tmp_path / "m.safetensors")
    model = llama()
    assert len(moments.modules) == 14
    assert "lm_head" not in moments.modules
    assert moments.moment("lm_head") is None
    for module in moments.modules:
        moment = moments.moment(module)
        assert moment is not None
        found, expected = dense(moment), plain_moments(model, module)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.diagonal(), expected.diagonal().float(), rtol=0.01, atol=0)
        scale = expected.diagonal().sqrt()
        off = (found.double() - expected) / scale / scale[:, None]
        assert off.abs().max() < 0.02, "what rounding to bf16 leaves of it"
        assert torch.linalg.eigvalsh(found.double()).min() > -1e-5 * float(expected.diagonal().max())


def test_few_directions_keep_the_diagonal_and_lose_the_least(inside: Path, tmp_path: Path) -> None:
    sizes, off = [], []
    expected = plain_moments(llama(), ATTENTION[0])
    for rank in (2, 8, 32):
        path = tmp_path / f"{rank}.safetensors"
        assert calibrate("--rank", str(rank), output=path) == 0
        moment = Moments.open(path).moment(ATTENTION[0])
        assert moment is not None
        found = dense(moment)
        torch.testing.assert_close(found.diagonal(), expected.diagonal().float(), rtol=0.01, atol=0)
        off.append(float((found.double() - expected).square().sum()))
        sizes.append(path.stat().st_size)
    assert off[0] > off[1] > off[2]
    assert sizes == sorted(sizes)


def test_modules_of_one_input_are_stored_once(inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate("--adapters", "adapters", "--json", output=tmp_path / "m.safetensors") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "lorazip.calibrate/1"
    assert (report["modules"], report["inputs"], report["examples"]) == (6, 2, 7)
    assert report["size_bytes"] == (tmp_path / "m.safetensors").stat().st_size
    assert report["left_out"] == [{"name": "model.embed_tokens", "reason": "its input is no vector but a token"}]
    assert Moments.open(tmp_path / "m.safetensors").modules == sorted(ATTENTION)
    names = load_file(tmp_path / "m.safetensors").keys()
    assert f"{','.join(ATTENTION[:3])}:directions" in names


def test_the_same_rows_give_the_same_bytes(inside: Path, tmp_path: Path) -> None:
    assert calibrate(output=tmp_path / "1") == calibrate(output=tmp_path / "2") == 0
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o666 & ~_umask(tmp_path)


def _umask(folder: Path) -> int:
    (folder / "new").touch()
    return 0o666 & ~(folder / "new").stat().st_mode


@pytest.mark.parametrize(("make", "groups"), [(llama, 8), (gpt2, 8)])
def test_inputs_are_shared_where_the_model_shares_them(make: Callable[[], nn.Module], groups: int) -> None:
    model = make()
    names = linear_modules(model)
    found = sharing(model, names, lambda: model(torch.tensor([[1, 2, 3]])))
    assert sorted(name for group in found for name in group) == sorted(names)
    assert len(found) == groups
    together = {frozenset(name.rpartition(".")[2] for name in group) for group in found}
    if make is llama:
        shared = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
        assert together == set(map(frozenset, shared))


def test_what_is_called_twice_or_never_is_on_its_own() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once, self.twice, self.never, self.also = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.once(x) + self.twice(self.twice(x)) + self.also(x)

    model = Odd()
    found = sharing(model, ["once", "twice", "never", "also"], lambda: model(torch.ones(1, 3)))
    assert found == [["once", "also"], ["twice"], ["never"]]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["nowhere/at/all", "rows.jsonl"], 2, "neither a directory nor the name of a model on the Hub"),
        (["rows.jsonl", "rows.jsonl"], 2, "is a file, not the directory of a model"),
        (["adapters", "rows.jsonl"], 2, "it has no config.json"),
        (["adapters/a", "rows.jsonl"], 2, "is an adapter, not a base model"),
        (["base", "nothing.jsonl"], 2, "does not exist"),
        (["base", "rows.jsonl", "--adapters", "nowhere"], 2, "is not a directory"),
        (["base", "rows.jsonl", "--prompt-tokens", "9"], 2, "not a number of 48 or more"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], code: int, message: str, inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *argv, "-o", str(tmp_path / "m")]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_stays(inside: Path, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    assert calibrate(output=tmp_path / "m") == 6
    assert (tmp_path / "m").read_text() == "mine"


def test_another_base_model_has_none_of_the_modules(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "other", gpt2())
    argv = ["calibrate", str(tmp_path / "other"), "rows.jsonl", "-o", str(tmp_path / "m"), "--adapters", "adapters"]
    assert main([*argv, "-q"]) == 2
    assert "there is no module to look at" in capsys.readouterr().err


def test_what_is_no_file_of_moments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nonsense")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    moment = Moment.of_sum(["a"], torch.eye(3), 1, 2)
    (tmp_path / "good").write_bytes(to_bytes([moment]))
    later = load_file(tmp_path / "good") | {"lorazip.moments": torch.tensor(2)}
    save_file(later, tmp_path / "later")
    assert Moments.open(tmp_path / "good").modules == ["a"]
    for name in ("text", "other"):
        with pytest.raises(UsageError, match="is no file of moments"):
            Moments.open(tmp_path / name)
    with pytest.raises(Unsupported, match="version 2"):
        Moments.open(tmp_path / "later")
    with pytest.raises(UsageError, match="is not a file"):
        Moments.open(tmp_path / "nowhere")
