"""compress end to end: what is promised of a bundle, checked by verify, by the reference reader and by dense numpy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from testing import random_adapters as ra
from testing.peft_fixtures import edit_weights
from testing.recorder import Recorder
from testing.reference_reader import ReferenceReader

from lorazip_core.base.digests import safe_name
from lorazip_core.base.errors import AdapterError, AdapterErrors, LocalError, LorazipError, OutputExists, UsageError
from lorazip_core.base.filesystem import tree
from lorazip_core.base.progress import Advance
from lorazip_core.bundle.manifest import AdapterEntry
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import CompressReport, compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.reading.packs import Budget
from lorazip_core.schemes.coded import Coded
from lorazip_core.verify.run import VerifyReport, verify

NAMES = [recipe.name for recipe in ra.MIXED]
METHODS = [
    CompressOptions(method="joint", rank=4),
    CompressOptions(method="joint", rank=6, weights="module", dtype="f32"),
    CompressOptions(method="joint", rank=3, clusters=3, dtype="f16"),
    CompressOptions(method="joint", rank=64, dtype="f32"),
    CompressOptions(method="diag", rank=5),
    CompressOptions(method="diag", rank=4, clusters=2, dtype="f32"),
    CompressOptions(method="svd", rank=2),
    CompressOptions(method="svd", rank=9, dtype="f32"),
    CompressOptions(method="svd", max_error=0.1),
    CompressOptions(method="joint", rank=4, max_error=0.2),
    CompressOptions(method="diag", rank=4, max_error=0.3, clusters=2),
]


def named(options: CompressOptions) -> str:
    return "-".join(
        str(part) for part in (options.method, options.rank, options.clusters, options.dtype, options.max_error)
    )


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("mixed"), ra.MIXED)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("alike"), ra.plain(8, groups=2))


def checked(root: Path, bundle: Path, options: CompressOptions, **more: Any) -> tuple[CompressReport, VerifyReport]:
    """Compress, and have every claim of the bundle verified against the originals."""
    report = compress(root, bundle, options, **more)
    verified = verify(bundle, against=root)
    assert verified.findings == []
    return report, verified


def errors_of(bundle: Path) -> dict[str, float]:
    return {entry.name: entry.squared_error for entry in Bundle(bundle).manifest.adapters}


WAYS = [
    replace(options, dtype="f32")
    for options in (
        CompressOptions(method="joint", rank=3, clusters=2),
        CompressOptions(method="diag", rank=4),
        METHODS[6],
    )
]


@pytest.fixture(scope="module")
def before(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[CompressOptions], dict[str, float]]:
    """The errors of the mixed collection as it is; each of `WAYS` is compressed once."""
    return lru_cache(lambda options: _errors_with(options, mixed, tmp_path_factory.mktemp("before") / "bundle"))


def _errors_with(options: CompressOptions, root: Path, bundle: Path) -> dict[str, float]:
    compress(root, bundle, options)
    return errors_of(bundle)


def entry_of(bundle: Path, name: str) -> AdapterEntry:
    return next(entry for entry in Bundle(bundle).manifest.adapters if entry.name == name)


# A scale like 1/3 folded into float32 factors moves an error of 10⁻⁷ by up to this.
UNSEEN = 1e-10


def contents(bundle: Path) -> dict[str, bytes]:
    return {name: (bundle / name).read_bytes() for name in tree(bundle)}


def assert_like(after: dict[str, float], before: dict[str, float], options: CompressOptions) -> None:
    """Equal up to rounding; for diag up to another optimum of CP, which rounding decides on: as good on the whole."""
    if options.method == "diag":
        assert sum(after.values()) == pytest.approx(sum(before.values()), rel=0.03)
    else:
        assert after == pytest.approx(before, rel=1e-3, abs=1e-8)


def best_error(folder: Path, rank: int) -> float:
    """The squared error of exact truncated SVDs, by dense numpy."""
    values = [np.linalg.svd(update, compute_uv=False) for update in ra.dense_updates(folder).values()]
    return sum((each[rank:] ** 2).sum() for each in values) / sum((each**2).sum() for each in values)


@pytest.mark.parametrize("options", METHODS, ids=named)
def test_every_method_on_a_mixed_collection(mixed: Path, tmp_path: Path, options: CompressOptions) -> None:
    report, verified = checked(mixed, tmp_path / "out", options)
    reader = ReferenceReader(tmp_path / "out")
    assert list(reader.adapters) == sorted(NAMES)
    for name, entry in reader.adapters.items():
        updates = ra.dense_updates(mixed / name)
        assert reader.modules(name) == sorted(updates)
        lost = {module: ((updates[module] - reader.update(name, module)) ** 2).sum() for module in updates}
        norms = {module: (update**2).sum() for module, update in updates.items()}
        total = sum(norms.values())
        shares = [lost[module] / norms[module] if norms[module] else 0.0 for module in updates]
        assert entry["squared_norm"] == pytest.approx(total, rel=1e-6)
        assert entry["squared_error"] == pytest.approx(sum(lost.values()) / total if total else 0, rel=1e-5, abs=UNSEEN)
        assert entry["mean_module_squared_error"] == pytest.approx(np.mean(shares), rel=1e-5, abs=UNSEEN)
        assert (entry["worst_module"] is None) == (total == 0)
        if total:
            assert entry["worst_module"]["squared_error"] == pytest.approx(max(shares), rel=1e-5, abs=UNSEEN)
        if options.max_error is not None:
            assert sum(lost.values()) <= options.max_error * total
        assert reader.config(name) == json.loads((mixed / name / "adapter_config.json").read_text())
    assert reader.extras("a")[ra.HEAD].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert reader.extras("h")[ra.HEAD].tolist() == [[1, 2]]
    assert reader.extras("g") == {}
    assert report.zero == ["f"]
    assert reader.adapters["f"]["squared_error"] == 0
    assert all(not reader.update("f", module).any() for module in reader.modules("f"))
    assert report.summary == verified.summary or report.summary.max_squared_error == pytest.approx(
        verified.summary.max_squared_error, rel=1e-5, abs=1e-12
    )


def test_full_rank_is_lossless_in_float32(mixed: Path, tmp_path: Path) -> None:
    for number, options in enumerate([METHODS[3], METHODS[7]]):
        report, _ = checked(mixed, tmp_path / str(number), options)
        assert report.summary.max_squared_error < 1e-10


def test_two_runs_give_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    """Also of folders that were made in another order, and from another place."""
    elsewhere = tmp_path / "elsewhere"
    for name in reversed(NAMES):
        shutil.copytree(mixed / name, elsewhere / name)
    options = CompressOptions(method="joint", rank=3, clusters=3, max_error=0.5)
    for number, root in enumerate([mixed, mixed, elsewhere]):
        compress(root, tmp_path / str(number), options)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")
    compress(mixed, tmp_path / "other", replace(options, seed=1))
    assert json.loads((tmp_path / "other/manifest.json").read_bytes())["parameters"]["seed"] == 1


@pytest.mark.parametrize("options", WAYS, ids=named)
def test_names_make_no_difference(
    mixed: Path, tmp_path: Path, options: CompressOptions, before: Callable[[CompressOptions], dict[str, float]]
) -> None:
    """Renamed so that their order is another one, the adapters have the same errors."""
    renamed = {name: f"{9 - number}-{name.replace('/', '.')}" for number, name in enumerate(NAMES)}
    for name, other in renamed.items():
        shutil.copytree(mixed / name, tmp_path / "in" / other)
    after = _errors_with(options, tmp_path / "in", tmp_path / "after")
    assert_like({name: after[other] for name, other in renamed.items()}, before(options), options)


@pytest.mark.parametrize("options", WAYS, ids=named)
def test_the_way_of_writing_the_factors_makes_no_difference(
    mixed: Path, tmp_path: Path, options: CompressOptions, before: Callable[[CompressOptions], dict[str, float]]
) -> None:
    for name in NAMES:
        ra.rewrite(mixed / name, tmp_path / "in" / name)
    assert_like(_errors_with(options, tmp_path / "in", tmp_path / "after"), before(options), options)


@pytest.mark.parametrize(
    ("method", "limit", "dtype"),
    [
        ("joint", 0.5, "bf16"),
        ("joint", 0.05, "f32"),
        ("joint", 1e-5, "bf16"),
        ("diag", 1e-3, "bf16"),
        ("svd", 0.05, "bf16"),
        ("svd", 1e-5, "f16"),
        ("svd", 1e-12, "f32"),
    ],
)
def test_max_error_is_kept(mixed: Path, tmp_path: Path, method: Any, limit: float, dtype: Any) -> None:
    rank = None if method == "svd" else 3
    options = CompressOptions(method=method, rank=rank, max_error=limit, dtype=dtype)
    report, verified = checked(mixed, tmp_path / "out", options)
    assert max(adapter.squared_error for adapter in verified.adapters) <= limit
    assert verify(tmp_path / "out", against=mixed, max_error=limit).ok
    for adapter in Bundle(tmp_path / "out").manifest.adapters:
        assert (adapter.name in report.individual) == (adapter.cluster is None)
        if adapter.cluster is not None:
            assert adapter.because == "method"
            continue
        assert adapter.because == ("method" if adapter.scheme == method else "max_error")
        full = max(recipe.rank for recipe in ra.MIXED if recipe.name == adapter.name)
        if adapter.scheme == "original" and full > 1:  # no truncation does
            compress(mixed, tmp_path / "whole", CompressOptions("svd", full, dtype=dtype), force=True)
            assert errors_of(tmp_path / "whole")[adapter.name] > limit


def test_adapters_within_max_error_share_the_basis_without_the_others(mixed: Path, tmp_path: Path) -> None:
    """The basis is fitted again once the loner has left it, and serves the rest no worse than it did."""
    compress(mixed, tmp_path / "all", CompressOptions(rank=3, dtype="f32"))
    before = errors_of(tmp_path / "all")
    limit = sorted(before.values())[-2] * 1.01
    report, _ = checked(mixed, tmp_path / "out", CompressOptions(rank=3, dtype="f32", max_error=limit))
    assert report.individual == [max(before, key=before.__getitem__)]
    after = errors_of(tmp_path / "out")
    rest = [name for name in before if name not in report.individual]
    assert sum(after[name] for name in rest) < 0.9 * sum(before[name] for name in rest)
    assert max(after.values()) <= limit


def test_max_error_holds_though_a_basis_loses_its_support(tmp_path: Path) -> None:
    """Adapters in pairs: once one of a pair has left, the basis that is fitted again serves the other one worse."""
    recipes = tuple(dataclasses.replace(recipe, own=0.02) for recipe in ra.plain(10, groups=5, rank=2, modules=(ra.Q,)))
    root = ra.write_collection(tmp_path / "in", recipes)
    compress(root, tmp_path / "all", CompressOptions(rank=3, dtype="f32"))
    before = errors_of(tmp_path / "all")
    left_later = 0
    for limit in (each * 0.999 for each in sorted(before.values())[5:]):
        report = compress(root, tmp_path / "out", CompressOptions(rank=3, dtype="f32", max_error=limit), force=True)
        assert report.summary.max_squared_error <= limit
        left_later += any(before[name] < limit for name in report.individual)
    assert left_later


def test_max_error_zero_keeps_the_originals(mixed: Path, tmp_path: Path) -> None:
    report, verified = checked(mixed, tmp_path / "out", CompressOptions(rank=3, max_error=0))
    assert [adapter.squared_error for adapter in verified.adapters] == [0] * len(NAMES)
    assert set(report.individual) >= set(NAMES) - {"f"}
    assert verify(tmp_path / "out", against=mixed, max_error=0).ok
    bundle = Bundle(tmp_path / "out")
    b, a, scale = (
        bundle.own(entry_of(tmp_path / "out", "b/c"), "layers.0.q_proj")[name] for name in ("B", "A", "scale")
    )
    assert (b.dtype, a.dtype, scale) == (torch.bfloat16, torch.bfloat16, 2.0)
    scale = bundle.own(entry_of(tmp_path / "out", "b/d"), "layers.0.q_proj")["scale"]
    assert scale == 1 / 3


@pytest.mark.parametrize("method", ["joint", "svd"])
def test_max_error_zero_is_zero_even_where_the_scale_is_no_float32(tmp_path: Path, method: Any) -> None:
    """In float32 this update is 1/3 rounded, which a core or an SVD holds exactly; the true update is 1/3."""
    factors = {ra.Q: (torch.eye(24)[:, :1], torch.eye(20)[:1])}
    ra.write_factors(tmp_path / "in/a", factors, scale=1 / 3)
    compress(tmp_path / "in", tmp_path / "out", CompressOptions(method=method, dtype="f32", max_error=0))
    assert verify(tmp_path / "out", against=tmp_path / "in", max_error=0).ok


def test_a_limit_just_above_a_reached_error_keeps_everybody(mixed: Path, tmp_path: Path) -> None:
    """The room for rounding, which makes the limit a guarantee, is too small to cost anything that people see."""
    first = compress(mixed, tmp_path / "first", CompressOptions(rank=3))
    limit = first.summary.max_squared_error + 1e-8
    second = compress(mixed, tmp_path / "second", CompressOptions(rank=3, max_error=limit))
    assert second.individual == []
    assert verify(tmp_path / "first", max_error=limit).ok


def test_a_svd_that_cannot_meet_max_error_says_why_the_original_is_kept(mixed: Path, tmp_path: Path) -> None:
    compress(mixed, tmp_path / "out", CompressOptions(method="svd", max_error=1e-9))
    kept = [entry for entry in Bundle(tmp_path / "out").manifest.adapters if entry.scheme == "original"]
    assert kept
    assert {entry.because for entry in kept} == {"max_error"}


def test_what_codes_cannot_hold_within_the_default_is_kept_within_it(
    alike: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the smallest SVD that is, and for that reason: the dtype has nothing to do with it."""
    monkeypatch.setattr(Coded, "encodings", lambda *_: [])
    told = Recorder()
    report = compress(alike, tmp_path / "out", CompressOptions(), progress=told)
    entries = Bundle(tmp_path / "out").manifest.adapters
    assert {(entry.scheme, entry.because) for entry in entries} == {("svd", "max_error")}
    assert 0 < report.worst.squared_error <= Coded.default_error
    kept = [note for note in told.notes if note.startswith("kept ")]
    assert len(kept) == len(entries)
    assert all(note.endswith(f"it would exceed «max_error» {Coded.default_error}") for note in kept)


