"""Bundles with more adapters: what was there stays, and what is new is where it should be, with true errors."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from testing import random_adapters as ra
from testing.forked import forked

from lorazip_core.base.errors import AdapterErrors, OutputExists, UsageError
from lorazip_core.bundle.changes import changes
from lorazip_core.bundle.manifest import AdapterEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.maintain.add import AddedAdapter, AddOptions, AddReport, add
from lorazip_core.maintain.carry import Staying
from lorazip_core.maintain.manner import individual_options
from lorazip_core.maintain.projection import hosts
from lorazip_core.maintain.remove import remove
from lorazip_core.planning.options import CompressOptions
from lorazip_core.verify.run import verify

GOLDEN = Path(__file__).parents[1] / "bundle" / "golden"
OLD = tuple(ra.Recipe(f"t{i:02}", 4, group=i % 2, own=0.1) for i in range(12))
LIKE_THEM = (ra.Recipe("n/0", 3, group=0, own=0.1), ra.Recipe("n/1", 5, ra.LINEAR[:2], group=1, own=0.1))
LONER = ra.Recipe("s", 4, group=7)
STRANGER = ra.Recipe("v", 3, (*ra.LINEAR, ra.CONV), group=0, extras={ra.HEAD: torch.ones(2, 3)})
ZERO = ra.Recipe("u", 2, group=1, zero=True)
NEW = (*LIKE_THEM, LONER, ZERO, STRANGER)
METHODS = {
    "joint": CompressOptions(method="joint", rank=8, clusters=2),
    "diag": CompressOptions(method="diag", rank=12),
    "svd": CompressOptions(method="svd", rank=2),
    "svd within": CompressOptions(method="svd", max_error=0.05),
    "coded": CompressOptions(),
    "joint within": CompressOptions(method="joint", rank=8, clusters=2, max_error=0.1),
}

LENIENT = {"joint": AddOptions(), "diag": AddOptions(max_error=0.8)}
"""Diagonal cores on a basis of others lose much even of those who are like these."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("add")
    ra.write_collection(root / "old", OLD)
    ra.write_collection(root / "new", NEW)
    ra.write_collection(root / "both", OLD + NEW)
    for name, options in METHODS.items():
        compress(root / "old", root / name, options)
    return root


def files(bundle: Path) -> dict[str, bytes]:
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


def entries(bundle: Path) -> dict[str, AdapterEntry]:
    return {entry.name: entry for entry in Bundle(bundle).manifest.adapters}


def added(report: AddReport) -> dict[str, AddedAdapter]:
    return {each.name: each for each in report.added}


def added_to(root: Path, bundle: str, output: Path, options: AddOptions | None = None) -> dict[str, AddedAdapter]:
    return added(add(root / bundle, root / "new", output, options or AddOptions()))


@pytest.mark.parametrize("method", METHODS)
def test_what_was_there_stays_and_what_is_said_is_true(root: Path, method: str, tmp_path: Path) -> None:
    before = files(root / method)
    report = add(root / method, root / "new", tmp_path / "new", AddOptions())
    assert files(root / method) == before
    now = files(tmp_path / "new")
    assert all(now[path] == data for path, data in before.items() if path != "manifest.json")
    verified = verify(tmp_path / "new", against=root / "both")
    assert verified.findings == []
    names = {recipe.name for recipe in NEW}
    old, new = entries(root / method), entries(tmp_path / "new")
    assert list(new) == sorted([*old, *names])
    for name, entry in old.items():
        assert msgspec.structs.replace(new[name], module_set=0) == msgspec.structs.replace(entry, module_set=0)
    assert {name for name, entry in new.items() if entry.added} == names == set(added(report))
    assert {name: each.squared_error for name, each in added(report).items()} == {
        name: new[name].squared_error for name in names
    }
    assert (report.adapters, report.bytes_after) == (len(new), sum(map(len, now.values())))
    manifests = Bundle(root / method).manifest, Bundle(tmp_path / "new").manifest
    assert changes(*manifests) == (sorted(names), [], [])
    assert changes(*reversed(manifests)) == ([], sorted(names), [])


@pytest.mark.parametrize("method", METHODS)
def test_added_and_removed_again_not_a_byte_is_another(root: Path, method: str, tmp_path: Path) -> None:
    added_to(root, method, tmp_path / "new")
    remove(tmp_path / "new", [recipe.name for recipe in NEW], tmp_path / "again")
    assert files(tmp_path / "again") == files(root / method)


