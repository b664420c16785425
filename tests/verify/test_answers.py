"""`lorazip verify --model` on a tiny real model: what it finds that errors do not, and what it says where it cannot."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from testing.broken import edit_manifest, find, flip, reseal
from testing.peft_fixtures import edit_weights, load_adapter
from testing.tiny_models import letters, llama, save_adapter, save_model, save_rows, tokenizer

from lorazip_cli.main import main
from lorazip_core.base.errors import UsageError
from lorazip_core.model import extra
from lorazip_core.model.options import ModelOptions
from lorazip_core.verify.run import verify

LOUD, QUIET = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
NAMES = ["a0", "a1", "a2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three adapters whose energy is nearly all in one module, rows, and two bundles of them."""
    root = tmp_path_factory.mktemp("answers")
    save_model(root / "base", llama())
    for seed, name in enumerate(NAMES):
        folder = root / "adapters" / name
        save_adapter(folder, llama(), seed, r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])
        edit_weights(folder, lambda tensors: tensors.update({key: _scaled(key, x) for key, x in tensors.items()}))
    save_rows(root / "rows.jsonl", letters(5, 6))
    save_rows(root / "own" / "a1.jsonl", letters(6, 3))
    for name, rank, dtype in (("bundle", 4, "f32"), ("lossy", 1, "bf16")):
        argv = ["compress", str(root / "adapters"), "-o", str(root / name), "--method", "svd", "-q"]
        assert main([*argv, "--rank", str(rank), "--dtype", dtype]) == 0
    return root


def _scaled(key: str, x: torch.Tensor) -> torch.Tensor:
    if "lora_B" not in key:
        return x
    return x * (3 if LOUD in key else 0.4 if QUIET in key else 0.01)


@pytest.fixture
def inside(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change."""
    shutil.copytree(root, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(
    capsys: pytest.CaptureFixture[str], *argv: str, bundle: str = "bundle", model: str = "base"
) -> tuple[int, dict[str, Any]]:
    always = ["verify", bundle, "--against", "adapters", "--model", model, "--json", "-q"]
    rows = [] if "--rows" in argv else ["--rows", "rows.jsonl"]
    code = main([*always, *rows, *argv])
    printed = capsys.readouterr()
    return code, json.loads(printed.out)


def swap_module(bundle: Path, adapter: str, other: str, module: str) -> None:
    """Give ``adapter`` the update of ``other`` in a module, at equal energy, with all digests and claims made right."""
    own, foreign = (bundle / find(bundle, f"individual/{name}-*") for name in (adapter, other))
    tensors, others = load_file(own), load_file(foreign)
    with safe_open(own, framework="pt") as handle:
        metadata = handle.metadata()
    pairs = [(content[f"{module}.B"], content[f"{module}.A"]) for content in (tensors, others)]
    before, after = (float((b @ a).norm()) for b, a in pairs)
    tensors |= {f"{module}.B": pairs[1][0] * (before / after), f"{module}.A": pairs[1][1]}
    save_file(tensors, own, metadata=metadata)
    reseal(bundle)
    (measured,) = [each for each in verify(bundle, against=Path("adapters")).adapters if each.name == adapter]

    def claim(fields: dict[str, Any]) -> None:
        (entry,) = [entry for entry in fields["adapters"] if entry["name"] == adapter]
        assert measured.worst_module is not None
        entry["squared_error"] = measured.squared_error
        entry["mean_module_squared_error"] = measured.mean_module_squared_error
        entry["worst_module"] = {
            "name": measured.worst_module.name,
            "squared_error": measured.worst_module.squared_error,
        }

    edit_manifest(bundle, claim)


GATES = ("--max-error", "0.1", "--max-mean-error", "0.05")


def test_one_swapped_module_is_found_by_its_divergence_alone(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, sound = run(capsys, *GATES, "--max-kl", "0.001")
    assert code == 0
    assert sound["model"]["summary"]["max_kl"] < 1e-6
    swap_module(inside / "bundle", "a1", "a2", QUIET)
    code, report = run(capsys, *GATES)
    assert code == 0, "sound, true in all it claims, and within every limit on errors"
    assert 0 < report["adapters"][1]["squared_error"] < 0.1
    code, report = run(capsys, *GATES, "--max-kl", "0.001")
    assert code == 1
    assert [(found["kind"], found["adapter"]) for found in report["findings"]] == [("max-kl", "a1")]
    kl = {each["name"]: each["kl"] for each in report["model"]["adapters"]}
    assert kl["a1"] > 0.01
    assert max(kl["a0"], kl["a2"]) < 1e-6


def test_figures_are_those_of_the_rows(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(capsys, bundle="lossy")
    model, summary = report["model"], report["model"]["summary"]
    assert code == 0
    assert (model["model"], model["rows"], model["dtype"], model["prompt_tokens"]) == (
        "base",
        "rows.jsonl",
        "f32",
        1024,
    )
    assert [each["name"] for each in model["adapters"]] == NAMES
    assert (summary["adapters"], summary["rows"]) == (3, 18)
    base = {(each["exact_match"]["base"], each["loss"]["base"]) for each in model["adapters"]}
    assert len(base) == 1, "all have the same rows"
    for each in model["adapters"]:
        assert each["loss"]["original"] != each["loss"]["base"]
        assert 0 < each["kl"] <= summary["max_kl"]
    assert summary["mean_kl"] == pytest.approx(sum(each["kl"] for each in model["adapters"]) / 3)
    again = run(capsys, bundle="lossy")[1]
    assert again["model"] == model


def test_what_is_kept_of_the_exact_match(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an end of turn, so that an answer can be one token, which the adapter gives itself."""
    shutil.rmtree(inside / "base")
    save_model(inside / "base", llama(), template=None)
    settings = inside / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "eos_token"}))
    made = tokenizer(None)
    rows = []
    for name in NAMES:
        adapter = load_adapter(inside / "adapters" / name, llama())
        for number, row in enumerate(letters(5, 8)):
            with torch.no_grad():
                said = adapter(torch.tensor([made(row["input"]).input_ids])).logits[0, -1].argmax()
            output = made.convert_ids_to_tokens([int(said)])[0] if number % 4 else "z"
            rows.append({"adapter": name, "input": row["input"], "output": output})
    save_rows(inside / "rows.jsonl", rows)
    code, report = run(capsys, "--min-kept", "0.99")
    summary = report["model"]["summary"]
    assert code == 0
    assert summary["exact_match"]["original"] == pytest.approx(0.75, abs=0.13)
    assert (summary["kept"], summary["kept_interval"]) == (1.0, [1.0, 1.0])
    code, report = run(capsys, "--min-kept", "0.99", bundle="lossy")
    summary = report["model"]["summary"]
    kept = summary["exact_match"]["compressed"] / summary["exact_match"]["original"]
    assert summary["kept"] == pytest.approx(kept)
    assert kept < 0.99
    low, high = summary["kept_interval"]
    assert low <= kept <= high
    assert code == 1
    assert [found["kind"] for found in report["findings"]] == ["min-kept"]
    assert report["gates"]["min_kept"] == 0.99


