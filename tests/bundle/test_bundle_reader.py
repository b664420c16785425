"""Nothing of a bundle is used before its digest was checked, and nothing is hashed twice."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.broken import edit_manifest, flip
from testing.random_bundle import make_bundle

from lorazip_cli.main import main
from lorazip_core.base.errors import BundleDamaged
from lorazip_core.bundle import reader
from lorazip_core.bundle.reader import Bundle
from lorazip_core.export.exporter import export
from lorazip_core.info import info
from lorazip_core.verify.run import verify


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often the reader has hashed each inode."""
    counts: Counter[int] = Counter()

    def counted(file: RawIOBase) -> str:
        counts[os.fstat(file.fileno()).st_ino] += 1
        return real(file)

    real = reader.sha256_stream
    monkeypatch.setattr(reader, "sha256_stream", counted)
    return counts


@pytest.mark.parametrize("folder", ["bases", "cores", "individual", "extras", "configs"])
def test_export_of_a_flipped_bit_is_damage(bundle: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = min((bundle / folder).iterdir())
    flip(file)
    assert main(["export", str(bundle), "-o", str(bundle.with_name("out")), "-q"]) == BundleDamaged.exit_code
    assert f"{file}: sha256" in capsys.readouterr().err
    assert not bundle.with_name("out").exists()


@pytest.mark.parametrize("damage", [b"junk", b""])
def test_export_of_a_file_of_another_size_is_damage(bundle: Path, damage: bytes) -> None:
    file = min((bundle / "bases").iterdir())
    file.write_bytes(damage)
    with pytest.raises(BundleDamaged, match=rf"bases/.*{len(damage)} bytes, but the manifest says"):
        export(bundle, bundle.with_name("out"))


def test_what_the_damage_does_not_reach_is_exported(bundle: Path) -> None:
    flip(min((bundle / "cores").iterdir()))
    assert [one.name for one in export(bundle, bundle.with_name("out"), adapters=["g", "h"]).adapters] == ["g", "h"]


def test_info_reads_the_manifest_alone(bundle: Path, hashed: Counter[int]) -> None:
    info(bundle)
    assert not hashed


def test_verify_hashes_every_file_once(bundle: Path, hashed: Counter[int]) -> None:
    assert verify(bundle, against=bundle.with_name("originals")).ok
    assert set(hashed.values()) == {1}
    assert len(hashed) == len(Bundle(bundle).manifest.files)


def test_threads_hash_a_file_once(bundle: Path, hashed: Counter[int]) -> None:
    opened = Bundle(bundle)
    basis = opened.manifest.clusters[0].basis
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(opened.names, [basis] * 32))
    assert all(each == names[0] for each in names)
    assert list(hashed.values()) == [1]


def test_a_file_put_in_the_place_of_a_checked_one_is_not_read(bundle: Path) -> None:
    opened = Bundle(bundle)
    adapter = next(entry for entry in opened.manifest.adapters if entry.scheme == "svd")
    assert adapter.individual is not None
    name = opened.names(adapter.individual)[0]
    before = opened.tensor(adapter.individual, name)
    other = bundle.with_name("other")
    other.write_bytes((bundle / adapter.individual).read_bytes())
    flip(other)
    other.replace(bundle / adapter.individual)
    assert torch.equal(opened.tensor(adapter.individual, name), before)


def test_a_file_that_is_opened_again_is_hashed_only_if_it_changed(
    bundle: Path, hashed: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_OPEN_FILES", 1)
    opened = Bundle(bundle)
    first, second = (cluster.basis for cluster in opened.manifest.clusters)
    for file in (first, second, first):
        opened.names(file)
    assert sorted(hashed.values()) == [1, 1]
    flip(bundle / second)
    with pytest.raises(BundleDamaged, match=f"{second}: sha256"):
        opened.names(second)


def test_a_pipe_is_no_file(bundle: Path) -> None:
    file = min((bundle / "cores").iterdir())
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BundleDamaged, match="not a file"):
        export(bundle, bundle.with_name("out"))


def test_a_file_that_may_not_be_read_is_no_damage(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    opened = Bundle(bundle)
    monkeypatch.setattr(reader.os, "open", refused)
    with pytest.raises(PermissionError, match=r"Permission denied.*bases/"):
        opened.names(opened.manifest.clusters[0].basis)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (lambda fields: fields["adapters"][0], "scheme"),
        (lambda fields: fields["clusters"][0], "method"),
    ],
    ids=["adapter", "cluster"],
)
@pytest.mark.parametrize("unknown", ["nope", "original"])
def test_a_name_that_is_no_scheme_there_is_damage(
    bundle: Path, place: Callable[[dict[str, Any]], dict[str, str]], name: str, unknown: str
) -> None:
    """`original` cannot be shared; an adapter of a cluster cannot have it."""
    edit_manifest(bundle, lambda fields: place(fields).update({name: unknown}))
    for command in (["info", str(bundle)], ["verify", str(bundle)], ["export", str(bundle), "-o", f"{bundle}-out"]):
        assert main([*command, "-q"]) == BundleDamaged.exit_code