@pytest.mark.parametrize("method", ["joint", "diag"])
def test_an_adapter_joins_the_cluster_that_serves_it_best(root: Path, method: str, tmp_path: Path) -> None:
    report = added_to(root, method, tmp_path / "new", LENIENT[method])
    old, new = entries(root / method), entries(tmp_path / "new")
    assert [new["n/0"].cluster, new["n/1"].cluster] == [old["t00"].cluster, old["t01"].cluster]
    assert {new[name].scheme for name in ("n/0", "n/1", "u")} == {method}
    assert {new[name].scheme for name in ("s", "v")} == {"coded"}
    assert {new[name].because for name in ("s", "v")} == {"max_error"}
    assert report["v"].cluster_squared_error is None  # no basis knows one of its modules
    assert report["s"].cluster_squared_error is not None
    assert report["s"].cluster_squared_error > 1.2 * (report["n/0"].squared_error or 1)
    assert new["u"].squared_error == 0
    assert [each.cluster for each in report.values()] == [new[name].cluster for name in report]


@pytest.mark.parametrize("method", ["joint", "diag"])
def test_what_it_loses_there_is_the_least_that_the_basis_allows(root: Path, method: str, tmp_path: Path) -> None:
    """By least squares on dense matrices; what rounding to bf16 adds is below a percent of it."""
    added_to(root, method, tmp_path / "new", LENIENT[method])
    bundle = Bundle(tmp_path / "new")
    for name in ("n/0", "n/1"):
        entry = entries(tmp_path / "new")[name]
        assert entry.cluster is not None
        lost = total = 0.0
        for module, update in ra.dense_updates(root / "new" / name).items():
            shared = bundle.shared(bundle.manifest.clusters[entry.cluster], module)
            u, v = (shared[side].double().numpy() for side in "UV")
            pairs = np.kron(u, v) if method == "joint" else np.einsum("ik,jk->ijk", u, v).reshape(update.size, -1)
            core = np.linalg.lstsq(pairs, update.ravel(), rcond=None)[0]
            lost += np.square(update.ravel() - pairs @ core).sum()
            total += np.square(update).sum()
        assert entry.squared_error == pytest.approx(lost / total, rel=0.01)
        assert entry.squared_error >= lost / total


def test_shards_are_of_bounded_size_and_modules_are_read_in_parts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ra.write_collection(tmp_path / "many", tuple(ra.Recipe(f"m{i}", 2 + i % 3, own=0.1) for i in range(7)))
    add(root / "joint", tmp_path / "many", tmp_path / "one", AddOptions())
    monkeypatch.setattr("lorazip_core.maintain.projection.SHARD_ADAPTERS", 3)
    monkeypatch.setattr("lorazip_core.maintain.projection._blocks.__defaults__", (2,))
    add(root / "joint", tmp_path / "many", tmp_path / "several", AddOptions())
    one, several = Bundle(tmp_path / "one"), Bundle(tmp_path / "several")
    cluster = entries(tmp_path / "one")["m0"].cluster
    assert cluster is not None
    counts = [len(bundle.manifest.clusters[cluster].shards) for bundle in (one, several)]
    assert counts == [2, 4]
    for before, after in zip(one.manifest.adapters, several.manifest.adapters, strict=True):
        for module in one.modules(before):
            for x, y in zip(
                one.own(before, module.name).values(), several.own(after, module.name).values(), strict=True
            ):
                assert torch.equal(x, y)


def test_a_limit_is_kept_on_bases_and_alone(root: Path, tmp_path: Path) -> None:
    report = added_to(root, "joint", tmp_path / "strict", AddOptions(max_error=1e-4))
    assert all((each.squared_error or 0) <= 1e-4 for each in report.values())
    assert {name for name, each in report.items() if each.cluster is not None} == {"u"}  # which loses nothing anywhere
    report = added_to(root, "joint", tmp_path / "loose", AddOptions(max_error=1))
    assert {name for name, each in report.items() if each.cluster is None} == {"v"}
    assert verify(tmp_path / "loose", against=root / "both").ok