def test_a_folder_of_rows_is_of_some_adapters(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_rows(inside / "own" / "other.jsonl", letters(1, 1))
    _, report = run(capsys, "--rows", "own", "--max-rows", "2")
    model = report["model"]
    assert [(each["name"], each["rows"]) for each in model["adapters"]] == [("a1", 2)]
    assert model["without_rows"] == ["a0", "a2"]
    assert model["unknown"] == ["other"]


def test_only_adapters_that_are_named_are_asked(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(inside / "adapters" / "a1")
    code, report = run(capsys, "--adapter", "a0", "--adapter", "a2")
    assert code == 0
    assert [each["name"] for each in report["model"]["adapters"]] == ["a0", "a2"]
    assert (report["model"]["without_rows"], report["model"]["not_scored"]) == ([], [])


def test_adapters_that_cannot_be_put_on_the_model_are_findings(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(inside / "adapters")
    fields = {"r": 2, "target_modules": ["q_proj"]}
    save_adapter(inside / "adapters" / "dora", llama(), use_dora=True, **fields)
    save_adapter(inside / "adapters" / "saved", llama(), modules_to_save=["lm_head"], **fields)
    save_adapter(inside / "adapters" / "deep", llama(4), **fields)
    save_adapter(inside / "adapters" / "good", llama(), **fields)
    argv = ["compress", "adapters", "-o", "mixed", "--method", "svd", "--rank", "2", "--dtype", "f32", "-q"]
    assert main(argv) == 0
    code, report = run(capsys, "--max-kl", "1", bundle="mixed")
    assert code == 1
    reasons = {found["adapter"]: found["message"] for found in report["findings"]}
    assert {found["kind"] for found in report["findings"]} == {"model-unknown"}
    assert "besides its LoRA factors" in reasons["dora"]
    assert "besides its LoRA factors" in reasons["saved"]
    assert "2 of its modules are not in the model: model.layers.2.self_attn.q_proj" in reasons["deep"]
    assert {each["name"] for each in report["model"]["not_scored"]} == {"dora", "saved", "deep"}
    assert [each["name"] for each in report["model"]["adapters"]] == ["good"]


def test_of_a_missing_original_nothing_is_asked(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(inside / "adapters" / "a0")
    code, report = run(capsys)
    assert code == 1
    assert [found["kind"] for found in report["findings"]] == ["source-missing"]
    assert [each["name"] for each in report["model"]["not_scored"]] == ["a0"]
    assert report["model"]["summary"]["adapters"] == 2


def test_a_damaged_bundle_is_not_asked(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(inside / "bundle" / find(inside / "bundle", "individual/a0-*"))
    code, report = run(capsys)
    assert code == 4
    assert report["model"] is None


def test_renderings_have_the_answers(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--report", "page.html", "--junit", "verify.xml", "--summary", "verify.md"]
    argv = ["verify", "lossy", "--against", "adapters", "--model", "base", "--rows", "rows.jsonl", "--max-kl", "1e-6"]
    assert main([*argv, "--min-kept", "0.9", *files]) == 1
    said = capsys.readouterr().err
    page, xml, markdown = (Path(name).read_text() for name in files[1::2])
    assert "On base, 3 adapters with 18 rows: exact match" in said
    assert "Answers of the model" in page
    assert "KL of the worst adapter is at most 1e-06" in page
    assert "<code>--max-kl</code>" in markdown
    assert 'name="KL of the worst adapter is at most 1e-06"' in xml
    assert "KL: " in xml
    assert said.count("is above the limit of 1e-06") == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "base"], "--model needs --rows and --against"),
        (["--rows", "rows.jsonl"], "--rows needs"),
        (["--min-kept", "0.9"], "--min-kept needs"),
        (["--model", "base", "--rows", "rows.jsonl"], "--model: answers are compared with the original adapters'"),
        (["--model", "adapters", "--rows", "rows.jsonl", "--against", "adapters"], "it has no config.json"),
        (["--model", "base", "--rows", "none", "--against", "adapters"], "none does not exist"),
        (["--model", "base", "--rows", "own", "--max-kl", "-1"], "-1.0 is not a number of 0 or more"),
    ],
)
def test_mistakes_are_answered_before_the_work(
    argv: list[str], message: str, inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("lorazip_core.verify.run.verify_by_module", work)
    assert main(["verify", "bundle", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_library_refuses_the_same() -> None:
    options = ModelOptions("base", Path("rows.jsonl"), max_kl=-1)
    with pytest.raises(UsageError, match="«model»: answers are compared"):
        verify(Path("bundle"), answers=options)
    with pytest.raises(UsageError, match="«max_kl» -1"):
        options.read()


def test_rows_of_no_adapter_here_are_refused(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_rows(inside / "rows.jsonl", [{"adapter": "b", "input": "a", "output": "b"}])
    argv = ["verify", "bundle", "--against", "adapters", "--model", "base", "--rows", "rows.jsonl", "-q"]
    assert main(argv) == 2
    assert "none of the adapters of the bundle has rows there (those are of b)" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["transformers", "jinja2"])
def test_without_its_library_one_line_says_what_to_install(
    missing: str, inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == missing else find_spec(name))
    argv = ["verify", "bundle", "--against", "adapters", "--model", "base", "--rows", "rows.jsonl"]
    assert main(argv) == 8
    assert capsys.readouterr().err == f"lorazip: error: to run a model needs {missing} (pip install {missing})\n"


@pytest.mark.parametrize("missing", ["a weight", "the weights", "the tokenizer"])
def test_a_model_that_cannot_be_loaded_is_one_line(
    missing: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = inside / "base" / "model.safetensors"
    if missing == "a weight":
        tensors = load_file(weights)
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif missing == "the weights":
        weights.unlink()
    else:
        for path in (inside / "base").glob("*token*"):
            path.unlink()
    argv = ["verify", "bundle", "--against", "adapters", "--model", "base", "--rows", "rows.jsonl", "-q"]
    assert main(argv) == 8
    said = capsys.readouterr().err
    assert said.startswith("lorazip: error: base: ")
    assert said.count("\n") == 1


def test_a_model_that_the_hub_does_not_give_is_one_line(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, so that nobody is asked: huggingface_hub has read its environment long ago."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    argv = ["verify", "bundle", "--against", "adapters", "--model", "nobody/nothing", "--rows", "rows.jsonl", "-q"]
    assert main(argv) == 7
    said = capsys.readouterr().err
    assert said.startswith("lorazip: error: nobody/nothing: this model cannot be had from the Hub: ")
    assert said.count("\n") == 1
