"""Names that training wrappers and raw state dicts leave in a file: read without them, exported as PEFT writes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import peft_fixtures as fixtures
from torch import Tensor

from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.notes import notes
from lorazip_core.adapter.reader import open_adapter
from lorazip_core.base.errors import AdapterError

PREFIX = "base_model.model."
LINEAR = {"target_modules": ["q", "up"], "r": 4, "lora_alpha": 12, "modules_to_save": ["head"]}
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "a"
    fixtures.save_adapter(folder, fixtures.tokens(), **LINEAR)
    return folder


def renamed(made: Path, folder: Path, rename: Rename) -> Path:
    """A copy of the adapter with other names of tensors."""
    shutil.copytree(made, folder)
    tensors = load_file(folder / fixtures.WEIGHTS)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / fixtures.WEIGHTS)
    return folder


def after_prefix(inner: Rename) -> Rename:
    return lambda key: PREFIX + inner(key.removeprefix(PREFIX))


def with_adapter(key: str, name: str = "default") -> str:
    if key.startswith(f"{PREFIX}head."):
        return key.replace("head.", f"head.modules_to_save.{name}.")
    return key.replace("lora_A.", f"lora_A.{name}.").replace("lora_B.", f"lora_B.{name}.")


WRAPPED: dict[str, tuple[Rename, list[str]]] = {
    "compiled": (after_prefix(lambda key: f"_orig_mod.{key}"), ["_orig_mod"]),
    "compiled outside": (lambda key: f"_orig_mod.{key}", ["_orig_mod"]),
    "fsdp": (lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."), ["_fsdp_wrapped_module"]),
    "fsdp of factors": (lambda key: key.replace(".weight", "._fsdp_wrapped_module.weight"), ["_fsdp_wrapped_module"]),
    "checkpointing": (
        lambda key: key.replace(".q.", "._checkpoint_wrapped_module.q."),
        ["_checkpoint_wrapped_module"],
    ),
    "parallel": (after_prefix(lambda key: f"module.{key}"), ["module"]),
    "parallel outside": (lambda key: f"module.{key}", ["module"]),
    "doubled": (after_prefix(lambda key: f"module.module._orig_mod._orig_mod.{key}"), ["module", "_orig_mod"]),
    "several": (
        lambda key: "_fsdp_wrapped_module.module." + key.replace(".q.", "._checkpoint_wrapped_module._orig_mod.q."),
        ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"],
    ),
    "peft twice": (lambda key: PREFIX + key, ["the repeated base_model.model (PEFT around PEFT)"]),
    "peft four times": (lambda key: PREFIX * 3 + key, ["the repeated base_model.model"]),
    "peft in parallel in peft": (
        lambda key: f"module.{PREFIX}module.{PREFIX}{after_prefix(lambda inner: f'module._orig_mod.{inner}')(key)}",
        ["the repeated base_model.model", "module (", "_orig_mod"],
    ),
    "default": (with_adapter, ["default"]),
    "named": (lambda key: with_adapter(key, "my_task"), ["my_task"]),
    "named like a wrapper": (lambda key: with_adapter(f"module.{key}", "module"), ["module"]),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_export_loads_in_peft_as_the_adapter_without_wrappers(
    made: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rename, words = WRAPPED[kind]
    renamed(made, tmp_path / "in" / "a", rename)
    options = ["--method", "svd", "--rank", "64", "--dtype", "f32"]
    assert main(["compress", str(tmp_path / "in"), "-o", str(tmp_path / "b"), *options]) == 0
    said = capsys.readouterr().err
    note = next(line for line in said.splitlines() if "will be exported, without" in line)
    for word in words:
        assert word in note
    assert main(["verify", str(tmp_path / "b"), "--against", str(tmp_path / "in"), "-q"]) == 0
    assert main(["export", str(tmp_path / "b"), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert load_file(tmp_path / "out" / "a" / fixtures.WEIGHTS).keys() == load_file(made / fixtures.WEIGHTS).keys()
    base = fixtures.tokens()
    expected = fixtures.logits(fixtures.load_strictly(made, fixtures.tokens()), base)
    actual = fixtures.logits(fixtures.load_strictly(tmp_path / "out" / "a", fixtures.tokens()), base)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["pickle", "shards"])
def test_names_in_pickles_and_shards(made: Path, tmp_path: Path, form: str) -> None:
    folder = renamed(made, tmp_path / "a", lambda key: with_adapter(f"_orig_mod.{key}"))
    (fixtures.to_pickle if form == "pickle" else fixtures.to_shards)(folder)
    adapter, plain = open_adapter("a", folder, allow_pickle=True), open_adapter("a", made)
    assert adapter.parts.keys() == plain.parts.keys()
    assert adapter.extras.keys() == plain.extras.keys()
    for name in plain.parts:
        assert all(map(torch.equal, adapter.stored_factors(name), plain.stored_factors(name)))
    for key in plain.extras:
        assert torch.equal(adapter.extra(key), plain.extra(key))


def test_ordinary_names_have_no_note(made: Path) -> None:
    assert notes(open_collection(made)) == []


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(AdapterError) as caught:
        open_adapter("some/name", folder)
    for word in ("some/name", *words):
        assert word in str(caught.value)


Change = Callable[[dict[str, Tensor]], Any]


def put(key: str, shape: tuple[int, ...] = (4, 12)) -> Change:
    return lambda tensors: tensors.update({PREFIX + key: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("_orig_mod.layers.0.q.lora_A.weight"), ["_orig_mod.layers.0.q.lora_A.weight", "both"]),
        (put("layers.0._orig_mod.head.weight"), []),
        (put("_orig_mod.head.weight", (5, 12)), ["_orig_mod.head.weight", "both"]),
        (
            put(f"{PREFIX}layers.0.q.lora_A.weight"),
            [f"tensors {PREFIX * 2}layers.0.q", f"and {PREFIX}layers.0.q", "both"],
        ),
        (put("layers.0.q.lora_A.default.weight"), ["lora_A.default.weight", "'default'", "carries none"]),
    ],
)
def test_what_cannot_be_told_apart_is_refused(made: Path, tmp_path: Path, change: Change, words: list[str]) -> None:
    folder = renamed(made, tmp_path / "a", str)
    fixtures.edit_weights(folder, change)
    if words:
        refused(folder, *words)
    else:
        assert f"{PREFIX}layers.0.head.weight" in open_adapter("a", folder).extras


def test_several_adapters_in_one_file(made: Path, tmp_path: Path) -> None:
    folder = renamed(made, tmp_path / "a", lambda key: with_adapter(key, "one" if ".q." in key else "two"))
    refused(folder, "'one'", "'two'", "save each on its own")


def test_module_further_down_may_be_a_layer(made: Path, tmp_path: Path) -> None:
    """It stays, and a line says so; so does one at the top that not all tensors are in."""
    renamed(made, tmp_path / "a", lambda key: key.replace(".layers.0.", ".layers.0.module."))
    renamed(made, tmp_path / "b", lambda key: key.replace(f"{PREFIX}layers.0.", f"{PREFIX}module.layers.0."))
    collection = open_collection(tmp_path)
    assert "layers.0.module.q" in collection.adapters[0].parts
    assert "module.layers.0.q" in collection.adapters[1].parts
    assert ["'module' in layers.0.module.q" in note for note in notes(collection)] == [True]


@pytest.mark.parametrize("pattern", ["_orig_mod.layers.0.q", "layers.0.q", r"^layers\.0\.q", r"^_orig_mod.*0\.q"])
def test_rank_pattern_with_or_without_the_wrapper(tmp_path: Path, pattern: str) -> None:
    fields = {"target_modules": ["q"], "r": 4, "lora_alpha": 12}
    fixtures.save_adapter(tmp_path / "a", fixtures.tokens(), **fields, rank_pattern={"layers.0.q": 2})
    folder = renamed(tmp_path / "a", tmp_path / "b", WRAPPED["compiled"][0])
    fixtures.edit_config(folder, rank_pattern={pattern: 2})
    assert {name: (part.rank, part.scale) for name, part in open_adapter("b", folder).parts.items()} == {
        "layers.0.q": (2, 6.0),
        "layers.1.q": (4, 3.0),
    }


def test_a_scale_that_depends_on_the_wrapper_is_refused(made: Path, tmp_path: Path) -> None:
    folder = renamed(made, tmp_path / "a", WRAPPED["compiled"][0])
    fixtures.edit_config(folder, alpha_pattern={r"^layers\.0\.q": 3})
    refused(folder, "alpha_pattern", "layers.0.q", "_orig_mod.layers.0.q")


def test_names_of_one_model_before_and_after_it_was_rearranged(made: Path, tmp_path: Path) -> None:
    """Two names of the same layer in two adapters are told; in one adapter they are two layers."""
    for name, head in (("a", "language_model.model."), ("b", "model.language_model."), ("c", "model.language_model.")):
        renamed(made, tmp_path / name, after_prefix(lambda key, head=head: head + key))
    (note,) = notes(open_collection(tmp_path))
    assert note.startswith("4 modules ")
    assert "language_model.model.layers.0.q and model.language_model.layers.0.q" in note
    both = tmp_path / "d"
    tensors = load_file(made / fixtures.WEIGHTS)
    renamed(made, both, after_prefix(lambda key: "language_model.model." + key))
    fixtures.edit_weights(
        both, lambda own: own.update({key.replace(PREFIX, f"{PREFIX}model."): each for key, each in tensors.items()})
    )
    assert notes(open_collection(tmp_path)) == []