def test_clusters_of_a_file_are_taken(alike: Path, tmp_path: Path) -> None:
    assignment = {f"t{i:02}": 7 - 3 * (i % 2) for i in range(8)}
    file = cluster_file(tmp_path, assignment)
    report, _ = checked(alike, tmp_path / "out", CompressOptions(rank=4, clusters=file))
    assert report.clusters == [4, 4]
    manifest = Bundle(tmp_path / "out").manifest
    assert [entry.cluster for entry in manifest.adapters] == [0, 1] * 4
    assert manifest.parameters.clusters == 2
    found, _ = checked(alike, tmp_path / "found", CompressOptions(rank=4, clusters=2))
    assert [entry.cluster for entry in Bundle(tmp_path / "found").manifest.adapters] == [0, 1] * 4
    assert found.summary.mean_squared_error == pytest.approx(report.summary.mean_squared_error, rel=1e-6)


def cluster_file(folder: Path, assignment: object, schema: str = "lorazip.clusters/1") -> Path:
    file = folder / "clusters.json"
    file.write_text(json.dumps({"schema": schema, "assignment": assignment}))
    return file


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ({f"t{i:02}": 0 for i in range(7)}, "'t07' is not in it"),
        ({f"t{i:02}": 0 for i in range(9)}, "'t08' is not in the collection"),
        ({f"t{i:02}": "one" for i in range(8)}, "not an assignment of adapters to numbers"),
        (["t00"], "not an assignment of adapters to numbers"),
        (None, "not an assignment of adapters to numbers"),
    ],
)
def test_clusters_of_a_wrong_file_are_refused(alike: Path, tmp_path: Path, assignment: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compress(alike, tmp_path / "out", CompressOptions(clusters=cluster_file(tmp_path, assignment)))
    assert not (tmp_path / "out").exists()


def test_clusters_of_no_such_file_or_schema_are_refused(alike: Path, tmp_path: Path) -> None:
    other = cluster_file(tmp_path, {f"t{i:02}": 0 for i in range(8)}, "lorazip.clusters/2")
    (tmp_path / "text").write_text("{")
    for path in (other, tmp_path / "text", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match=r"«clusters» .*"):
            compress(alike, tmp_path / "out", CompressOptions(clusters=path))


def test_weights_per_module_serve_the_weak_modules(tmp_path: Path) -> None:
    """Adapters of two halves, each strong in one of the modules: per adapter the weak updates count next to nothing."""
    for number in range(6):
        recipe = ra.plain(6)[number]
        factors = {m: ra._factors(recipe, m, 0) for m in (ra.Q, ra.DOWN)}
        weak = (ra.Q, ra.DOWN)[number % 2]
        factors[weak] = factors[weak][0] / 100, factors[weak][1]
        ra.write_factors(tmp_path / "in" / recipe.name, factors)
    entries = {}
    for weights in ("adapter", "module"):
        options = CompressOptions(rank=3, weights=weights, dtype="f32")
        checked(tmp_path / "in", tmp_path / weights, options)
        bundle = Bundle(tmp_path / weights)
        assert bundle.manifest.parameters.weights == weights
        entries[weights] = bundle.manifest.adapters
    by_adapter, by_module = entries["adapter"], entries["module"]
    assert sum(e.squared_error for e in by_adapter) < sum(e.squared_error for e in by_module)
    assert sum(e.mean_module_squared_error for e in by_adapter) > sum(e.mean_module_squared_error for e in by_module)


def spoil(folder: Path, value: float, key: str = "base_model.model.layers.0.q_proj.lora_B.weight") -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[1] = value

    edit_weights(folder, change)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (float("nan"), "base_model.model.layers.0.q_proj.lora_B.weight"),
        (float("inf"), "base_model.model.layers.0.q_proj.lora_A.weight"),
        (float("-inf"), "base_model.model.layers.1.down_proj.lora_A.weight"),
        (float("nan"), ra.HEAD),
    ],
)
def test_nan_and_inf_are_refused_by_name(tmp_path: Path, value: float, key: str) -> None:
    recipes = (*ra.plain(3), ra.Recipe("bad", extras={ra.HEAD: torch.ones(2, 3)}))
    root = ra.write_collection(tmp_path / "in", recipes)
    spoil(root / "bad", value, key)
    with pytest.raises(AdapterErrors) as error:
        compress(root, tmp_path / "out", CompressOptions(rank=2))
    assert error.value.exit_code == 3
    assert str(error.value).count("\n") == 0
    assert "adapter 'bad'" in str(error.value)
    assert key in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_nan_against_zero_is_not_overlooked(tmp_path: Path) -> None:
    """An A with NaN whose B is zero: NaN · 0 is NaN."""
    root = ra.write_collection(tmp_path / "in", (*ra.plain(2), ra.Recipe("bad", zero=True)))
    spoil(root / "bad", float("nan"), "base_model.model.layers.0.q_proj.lora_A.weight")
    with pytest.raises(AdapterErrors, match=r"q_proj\.lora_A\.weight has NaN or Inf"):
        compress(root, tmp_path / "out", CompressOptions(rank=2))


