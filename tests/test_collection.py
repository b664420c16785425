"""A directory of adapters: what is found, in which order, what is refused together, and how many files stay open."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import peft_fixtures as fixtures
import pytest
import torch

from lorazip_core.adapter import Collection, open_collection
from lorazip_core.adapter.collection import find_adapters
from lorazip_core.errors import AdapterError, AdapterErrors, UsageError

LINEAR = {"target_modules": ["q", "up"], "r": 4, "lora_alpha": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "adapter"
    fixtures.save_adapter(folder, fixtures.tokens(), **LINEAR)
    (folder / "README.md").unlink()
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def place(made: Path, *folders: Path) -> None:
    for folder in folders:
        shutil.copytree(made, folder, dirs_exist_ok=True)


def names(collection: Collection) -> list[str]:
    return [adapter.name for adapter in collection.adapters]


def errors(root: Path) -> dict[str, str]:
    """Name and reason of every adapter that is refused, each told in one line."""
    with pytest.raises(AdapterErrors) as caught:
        open_collection(root)
    assert caught.value.exit_code == 3
    assert str(caught.value).splitlines() == [str(error) for error in caught.value.errors]
    return {error.adapter: error.reason for error in caught.value.errors}


def test_names_are_paths_in_utf8_order(root: Path, made: Path) -> None:
    wanted = ["A", "Z/inner", "a", "a-b", "a/b", "a0", "team/x/deep", "z", "é", "ｚ", "𝔸"]  # noqa: RUF001
    place(made, *(root / name for name in reversed(wanted)))
    assert names(open_collection(root)) == wanted
    assert wanted == sorted(wanted, key=lambda name: name.encode())


def test_root_itself_is_an_adapter(root: Path, made: Path) -> None:
    place(made, root, root / "a")
    assert names(open_collection(root)) == [".", "a"]


def test_hidden_and_foreign_folders_are_skipped(root: Path, made: Path, tmp_path: Path) -> None:
    place(made, root / "a", root / ".hidden", root / "b" / ".cache" / "c", tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(root / "a")
    (root / "notes").mkdir()
    (root / "link-outside").symlink_to(tmp_path / "outside")
    (root / "link-up").symlink_to(root)
    (root / "b" / "loop").symlink_to(root / "b")
    (root / "broken").symlink_to(root / "nothing")
    assert names(open_collection(root)) == ["a"]


def test_link_inside_is_an_adapter_of_its_own(root: Path, made: Path) -> None:
    place(made, root / "a")
    (root / "b").symlink_to("a")
    assert names(open_collection(root)) == ["a", "b"]


def test_root_may_be_a_link(root: Path, made: Path, tmp_path: Path) -> None:
    place(made, root / "a")
    (tmp_path / "link").symlink_to(root)
    assert names(open_collection(tmp_path / "link")) == ["a"]


def test_weights_behind_a_link_outside_do_not_count(root: Path, made: Path, tmp_path: Path) -> None:
    place(made, root / "a", root / "b")
    (root / "b" / fixtures.WEIGHTS).unlink()
    (root / "b" / fixtures.WEIGHTS).symlink_to(made / fixtures.WEIGHTS)
    assert "no weights" in errors(root)["b"]


def test_order_does_not_depend_on_creation(root: Path, made: Path, tmp_path: Path) -> None:
    place(made, *(root / name for name in "abc"))
    place(made, *(tmp_path / "other" / name for name in "cba"))
    assert [name for name, _ in find_adapters(root)] == [name for name, _ in find_adapters(tmp_path / "other")]


def test_nothing_there(root: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        open_collection(root / "missing")
    assert "no adapters here" in errors(root)[str(root)]


def test_every_bad_adapter_is_named(root: Path, made: Path) -> None:
    place(made, *(root / name for name in ("good", "dora", "cut", "pickle")))
    fixtures.edit_config(root / "dora", use_dora=True)
    with (root / "cut" / fixtures.WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    fixtures.to_pickle(root / "pickle")
    reasons = errors(root)
    assert sorted(reasons) == ["cut", "dora", "pickle"]
    assert "DoRA" in reasons["dora"]
    assert "--allow-pickle" in reasons["pickle"]
    collection = open_collection(root, skip_bad=True)
    assert names(collection) == ["good"]
    assert {skipped.name: skipped.reason for skipped in collection.skipped} == reasons
    assert names(open_collection(root, skip_bad=True, allow_pickle=True)) == ["good", "pickle"]


def test_skipping_all_is_an_error(root: Path, made: Path) -> None:
    place(made, root / "a")
    fixtures.edit_config(root / "a", use_dora=True)
    with pytest.raises(AdapterErrors, match="DoRA"):
        open_collection(root, skip_bad=True)


def test_mixed_base_models(root: Path, made: Path) -> None:
    place(made, *(root / name for name in "abc"))
    for name, base in (("a", "org/one"), ("b", "org/two"), ("c", "org/one")):
        fixtures.edit_config(root / name, base_model_name_or_path=base)
    reasons = errors(root)
    assert list(reasons) == ["b"]
    assert "'org/two'" in reasons["b"]
    assert "2 of 3" in reasons["b"]
    assert "--allow-mixed-base" in reasons["b"]
    assert names(open_collection(root, allow_mixed_base=True)) == ["a", "b", "c"]
    skipping = open_collection(root, skip_bad=True)
    assert (names(skipping), skipping.base_model) == (["a", "c"], "org/one")


def test_shapes_that_differ(root: Path, made: Path) -> None:
    place(made, *(root / name for name in "abc"))
    key = "base_model.model.layers.0.up.lora_B.weight"
    fixtures.edit_weights(root / "b", lambda tensors: tensors.update({key: torch.ones(25, 4)}))
    reasons = errors(root)
    assert list(reasons) == ["b"]
    for word in ("layers.0.up", "[25, 12]", "[24, 12]"):
        assert word in reasons["b"]
    assert names(open_collection(root, allow_mixed_base=True, skip_bad=True)) == ["a", "c"]


def test_ranks_dtypes_and_modules_may_differ(root: Path) -> None:
    fixtures.save_adapter(root / "a", fixtures.tokens(), target_modules=["q"], r=2)
    fixtures.save_adapter(root / "b", fixtures.tokens(), target_modules=["up", "q"], r=5, dtype=torch.bfloat16)
    fixtures.save_adapter(root / "c", fixtures.tokens(), target_modules=["down"], r=3, dtype=torch.float16)
    collection = open_collection(root)
    every = [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("down", "q", "up")]
    assert [module.name for module in collection.modules] == every
    assert [len(adapter.parts) for adapter in collection.adapters] == [2, 4, 2]


def test_without_names_who_left(root: Path, made: Path) -> None:
    place(made, root / "a", root / "b")
    collection = open_collection(root).without([AdapterError("a", "NaN in a tensor")])
    assert names(collection) == ["b"]
    assert [tuple(skipped) for skipped in collection.skipped] == [("a", "NaN in a tensor")]
    with pytest.raises(AdapterErrors, match="NaN"):
        collection.without([AdapterError("b", "NaN in a tensor")])


def test_few_files_stay_open(root: Path, made: Path) -> None:
    """600 adapters, read module by module as the encoder does, keep fewer than 300 weight files open or mapped."""
    descriptors, maps = Path("/proc/self/fd"), Path("/proc/self/maps")
    if not descriptors.is_dir() or not maps.is_file():
        pytest.skip("no /proc/self here")

    def held() -> int:
        mapped = {line.split()[-1] for line in maps.read_text().splitlines() if str(root) in line}
        return len(mapped) + len(list(descriptors.iterdir()))

    for number in range(600):
        folder = root / f"{number:03}"
        folder.mkdir()
        for file in made.iterdir():
            os.link(file, folder / file.name)
    before = most = held()
    collection = open_collection(root)
    for module in ("layers.0.q", "layers.1.up"):
        for number, adapter in enumerate(collection.adapters):
            adapter.factors(module)
            most = max(most, held()) if number % 20 == 0 else most
    assert len(collection.adapters) == 600
    assert 0 < most - before < 300
