"""Bundles without some of their adapters: the others keep every bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from testing import random_adapters as ra
from testing.broken import flip
from testing.random_bundle import ALIKE, SKETCHES, make_bundle
from testing.reference_reader import ReferenceReader

from lorazip_core.base.errors import BundleDamaged, OutputExists, UsageError
from lorazip_core.bundle.changes import changes
from lorazip_core.bundle.manifest import AdapterEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.maintain.remove import remove
from lorazip_core.verify.run import verify

GOLDEN = Path(__file__).parents[1] / "bundle" / "golden"
NAMES = [sketch.name for sketch in SKETCHES]
SOME = [[name] for name in NAMES] + [
    ["a", "za"],
    ["e", "f"],
    ["a", "b/c", "d", "z"],
    [name for name in NAMES if name != "f"],
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("random")
    make_bundle(root, sketches=ALIKE)
    return root


def files(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def stored(bundle: Bundle, adapter: AdapterEntry) -> Iterator[torch.Tensor]:
    """All tensors that an adapter is decoded from, and those beside them."""
    for module in bundle.modules(adapter):
        yield from bundle.own(adapter, module.name).values()
        if adapter.cluster is not None:
            yield from bundle.shared(bundle.manifest.clusters[adapter.cluster], module.name).values()
    yield from bundle.extras(adapter).values()


def check_the_same(old: Bundle, new: Bundle, names: list[str]) -> None:
    """Adapters of these names are in both, and differ in no bit."""
    before, after = ({each.name: each for each in bundle.manifest.adapters} for bundle in (old, new))
    for name in names:
        pairs = zip(stored(old, before[name]), stored(new, after[name]), strict=True)
        assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs), name
        assert old.config_text(before[name]) == new.config_text(after[name])
        assert [module.name for module in old.modules(before[name])] == [m.name for m in new.modules(after[name])]
        for field in ("scheme", "rank", "squared_error", "worst_module", "because", "origin", "squared_norm", "added"):
            assert getattr(before[name], field) == getattr(after[name], field), (name, field)


@pytest.mark.parametrize("gone", SOME, ids=" ".join)
def test_those_who_stay_are_what_they_were(root: Path, gone: list[str], tmp_path: Path) -> None:
    before = files(root / "bundle")
    report = remove(root / "bundle", gone, tmp_path / "new")
    assert files(root / "bundle") == before
    assert (report.removed, report.adapters) == (gone, len(NAMES) - len(gone))
    old, new = Bundle(root / "bundle"), Bundle(tmp_path / "new")
    left = [name for name in NAMES if name not in gone]
    assert [adapter.name for adapter in new.manifest.adapters] == left
    check_the_same(old, new, left)
    # Sound, true, and nothing of those who went is in it.
    findings = verify(tmp_path / "new", against=root / "originals").findings
    assert {(finding.kind, finding.adapter) for finding in findings} == {("source-unlisted", name) for name in gone}
    assert report.bytes_after == sum(map(len, files(tmp_path / "new").values())) < report.bytes_before
    now = files(tmp_path / "new")
    changed = {path for path in now if path != "manifest.json" and now[path] != before[path]}
    assert changed <= set(report.rewritten)
    assert now.keys() == before.keys() - set(report.dropped)
    assert changes(old.manifest, new.manifest) == ([], gone, [])


def test_a_module_that_nobody_has_any_more_is_not_kept(root: Path, tmp_path: Path) -> None:
    """The basis is written again without it, and so are the shards that name its digest."""
    report = remove(root / "bundle", ["a"], tmp_path / "new")
    old, new = Bundle(root / "bundle"), Bundle(tmp_path / "new")
    joint = next(cluster for cluster in old.manifest.clusters if cluster.method == "joint")
    assert {joint.basis, *(shard.path for shard in joint.shards)} <= set(report.rewritten)
    assert "embed.U" in old.names(joint.basis)
    assert "embed.U" not in new.names(joint.basis)
    entry = next(entry for entry in new.manifest.files if entry.path == joint.basis)
    assert entry.rest_of == next(entry.sha256 for entry in old.manifest.files if entry.path == joint.basis)


def test_one_after_another_is_all_at_once(root: Path, tmp_path: Path) -> None:
    gone = ["a", "b/c", "za", "h"]  # of one shard, so that of a rest there is a rest
    remove(root / "bundle", gone, tmp_path / "at once")
    here = root / "bundle"
    for name in gone:
        remove(here, [name], tmp_path / name)
        here = tmp_path / name
    assert files(here) == files(tmp_path / "at once")


@pytest.mark.parametrize("version", ["", "format-2/"])
@pytest.mark.parametrize("method", ["joint", "diag", "svd", "original"])
def test_bundles_of_every_format(version: str, method: str, tmp_path: Path) -> None:
    """What is written is format 2, and the reader of the specification finds the same updates in it."""
    golden = GOLDEN / version / method
    remove(golden, ["b/*", "h"], tmp_path / "new")
    kinds = {finding.kind for finding in verify(tmp_path / "new", against=GOLDEN / "adapters").findings}
    assert kinds == {"source-unlisted"}
    old, new = ReferenceReader(golden), ReferenceReader(tmp_path / "new")
    assert new.manifest["format_version"] == 2
    for adapter in Bundle(tmp_path / "new").manifest.adapters:
        assert not any(file.path == "adapter_config.json" for file in adapter.files)
        for module in Bundle(tmp_path / "new").modules(adapter):
            before, after = (reader.update(adapter.name, module.name) for reader in (old, new))
            assert (before == after).all()
    assert changes(Bundle(golden).manifest, Bundle(tmp_path / "new").manifest).changed == []
    assert {recipe.name for recipe in ra.MIXED} > {each.name for each in Bundle(tmp_path / "new").manifest.adapters}


def test_without_an_output_nothing_is_written(root: Path, tmp_path: Path) -> None:
    plan = remove(root / "bundle", ["z*"], None)
    done = remove(root / "bundle", ["z*"], tmp_path / "new")
    assert plan.bytes_after is None
    assert (plan.removed, plan.rewritten, plan.dropped) == (done.removed, done.rewritten, done.dropped)
    assert plan.removed == ["z", "za", "zb"]


def test_what_makes_no_sense_is_refused(root: Path, tmp_path: Path) -> None:
    bundle = root / "bundle"
    with pytest.raises(UsageError, match=r"no adapter 'zz'.*'za'"):
        remove(bundle, ["a", "zz"], tmp_path / "new")
    with pytest.raises(UsageError, match="all of its adapters"):
        remove(bundle, ["*"], tmp_path / "new")
    with pytest.raises(UsageError, match="the input itself"):
        remove(bundle, ["a"], bundle, force=True)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExists):
        remove(bundle, ["a"], tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("pattern", ["configs/*.json", "cores/*.safetensors", "individual/coded-0.safetensors"])
def test_damage_is_not_passed_on(root: Path, pattern: str, tmp_path: Path) -> None:
    shutil.copytree(root / "bundle", tmp_path / "bundle")
    damaged = sorted((tmp_path / "bundle").glob(pattern))[-1]
    flip(damaged)
    with pytest.raises(BundleDamaged, match=damaged.name):
        remove(tmp_path / "bundle", ["e", "za"], tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
