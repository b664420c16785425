"""A directory of adapters: what is found, in which order, what is refused together, and how many files stay open."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from testing import peft_fixtures as fixtures

from lorazip_core.adapter.collection import Collection, find_adapters, open_collection
from lorazip_core.adapter.notes import notes
from lorazip_core.base.errors import AdapterError, AdapterErrors, UsageError

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


def left_out(collection: Collection) -> dict[str, str]:
    assert {skipped.name for skipped in collection.skipped} == collection.no_adapters
    return dict(collection.skipped)


def test_hidden_folders_are_skipped(root: Path, made: Path) -> None:
    place(made, root / "a", root / ".hidden", root / "b" / ".cache" / "c")
    (root / "notes").mkdir()
    (root / ".link").symlink_to(root / "a")
    collection = open_collection(root)
    assert (names(collection), left_out(collection)) == (["a"], {})


def test_links_are_followed_wherever_they_lead(root: Path, made: Path, tmp_path: Path) -> None:
    place(made, root / "z", tmp_path / "outside" / "one", tmp_path / "outside" / ".hidden", tmp_path / "store" / "two")
    (root / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "two").symlink_to(tmp_path / "store" / "two")
    (root / "chain").symlink_to("hop")
    (root / "hop").symlink_to(tmp_path / "outside" / ".hidden")
    collection = open_collection(root)
    assert names(collection) == ["chain", "link/one", "link/two", "z"]
    assert left_out(collection) == {"hop": "the same folder as 'chain'"}


def test_what_links_lead_to_again_is_named(root: Path, made: Path) -> None:
    place(made, root / "runs" / "a", root / "b")
    (root / "notes").mkdir()
    links = {"alias": "b", "again": "runs", "up": ".", "runs/a/self": ".", "gone": "nothing", "knot": "knot"}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (root / "empty").symlink_to("notes")
    (root / "notes" / "loop").symlink_to(".")
    collection = open_collection(root)
    assert names(collection) == ["b", "runs/a"]
    assert left_out(collection) == {
        "again": "the same folder as 'runs'",
        "alias": "the same folder as 'b'",
        "gone": "a link to nothing",
        "knot": "a link to nothing",
        "runs/a/self": "the same folder as 'runs/a'",
        "up": "the same folder as '.'",
    }


def test_a_link_to_a_folder_above_takes_the_rest_of_it(root: Path, made: Path) -> None:
    place(made, root / "a", root.parent / "beside")
    (root / "up").symlink_to("..")
    collection = open_collection(root)
    assert names(collection) == ["a", "up/beside"]
    assert left_out(collection) == {"up/root": "the same folder as '.'"}


def test_only_links_to_nothing(root: Path) -> None:
    (root / "a").symlink_to("gone")
    with pytest.raises(AdapterErrors, match=r"no adapters here \(left out: 'a' \(a link to nothing\)\)"):
        open_collection(root)


def test_root_may_be_a_link(root: Path, made: Path, tmp_path: Path) -> None:
    place(made, root / "a")
    (tmp_path / "link").symlink_to(root)
    assert names(open_collection(tmp_path / "link")) == ["a"]


def to_hub_cache(made: Path, cache: Path, repository: str, commit: str) -> Path:
    """An adapter as `snapshot_download` leaves it: links into the folder of blobs."""
    of = cache / f"models--{repository.replace('/', '--')}"
    snapshot = of / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (of / "blobs").mkdir(exist_ok=True)
    for file in made.iterdir():
        blob = f"{commit[:8]}{file.name.encode().hex()}"
        shutil.copyfile(file, of / "blobs" / blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob))
    return snapshot


def test_the_cache_of_the_hub(root: Path, made: Path) -> None:
    """A snapshot, a whole cache, and a folder whose weights lead into it."""
    snapshot = to_hub_cache(made, root / "hub", "acme/a", "0" * 40)
    to_hub_cache(made, root / "hub", "acme/a", "1" * 40)
    assert names(open_collection(snapshot)) == ["."]
    folder = root / "mine" / "b"
    folder.mkdir(parents=True)
    shutil.copyfile(made / fixtures.CONFIG, folder / fixtures.CONFIG)
    (folder / fixtures.WEIGHTS).symlink_to((snapshot / fixtures.WEIGHTS).resolve())
    assert names(open_collection(root / "mine")) == ["b"]
    of = "hub/models--acme--a/snapshots"
    assert names(open_collection(root)) == [f"{of}/{'0' * 40}", f"{of}/{'1' * 40}", "mine/b"]


@pytest.mark.parametrize("name", [fixtures.CONFIG, fixtures.WEIGHTS])
def test_a_file_that_is_a_link_to_nothing(root: Path, made: Path, name: str) -> None:
    place(made, root / "a", root / "b")
    (root / "b" / name).unlink()
    (root / "b" / name).symlink_to("../blobs/gone")
    hint = "restore the file or the cache that it leads to"
    assert errors(root) == {"b": f"{name} is a link to nothing ({hint})"}


def test_weights_without_a_configuration_are_named(root: Path, made: Path) -> None:
    place(made, root / "a", root / "b")
    (root / "b" / fixtures.CONFIG).unlink()
    assert left_out(open_collection(root)) == {"b": f"{fixtures.WEIGHTS} without {fixtures.CONFIG}"}


def test_weights_beside_an_adapter_are_named(root: Path, made: Path) -> None:
    place(made, root / "a", root / "b", root / "c")
    carried_or_worthless = [
        "adapter_model.bin",
        "adapter_model-00001-of-00002.safetensors",
        "optimizer.pt",
        "optimizer_1.bin",
        "scheduler.pt",
        "rng_state_0.pth",
        "random_states_0.pkl",
        "training_args.bin",
        "tokenizer.json",
        "tokenizer.model",
        "trainer_state.json",
        "README.md",
        "config.json",
        "events.out.tfevents",
    ]
    missed = ["Head.PT", "non_lora_trainables.bin", "value_head.safetensors"]
    for name in carried_or_worthless + missed:
        (root / "b" / name).touch()
    (root / "c" / "value_head.bin").symlink_to("../../somewhere")
    assert open_collection(root).left_out == {"b": tuple(missed), "c": ("value_head.bin",)}


def test_shards_of_any_name_are_not_beside(root: Path, made: Path) -> None:
    place(made, root / "a")
    fixtures.to_shards(root / "a", 2)
    index = root / "a" / f"{fixtures.WEIGHTS}.index.json"
    shards = sorted(path for path in (root / "a").iterdir() if path.suffix == ".safetensors")
    text = index.read_text()
    for number, path in enumerate(shards):
        text = text.replace(path.name, f"part{number}.safetensors")
        path.rename(path.with_name(f"part{number}.safetensors"))
    index.write_text(text)
    assert open_collection(root).left_out == {}


def test_checkpoints_below_an_adapter_are_adapters_and_said(root: Path, made: Path) -> None:
    place(made, root / "run", root / "run" / "checkpoint-1", root / "run" / "x" / "checkpoint-2", root / "run2")
    collection = open_collection(root)
    assert names(collection) == ["run", "run/checkpoint-1", "run/x/checkpoint-2", "run2"]
    where = "in the folder of another adapter, and taken as adapters of their own"
    assert notes(collection) == [f"{where}: 'run/checkpoint-1' and 1 more"]


@pytest.mark.parametrize(
    ("module", "functions", "what"),
    [
        (os, ("scandir", "listdir"), "b"),
        (os, ("open",), f"b/{fixtures.WEIGHTS}"),
        (Path, ("read_bytes",), f"b/{fixtures.CONFIG}"),
    ],
)
def test_what_may_not_be_read(
    root: Path, made: Path, monkeypatch: pytest.MonkeyPatch, module: Any, functions: tuple[str, ...], what: str
) -> None:
    """It is said of the adapter, or of the folder that may have adapters in it, and others need not share it."""
    place(made, root / "a", root / "b" / "deep" if what == "b" else root / "b")

    def refusing(original: Any) -> Any:
        def refuse(path: Any, *arguments: Any) -> Any:
            if os.fspath(path) == str(root / what):
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
            return original(path, *arguments)

        return refuse

    for function in functions:
        monkeypatch.setattr(module, function, refusing(getattr(module, function)))
    found = errors(root)
    denied = f"{os.path.basename(what)} cannot be read: Permission denied (check its permissions)"
    assert found == {"b": denied}
    collection = open_collection(root, skip_bad=True)
    assert names(collection) == ["a"]
    assert dict(collection.skipped) == found


def test_order_does_not_depend_on_creation(root: Path, made: Path, tmp_path: Path) -> None:
    place(made, *(root / name for name in "abc"))
    place(made, *(tmp_path / "other" / name for name in "cba"))
    other = find_adapters(tmp_path / "other").adapters
    assert [each.name for each in find_adapters(root).adapters] == [each.name for each in other]


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
    assert "«allow_pickle»" in reasons["pickle"]
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
    assert "«allow_mixed_base»" in reasons["b"]
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
    for name in "ab":
        (root / name / "value_head.bin").touch()
    collection = open_collection(root).without([AdapterError("a", "NaN in a tensor")])
    assert names(collection) == ["b"]
    assert collection.left_out == {"b": ("value_head.bin",)}
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
