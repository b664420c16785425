"""What a server is told has changed between two bundles, from their manifests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from testing import random_adapters as ra
from testing.random_bundle import make_bundle

from lorazip_core.base.errors import UsageError
from lorazip_core.bundle.changes import changes
from lorazip_core.bundle.manifest import Manifest
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions

replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Bundle(make_bundle(tmp_path_factory.mktemp("changes"))).manifest


def with_digest(manifest: Manifest, path: str | None, digest: str, **fields: str) -> Manifest:
    listed = [replace(each, sha256=digest, **fields) if each.path == path else each for each in manifest.files]
    return replace(manifest, files=listed)


def path_of(manifest: Manifest, name: str, kind: str) -> str | None:
    entry = next(each for each in manifest.adapters if each.name == name)
    if kind == "basis":
        assert entry.cluster is not None
        return manifest.clusters[entry.cluster].basis
    if kind == "cores":
        index = manifest.adapters.index(entry)
        shards = [shard for cluster in manifest.clusters for shard in cluster.shards]
        return next(shard.path for shard in shards if index in shard.adapters)
    path: str | None = getattr(entry, kind)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "changed"),
    [
        ("g", "individual", ["g"]),
        ("za", "individual", ["za", "zb"]),  # in one file
        ("a", "extras", ["a"]),
        ("h", "config", ["h"]),
        ("d", "cores", ["d"]),
        ("d", "basis", ["a", "b/c", "d", "z"]),
    ],
)
def test_other_bytes_are_another_adapter(manifest: Manifest, name: str, kind: str, changed: list[str]) -> None:
    other = with_digest(manifest, path_of(manifest, name, kind), "0" * 64)
    assert changes(manifest, other) == ([], [], changed)
    assert changes(other, other) == ([], [], [])


def test_the_rest_of_a_file_is_as_good_as_that(manifest: Manifest) -> None:
    path = path_of(manifest, "za", "individual")
    digest = next(each.sha256 for each in manifest.files if each.path == path)
    rest = with_digest(manifest, path, "1" * 64, rest_of=digest)
    assert changes(manifest, rest) == changes(rest, manifest) == ([], [], [])
    assert changes(with_digest(manifest, path, "2" * 64), rest).changed == ["za", "zb"]


def test_names_of_files_mean_nothing(manifest: Manifest) -> None:
    renamed = {each.path: each.path.replace(".", "-other.", 1) for each in manifest.files}
    fields = msgspec.to_builtins(manifest)

    def rename(value: object) -> object:
        if isinstance(value, str):
            return renamed.get(value, value)
        if isinstance(value, list):
            return [rename(each) for each in value]
        return {key: rename(each) for key, each in value.items()} if isinstance(value, dict) else value

    assert changes(manifest, msgspec.convert(rename(fields), Manifest)) == ([], [], [])


def test_equal_files_of_adapters_that_changed_places(tmp_path: Path) -> None:
    """X and Y are called a and b, and then 0 and a: the files of codes are the same, and a is another one."""
    x, y = ra.Recipe("x"), ra.Recipe("y")
    manifests = []
    for folder, names in (("one", "ab"), ("two", "0a")):
        ra.write_collection(tmp_path, (x, y))
        for old, new in zip("xy", names, strict=True):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / old).rename(tmp_path / folder / new)
        compress(tmp_path / folder, tmp_path / f"bundle-{folder}", CompressOptions())
        manifests.append(Bundle(tmp_path / f"bundle-{folder}").manifest)
    digests = [{each.sha256 for each in manifest.files if "individual" in each.path} for manifest in manifests]
    assert digests[0] == digests[1]
    assert changes(*manifests) == (["0"], ["b"], ["a"])


@pytest.mark.parametrize(
    "change", [lambda m: replace(m, base_model="org/other"), lambda m: replace(m, base_model=None)]
)
def test_a_bundle_of_another_base_model_is_refused(manifest: Manifest, change: Callable[[Manifest], Manifest]) -> None:
    with pytest.raises(UsageError, match="of the base model 'org/base' is no successor"):
        changes(change(manifest), manifest)