def test_no_limit_breaks_what_the_bundle_promises(root: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"«max_error» 0.2: the bundle was made so that no adapter loses more than 0.1"
    ):
        added_to(root, "joint within", tmp_path / "new", AddOptions(max_error=0.2))
    with pytest.raises(UsageError, match="between 0 and 1"):
        added_to(root, "joint", tmp_path / "new", AddOptions(max_error=2))
    report = added_to(root, "joint within", tmp_path / "new")
    assert all((each.squared_error or 0) <= 0.1 for each in report.values())


def test_the_second_time_is_like_the_first(root: Path, tmp_path: Path) -> None:
    """What was added before counts as little for those that come as it did for the bases."""
    added_to(root, "joint", tmp_path / "once", AddOptions(max_error=1))
    limits = []
    for bundle in (Bundle(root / "joint"), Bundle(tmp_path / "once")):
        everyone = Staying(bundle, range(len(bundle.manifest.adapters)))
        limits.append([host.limit for host in hosts(everyone, None, alone=0.0)])
    assert limits[0] == limits[1]
    ra.write_collection(tmp_path / "more", (ra.Recipe("w", 4, group=9),))
    assert entries(tmp_path / "once")["s"].cluster is not None
    add(tmp_path / "once", tmp_path / "more", tmp_path / "twice", AddOptions())
    ra.write_collection(tmp_path / "all", (*OLD, *NEW, ra.Recipe("w", 4, group=9)))
    assert verify(tmp_path / "twice", against=tmp_path / "all").ok


def test_names_that_are_there_are_refused_or_replaced(root: Path, tmp_path: Path) -> None:
    other = (ra.Recipe("t03", 2, scale=0.5, own=0.1), ra.Recipe("x", 2, own=0.1))
    ra.write_collection(tmp_path / "again", other)
    with pytest.raises(AdapterErrors, match=r"'t03': the bundle has one of that name \(.*«replace»") as refused:
        add(root / "joint", tmp_path / "again", tmp_path / "new", AddOptions())
    assert len(refused.value.errors) == 1
    left = add(root / "joint", tmp_path / "again", tmp_path / "left", AddOptions(skip_bad=True))
    assert (list(added(left)), [each.name for each in left.skipped]) == (["x"], ["t03"])
    assert Bundle(tmp_path / "left").manifest.skipped == []  # it is there, after all
    before = files(root / "joint")
    report = add(root / "joint", tmp_path / "again", tmp_path / "new", AddOptions(replace=True))
    assert files(root / "joint") == before  # files are linked: who writes into one would change both
    assert {name: each.replaces for name, each in added(report).items()} == {"t03": True, "x": False}
    assert report.adapters == len(OLD) + 1
    ra.write_collection(tmp_path / "all", tuple(recipe for recipe in OLD if recipe.name != "t03") + other)
    assert verify(tmp_path / "new", against=tmp_path / "all").findings == []
    manifests = Bundle(root / "joint").manifest, Bundle(tmp_path / "new").manifest
    assert changes(*manifests) == (["x"], [], ["t03"])


def test_files_of_equal_bytes_are_shared_and_none_is_overwritten(root: Path, tmp_path: Path) -> None:
    """One that is replaced may have lent its name to a file that others still use."""
    extras = {ra.HEAD: torch.ones(2, 3)}
    ra.write_collection(tmp_path / "old", (ra.Recipe("a", extras=extras), ra.Recipe("b", extras=extras)))
    compress(tmp_path / "old", tmp_path / "bundle", CompressOptions())
    assert len({entry.extras for entry in entries(tmp_path / "bundle").values()}) == 1
    newer = (ra.Recipe("a", scale=0.25, extras={ra.HEAD: torch.zeros(2, 3)}), ra.Recipe("c", extras=extras))
    ra.write_collection(tmp_path / "newer", newer)
    before = files(tmp_path / "bundle")
    add(tmp_path / "bundle", tmp_path / "newer", tmp_path / "new", AddOptions(replace=True))
    assert files(tmp_path / "bundle") == before
    new = entries(tmp_path / "new")
    assert new["b"].extras == new["c"].extras != new["a"].extras
    assert new["b"].config == new["c"].config != new["a"].config
    ra.write_collection(tmp_path / "all", (*newer, ra.Recipe("b", extras=extras)))
    assert verify(tmp_path / "new", against=tmp_path / "all").findings == []


