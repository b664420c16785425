"""Collections that are made of links, and files beside adapters, through the commands that read adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from testing.random_adapters import plain, write_collection

from lorazip_cli.main import main
from lorazip_core.adapter.lock import LOCK_NAME, Lock, LockedAdapter, LockedFile, Origin, encode_lock
from lorazip_core.base.digests import sha256_file
from lorazip_core.bundle.reader import Bundle

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A directory of links: to two adapters elsewhere, a second one to the first, one to itself and one to nothing."""
    root = tmp_path / "linked"
    root.mkdir()
    write_collection(tmp_path / "elsewhere", plain(2))
    for name, folder in zip("ab", sorted((tmp_path / "elsewhere").iterdir()), strict=True):
        (root / name).symlink_to(Path("..", "elsewhere", folder.name))
    (root / "latest").symlink_to("b")
    (root / "loop").symlink_to(".")
    (root / "gone").symlink_to("../nothing")
    return root


LEFT_OUT = {"gone": "a link to nothing", "latest": "the same folder as 'b'", "loop": "the same folder as '.'"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    return dict(json.loads(out))


def skipped(found: dict[str, Any]) -> dict[str, str]:
    return {each["name"]: each["reason"] for each in found["skipped"]}


def test_links_through_the_commands(linked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    code, _, err = run(capsys, "compress", linked, "-o", bundle, "--method", "svd")
    assert code == 0
    assert [f"left out {name}: {reason}" for name, reason in LEFT_OUT.items()] == [
        line for line in err.splitlines() if line.startswith("left out")
    ]
    assert [entry.name for entry in Bundle(bundle).manifest.adapters] == ["a", "b"]
    assert main(["verify", str(bundle), "--against", str(linked)]) == 0
    assert skipped(report(capsys, "info", bundle)) == LEFT_OUT
    plan = report(capsys, "compress", linked, "--dry-run")
    assert (plan["adapters"], skipped(plan)) == (2, LEFT_OUT)
    clusters = report(capsys, "cluster", linked, "-o", tmp_path / "c.json", "--clusters", "1")
    assert (clusters["adapters"], skipped(clusters)) == (2, LEFT_OUT)


def test_a_link_that_came_later_is_no_adapter_that_the_bundle_lacks(
    linked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "compress", linked, "-o", tmp_path / "bundle", "--method", "svd")[0] == 0
    (linked / "stable").symlink_to("a")
    assert run(capsys, "verify", tmp_path / "bundle", "--against", linked)[0] == 0
    (linked / "a").unlink()
    (linked / "a").symlink_to("gone")
    code, _, err = run(capsys, "verify", tmp_path / "bundle", "--against", linked)
    assert code == 1
    assert "a: it is not there" in err or "a: a link to nothing" in err


def test_the_lock_holds_through_links(linked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [LockedFile(each.name, each.stat().st_size, sha256_file(each)) for each in sorted((linked / "a").iterdir())]
    entry = LockedAdapter(name="a", origin=Origin(directory="/data"), base_model="org/base", files=files)
    (linked / LOCK_NAME).write_bytes(encode_lock(Lock(sources=[], adapters=[entry])))
    assert run(capsys, "compress", linked, "-o", tmp_path / "bundle", "--method", "svd")[0] == 0
    (linked / "a").unlink()
    (linked / "a").symlink_to((linked / "b").resolve())
    code, _, err = run(capsys, "compress", linked, "-o", tmp_path / "other", "--method", "svd")
    assert code == 3
    assert f"adapter 'a': {WEIGHTS} is not what {LOCK_NAME} has" in err


def test_files_beside_adapters_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, bundle = tmp_path / "adapters", tmp_path / "bundle"
    write_collection(root, plain(4))
    names = sorted(folder.name for folder in root.iterdir())
    without = tmp_path / "without"
    assert run(capsys, "compress", root, "-o", without, "--method", "svd")[0] == 0
    assert "left_out" not in (without / "manifest.json").read_text()
    for name in names:
        (root / name / "value_head.bin").write_bytes(b"weights")
    (root / names[1] / "non_lora_trainables.bin").write_bytes(b"weights")
    code, _, err = run(capsys, "compress", root, "-o", bundle, "--method", "svd")
    assert code == 0
    lines = [
        f"non_lora_trainables.bin of 1 adapter: {names[1]}",
        f"value_head.bin of 4 adapters: {', '.join(names[:3])}, ...",
    ]
    what = "files beside adapters that a bundle does not carry"
    assert err.splitlines()[-3:] == [f"{what}: 2", *(f"  {line}" for line in lines)]
    left_out = {entry.name: entry.left_out for entry in Bundle(bundle).manifest.adapters}
    assert left_out == {name: ["value_head.bin"] for name in names} | {
        names[1]: ["non_lora_trainables.bin", "value_head.bin"]
    }
    assert report(capsys, "compress", root, "--dry-run")["left_out"] == left_out
    assert f"{what}: {lines[1]}" in run(capsys, "compress", root, "--dry-run")[1]
    out = run(capsys, "info", bundle)[1].splitlines()
    assert out[-3:] == ["files that were beside the originals, and are not in the bundle", *(f"  {x}" for x in lines)]
    assert {each["name"]: each["left_out"] for each in report(capsys, "info", bundle)["adapters"]} == left_out
    assert run(capsys, "verify", bundle, "--against", root)[0] == 0


def test_of_adapters_that_are_skipped_no_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_collection(tmp_path / "adapters", plain(2))
    bad, good = sorted((tmp_path / "adapters").iterdir())
    (bad / "value_head.bin").write_bytes(b"weights")
    shutil.copyfile(good / "adapter_config.json", bad / WEIGHTS)
    found = report(
        capsys, "compress", tmp_path / "adapters", "-o", tmp_path / "bundle", "--method", "svd", "--skip-bad"
    )
    assert (list(skipped(found)), found["left_out"]) == ([bad.name], {})