def test_an_update_that_overflows_float32_is_refused_by_name(tmp_path: Path) -> None:
    """Every number is finite, but 3e38 times the scale is not."""
    root = ra.write_collection(tmp_path / "in", ra.plain(3))
    spoil(root / "t01", 3e38)
    with pytest.raises(AdapterErrors, match=r"adapter 't01'.*q_proj"):
        compress(root, tmp_path / "out", CompressOptions(rank=2))


def test_skip_bad_leaves_out_the_bad_ones_and_says_so(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path / "in", (*ra.plain(4), ra.Recipe("nan"), ra.Recipe("header"), ra.Recipe("inf")))
    spoil(root / "nan", float("nan"))
    spoil(root / "inf", float("inf"))
    (root / "header/adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(AdapterErrors, match="header"):
        compress(root, tmp_path / "out", CompressOptions(rank=2))
    report, verified = checked(root, tmp_path / "out", CompressOptions(rank=2, clusters=4), skip_bad=True)
    assert [skipped.name for skipped in report.skipped] == ["header", "inf", "nan"]
    assert ["truncated" in s.reason or "lora_B.weight has NaN or Inf" in s.reason for s in report.skipped] == [True] * 3
    assert Bundle(tmp_path / "out").manifest.skipped == report.skipped
    assert [adapter.name for adapter in verified.adapters] == ["t00", "t01", "t02", "t03"]
    with pytest.raises(UsageError, match="number of adapters, 4"):
        compress(root, tmp_path / "more", CompressOptions(rank=2, clusters=5), skip_bad=True)
    for number in range(4):
        spoil(root / f"t0{number}", float("nan"))
    with pytest.raises(AdapterErrors, match="t03"):
        compress(root, tmp_path / "none", CompressOptions(rank=2), skip_bad=True)
    assert not (tmp_path / "none").exists()


def test_skip_bad_shares_no_basis_with_the_bad_ones(tmp_path: Path) -> None:
    """What is left is compressed as if the bad ones had never been there."""
    root = ra.write_collection(tmp_path / "in", (*ra.plain(4), ra.Recipe("bad")))
    good = ra.write_collection(tmp_path / "good", ra.plain(4))
    spoil(root / "bad", float("nan"))
    compress(root, tmp_path / "out", CompressOptions(rank=2, clusters=2), skip_bad=True)
    compress(good, tmp_path / "expected", CompressOptions(rank=2, clusters=2))
    manifests = [contents(tmp_path / name) for name in ("out", "expected")]
    for files in manifests:
        del files["manifest.json"]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("method", ["joint", "diag", "svd"])
def test_an_adapter_that_float16_cannot_hold_is_kept_as_it_is(tmp_path: Path, method: Any) -> None:
    root = ra.write_collection(tmp_path / "in", (*ra.plain(3), ra.Recipe("big", energy=1e7)))
    checked(root, tmp_path / "out", CompressOptions(method=method, rank=3, dtype="f16"))
    schemes = {entry.name: entry.scheme for entry in Bundle(tmp_path / "out").manifest.adapters}
    assert schemes == {"big": "original", "t00": method, "t01": method, "t02": method}
    checked(root, tmp_path / "bf16", CompressOptions(method=method, rank=3, dtype="bf16"))
    assert entry_of(tmp_path / "bf16", "big").scheme == method


def test_an_existing_output_is_refused_and_kept(alike: Path, tmp_path: Path) -> None:
    compress(alike, tmp_path / "out", CompressOptions(rank=2))
    before = contents(tmp_path / "out")
    with pytest.raises(OutputExists, match="«force»") as error:
        compress(alike, tmp_path / "out", CompressOptions(rank=3))
    assert error.value.exit_code == 6
    assert contents(tmp_path / "out") == before
    compress(alike, tmp_path / "out", CompressOptions(rank=3), force=True)
    assert Bundle(tmp_path / "out").manifest.parameters.rank == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_bundles_only(alike: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis/configs").mkdir(parents=True)
    (tmp_path / "thesis/manifest.json").write_text("{}")
    (tmp_path / "thesis/chapter.tex").write_text("years")
    (tmp_path / "file").write_text("years")
    for name in ("thesis", "file"):
        with pytest.raises(OutputExists, match="not written by lorazip"):
            compress(alike, tmp_path / name, CompressOptions(rank=2), force=True)
    assert (tmp_path / "thesis/chapter.tex").read_text() == (tmp_path / "file").read_text() == "years"
    with pytest.raises(UsageError, match="is the input itself"):
        compress(alike, alike, CompressOptions(rank=2), force=True)
    assert len(list(alike.iterdir())) == 8


class Interrupt:
    """A progress that is interrupted when the stage ``label`` has advanced ``after`` times."""

    def __init__(self, label: str, after: int, raises: Callable[[], BaseException]) -> None:
        self.label, self.after, self.raises = label, after, raises

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Advance]:
        def advance(steps: int) -> None:
            if label == self.label:
                self.after -= 1
                if self.after < 0:
                    raise self.raises()

        yield advance

    def note(self, text: str) -> None:
        pass


@pytest.mark.parametrize(
    ("label", "force", "goes_on"),
    [
        ("reading adapters", False, False),
        ("clustering, round 1", True, False),
        ("fitting bases", False, True),
        ("keeping adapters individually", True, True),
    ],
)
def test_an_interruption_leaves_the_old_bundle(
    alike: Path, tmp_path: Path, label: str, force: bool, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorazip_core.reading.memory.CPU_BUDGET", Budget(1, 1))  # many packs
    options = CompressOptions(rank=2, clusters=2, max_error=0.001)
    before = {}
    if force:
        compress(alike, tmp_path / "out", CompressOptions(rank=1))
        before = contents(tmp_path / "out")
    for after in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            compress(alike, tmp_path / "out", options, force=force, progress=Interrupt(label, after, KeyboardInterrupt))
    assert {path.name for path in tmp_path.iterdir()} == set(["out"] * force + [".out.partial"] * goes_on)
    assert (contents(tmp_path / "out") if force else {}) == before
    checked(alike, tmp_path / "out", options, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_arrives_where_it_said_it_would(mixed: Path, tmp_path: Path) -> None:
    progress = Recorder()
    compress(mixed, tmp_path / "out", CompressOptions(rank=3, clusters=2, max_error=0.01), progress=progress)
    rounds = {label for label in progress.stages if label.startswith("clustering, round ")}
    others = {"reading adapters", "fitting bases", "fitting bases again", "keeping adapters individually"}
    assert set(progress.stages) - rounds == others
    assert "clustering, round 1" in rounds
    assert all(done == total for total, done in progress.stages.values())
    assert any("kept h at rank" in note for note in progress.notes)
    assert all("\n" not in note for note in progress.notes)


@pytest.mark.parametrize(
    "names", [["A", "a"], ["x/y", "x_y", "x-y"], ["é", "e\u0301"], ["_private", "__pycache__x"], ["-o"]]
)
def test_any_name_of_a_folder_will_do(tmp_path: Path, names: list[str]) -> None:
    root = ra.write_collection(tmp_path / "in", tuple(ra.Recipe(name, 2, (ra.Q,)) for name in names))
    _, verified = checked(root, tmp_path / "out", CompressOptions(rank=2, max_error=0.05))
    assert sorted(adapter.name for adapter in verified.adapters) == sorted(names)


def test_an_adapter_that_is_the_folder_itself(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path, (ra.Recipe("in"),)) / "in"
    _, verified = checked(root, tmp_path / "out", CompressOptions(rank=4, dtype="f32"))
    assert [adapter.name for adapter in verified.adapters] == ["."]
    assert verified.adapters[0].squared_error < 1e-10


def test_inputs_are_never_changed(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path / "in", ra.MIXED)
    before = contents(root)
    for options in METHODS[::3]:
        compress(root, tmp_path / "out", options, force=True)
    assert contents(root) == before


def test_a_device_that_is_not_there(alike: Path, tmp_path: Path) -> None:
    for device, failure in [("tpu", UsageError), ("cuda:999", LocalError), ("meta", UsageError), ("", UsageError)]:
        with pytest.raises(failure, match="«device»"):
            compress(alike, tmp_path / "out", CompressOptions(device=device))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exponent", [-60, -30, 30, 60])
@pytest.mark.parametrize("method", ["joint", "diag", "svd"])
def test_very_small_and_very_large_updates_are_served_like_others(tmp_path: Path, exponent: int, method: Any) -> None:
    """A power of two, so that rounding is the same."""
    usual = ra.write_collection(tmp_path / "usual", ra.plain(4))
    for folder in usual.iterdir():
        shutil.copytree(folder, tmp_path / "in" / folder.name)
        edit_weights(
            tmp_path / "in" / folder.name,
            lambda tensors: tensors.update({key: x * 2.0**exponent for key, x in tensors.items() if "lora_B" in key}),
        )
    options = CompressOptions(method=method, rank=3, dtype="f32")
    checked(usual, tmp_path / "before", options)
    _, verified = checked(tmp_path / "in", tmp_path / "out", options)
    before = errors_of(tmp_path / "before")
    for adapter in verified.adapters:
        assert adapter.squared_error == pytest.approx(before[adapter.name], rel=1e-2)


def test_all_adapters_zero(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path / "in", tuple(ra.Recipe(name, zero=True) for name in "abc"))
    for number, options in enumerate(
        [CompressOptions(rank=2), METHODS[4], METHODS[6], CompressOptions(clusters=2, max_error=0)]
    ):
        report, _ = checked(root, tmp_path / str(number), options)
        assert report.zero == ["a", "b", "c"]
        assert report.summary.max_squared_error == 0


def test_one_adapter_alone_gets_its_svd(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path / "in", ra.plain(1))
    for method in ("joint", "diag", "svd"):
        compress(root, tmp_path / method, CompressOptions(method=method, rank=2, dtype="f32"))
        best = best_error(root / "t00", 2)
        error = errors_of(tmp_path / method)["t00"]
        # Ranks that follow the spectrum do better than one for all modules.
        assert error <= best * (1 + 1e-4)
        assert method == "svd" or error >= best * (1 - 1e-4)


def test_more_adapters_than_a_shard_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorazip_core.compress.shards.SHARD_ADAPTERS", 3)
    root = ra.write_collection(tmp_path / "in", ra.MIXED)
    checked(root, tmp_path / "out", CompressOptions(rank=4, clusters=2))
    shards = [shard for cluster in Bundle(tmp_path / "out").manifest.clusters for shard in cluster.shards]
    assert len(shards) >= 3
    assert all(len(shard.adapters) <= 3 for shard in shards)
    assert sorted(index for shard in shards for index in shard.adapters) == list(range(len(NAMES)))


def test_no_adapters_at_all(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match="is an empty directory: no adapters here"):
        compress(tmp_path / "in", tmp_path / "out", CompressOptions())
    (tmp_path / "in/notes.txt").write_text("none of them is an adapter")
    with pytest.raises(AdapterError, match="no adapters here"):
        compress(tmp_path / "in", tmp_path / "out", CompressOptions())
    with pytest.raises(LorazipError, match="not a directory"):
        compress(tmp_path / "nowhere", tmp_path / "out", CompressOptions())


def test_individual_files_are_named_after_their_adapters(mixed: Path, tmp_path: Path) -> None:
    compress(mixed, tmp_path / "out", CompressOptions(method="svd", rank=1))
    expected = {f"individual/{safe_name(name)}.safetensors" for name in NAMES}
    assert {entry.individual for entry in Bundle(tmp_path / "out").manifest.adapters} == expected


@pytest.mark.parametrize("rank", [35, 64])
def test_adapters_of_a_higher_rank_than_a_side_has_dimensions(tmp_path: Path, rank: int) -> None:
    """Fewer components than rows, for some modules also fewer than the rank of the bundle."""
    recipes = tuple(ra.Recipe(f"r{own:02}", own, ra.EVERY_KIND, group=own % 3) for own in (1, 2, 3, 64, 32, 7, 5))
    root = ra.write_collection(tmp_path / "in", recipes)
    checked(root, tmp_path / "out", CompressOptions(method="diag", rank=rank))