def test_all_may_be_replaced(root: Path, tmp_path: Path) -> None:
    """Nobody stays whom the bases were fitted to, so they are gone, too."""
    report = add(root / "joint", root / "old", tmp_path / "new", AddOptions(replace=True))
    assert {each.scheme for each in report.added} == {"coded"}
    assert Bundle(tmp_path / "new").manifest.clusters == []
    assert verify(tmp_path / "new", against=root / "old").findings == []


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_adapters_of_another_base_model_are_refused(root: Path, tmp_path: Path) -> None:
    ra.write_collection(tmp_path / "new", (ra.Recipe("x"), ra.Recipe("y"), ra.Recipe("z")))
    for name in ("x", "y"):  # more of them than of the others
        edit_config(tmp_path / "new" / name, base_model_name_or_path="org/other")
    with pytest.raises(AdapterErrors, match="'org/other', but the bundle has 'org/base'") as refused:
        add(root / "coded", tmp_path / "new", tmp_path / "out", AddOptions())
    assert [error.adapter for error in refused.value.errors] == ["x", "y"]
    report = add(root / "coded", tmp_path / "new", tmp_path / "out", AddOptions(skip_bad=True))
    assert list(added(report)) == ["z"]
    assert [each.name for each in Bundle(tmp_path / "out").manifest.skipped] == ["x", "y"]
    add(tmp_path / "out", tmp_path / "new", tmp_path / "all", AddOptions(allow_mixed_base=True, replace=True))
    manifest = Bundle(tmp_path / "all").manifest
    assert manifest.skipped == []
    assert {manifest.base_model_of(each) for each in manifest.adapters if each.name in "xy"} == {"org/other"}


def test_adapters_of_other_shapes_are_refused(root: Path, tmp_path: Path) -> None:
    wide = ra.Q._replace(d_out=ra.Q.d_out + 1)
    ra.write_collection(tmp_path / "new", (ra.Recipe("x", modules=(wide,)), ra.Recipe("y", modules=(wide,))))
    with pytest.raises(AdapterErrors, match=r"q_proj is linear \[25, 20\], but the bundle has linear \[24, 20\]"):
        add(root / "coded", tmp_path / "new", tmp_path / "out", AddOptions())


def test_one_adapter_is_called_as_its_folder_is(root: Path, tmp_path: Path) -> None:
    ra.write_collection(tmp_path, (ra.Recipe("acme", 2), ra.Recipe("acme/checkpoint-1", 2)))
    report = add(root / "coded", tmp_path / "acme", tmp_path / "new", AddOptions())
    assert list(added(report)) == ["acme", "acme/checkpoint-1"]
    with pytest.raises(AdapterErrors, match="adapter 'acme': the bundle has one"):
        add(tmp_path / "new", tmp_path / "acme", tmp_path / "newer", AddOptions())


@pytest.mark.parametrize("method", ["coded", "joint", "svd"])
def test_names_ascend_where_a_folder_and_one_below_it_are_called_otherwise(
    root: Path, method: str, tmp_path: Path
) -> None:
    """Below the folder "-x" comes before ".", which is the folder itself."""
    ra.write_collection(tmp_path / "all", (*OLD, ra.Recipe("x", 2, group=0), ra.Recipe("x/-x", 3, group=1)))
    report = add(root / method, tmp_path / "all" / "x", tmp_path / "new", AddOptions(max_error=1))
    assert list(added(report)) == ["x", "x/-x"]
    assert list(entries(tmp_path / "new")) == [*(recipe.name for recipe in OLD), "x", "x/-x"]
    assert verify(tmp_path / "new", against=tmp_path / "all").findings == []


def test_values_that_the_dtype_cannot_hold_are_kept_as_they_are(tmp_path: Path) -> None:
    ra.write_collection(tmp_path / "old", OLD)
    compress(tmp_path / "old", tmp_path / "bundle", CompressOptions(method="joint", rank=8, dtype="f16"))
    huge, tiny = ra.Recipe("x", 2, energy=1e9, own=0.1), ra.Recipe("y", 2, energy=6e-6, own=0.1)
    ra.write_collection(tmp_path / "new", (huge, tiny))
    report = add(tmp_path / "bundle", tmp_path / "new", tmp_path / "out", AddOptions())
    assert added(report)["y"].scheme == "original"  # its cores would be subnormal, and good enough by chance
    assert all(each.cluster is None for each in report.added)
    ra.write_collection(tmp_path / "all", (*OLD, huge, tiny))
    assert verify(tmp_path / "out", against=tmp_path / "all").findings == []


@pytest.mark.parametrize("name", ["joint", "diag", "svd", "original", "format-2/joint", "format-2/coded"])
def test_bundles_of_every_format(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "adapters", tmp_path / "all")
    more = (ra.Recipe("b/new", 3), ra.Recipe("i", 2, (ra.Q, ra.EMBED)))
    ra.write_collection(tmp_path / "new", more)
    ra.write_collection(tmp_path / "all", more)
    add(GOLDEN / name, tmp_path / "new", tmp_path / "out", AddOptions())
    assert verify(tmp_path / "out", against=tmp_path / "all").findings == []
    old, new = Bundle(GOLDEN / name).manifest, Bundle(tmp_path / "out").manifest
    assert new.format_version == 2
    assert changes(old, new) == (["b/new", "i"], [], [])


def test_a_plan_writes_nothing_and_says_where_they_go(root: Path, tmp_path: Path) -> None:
    plan = add(root / "joint", root / "new", None, AddOptions())
    done = add(root / "joint", root / "new", tmp_path / "new", AddOptions())
    assert (plan.output, plan.bytes_after) == (None, None)
    for planned, real in zip(plan.added, done.added, strict=True):
        assert (planned.name, planned.scheme, planned.cluster) == (real.name, real.scheme, real.cluster)
        assert planned.cluster_squared_error == real.cluster_squared_error
        if planned.cluster is not None:
            assert planned.squared_error == pytest.approx(real.squared_error, rel=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_an_output_that_exists_is_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "coded", tmp_path / "there")
    with pytest.raises(OutputExists):
        add(root / "coded", root / "new", tmp_path / "there", AddOptions())
    add(root / "coded", root / "new", tmp_path / "there", AddOptions(), force=True)
    assert len(entries(tmp_path / "there")) == len(OLD) + len(NEW)
    for output, why in ((root / "coded", "the input itself"), (root / "new" / "x", "inside the input")):
        with pytest.raises(UsageError, match=why):
            add(root / "coded", root / "new", output, AddOptions(), force=True)


def test_killed_at_any_step_it_leaves_no_bundle_or_a_whole_one(root: Path, tmp_path: Path) -> None:
    work = partial(add, root / "joint", root / "new", tmp_path / "new", AddOptions())
    work()
    whole = files(tmp_path / "new")
    ends = []
    for step in range(1, 400, 13):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        ends.append(forked(work, dies_at=step, of=lambda event, args: str(tmp_path) in args))
        assert not (tmp_path / "new").exists() or files(tmp_path / "new") == whole
        assert verify(root / "joint", against=root / "old").ok
        if ends[-1] == 0:
            break
    assert ends[-1] == 0
    assert len(ends) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # and what the killed ones left is cleared


def test_on_their_own_adapters_are_kept_as_the_others_are(root: Path) -> None:
    def options(bundle: str, max_error: float | None = None, **parameters: object) -> CompressOptions:
        manifest = Bundle(root / bundle).manifest
        changed = msgspec.structs.replace(manifest.parameters, **parameters)
        return individual_options(msgspec.structs.replace(manifest, parameters=changed), max_error, "cpu")

    def short(made: CompressOptions) -> tuple[str, int | None, float | None]:
        return made.method, made.rank, made.max_error

    assert short(options("coded")) == ("coded", None, None)  # and so its default
    assert options("coded").largest_error == 0.1
    assert short(options("coded", 0.02)) == ("coded", None, 0.02)
    assert short(options("coded", max_mean_error=0.03)) == ("coded", None, 0.03)
    assert short(options("svd")) == ("svd", 2, None)
    assert short(options("svd within")) == ("svd", None, 0.05)
    assert short(options("joint")) == ("coded", None, None)
    assert short(options("joint within")) == ("coded", None, 0.1)
    mean = np.mean([each.squared_error for each in entries(root / "coded").values()])
    assert options("coded", budget=10**6).max_error == pytest.approx(mean)
    assert options("coded", budget=10**6, calibration="0" * 64).max_error is None
    assert options("coded", objective="resident").objective == "resident"
    assert options("coded", method="of a later version").method == "coded"
