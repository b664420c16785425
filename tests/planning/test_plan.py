"""The plan: bytes that come true, and options that make no sense refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from testing import random_adapters as ra

from lorazip_core.adapter.module import Module
from lorazip_core.base.errors import UsageError
from lorazip_core.bundle.reader import Bundle
from lorazip_core.compress.run import compress
from lorazip_core.planning.options import CompressOptions
from lorazip_core.planning.plan import plan

REAL = Path(__file__).parents[3] / "shared/data"
LARGE = tuple(Module(f"layers.{i}.proj", "linear", 160, 120 + 40 * (i % 2)) for i in range(4))
CHOICES = [
    CompressOptions(method="joint", rank=16),
    CompressOptions(method="joint", rank=24, dtype="f32"),
    CompressOptions(method="joint", rank=8, clusters=3),
    CompressOptions(method="diag", rank=6),
    CompressOptions(method="diag", rank=4, clusters=2, dtype="f16"),
    CompressOptions(method="svd", rank=3),
    CompressOptions(method="svd", rank=50, dtype="f32"),
]


def named(options: CompressOptions) -> str:
    return f"{options.method}-{options.rank}-{options.clusters}-{options.dtype}"


def planned_and_real(root: Path, bundle: Path, options: CompressOptions) -> tuple[int, int]:
    report = plan(root, options)
    assert report.schemes[0].chosen
    assert report.schemes[0].method == options.method
    return report.schemes[0].bytes_bundle, compress(root, bundle, options).summary.bytes_bundle


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipes = ra.plain(9, groups=3, rank=4, modules=LARGE)
    return ra.write_collection(tmp_path_factory.mktemp("alike"), recipes)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranks from 2 to 10, and a quarter of the modules missing."""
    recipes = [
        ra.Recipe(
            f"m{i}",
            2 + i,
            tuple(m for j, m in enumerate(LARGE) if (i + j) % 4),
            extras={"x.weight": torch.full((40, 9), float(i))},
        )
        for i in range(9)
    ]
    return ra.write_collection(tmp_path_factory.mktemp("mixed"), tuple(recipes))


@pytest.mark.parametrize("options", CHOICES, ids=named)
def test_planned_bytes_come_true(alike: Path, tmp_path: Path, options: CompressOptions) -> None:
    planned, real = planned_and_real(alike, tmp_path / "out", options)
    assert planned == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("options", [c for c in CHOICES if c.clusters == 1], ids=named)
def test_planned_bytes_of_a_mixed_collection_come_true(mixed: Path, tmp_path: Path, options: CompressOptions) -> None:
    planned, real = planned_and_real(mixed, tmp_path / "out", options)
    assert planned == pytest.approx(real, rel=0.03)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapters are not here (../shared/data)")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smollm2-mini", CompressOptions(method="joint", rank=4)),
        ("smollm2-mini", CompressOptions(method="svd", rank=2)),
        ("gpt2-wild-r8", CompressOptions(method="svd", rank=2)),
        ("convnext-wild-r8", CompressOptions(method="joint", rank=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_planned_bytes_of_real_collections_come_true(tmp_path: Path, name: str, options: CompressOptions) -> None:
    planned, real = planned_and_real(REAL / name, tmp_path / "out", options)
    assert planned == pytest.approx(real, rel=0.03)


def test_a_plan_names_every_method_the_chosen_one_first(alike: Path) -> None:
    report = plan(alike, CompressOptions(method="diag", clusters=2))
    assert next(scheme.method for scheme in report.schemes) == "diag"
    assert {scheme.method for scheme in report.schemes} == {"joint", "diag", "svd", "coded"}
    assert [scheme.chosen for scheme in report.schemes] == [True, False, False, False]
    assert {scheme.method: scheme.rank for scheme in report.schemes} == {
        "joint": 16,
        "diag": 16,
        "svd": 4,
        "coded": None,
    }
    assert {scheme.method: scheme.clusters for scheme in report.schemes} == {
        "joint": 2,
        "diag": 2,
        "svd": 0,
        "coded": 0,
    }
    assert report.bytes_original == sum(
        (folder / name).stat().st_size
        for folder in alike.iterdir()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    for scheme in report.schemes:
        assert scheme.saved_ratio == pytest.approx(1 - scheme.bytes_bundle / report.bytes_original)


def test_a_plan_counts_the_clusters_of_a_file(alike: Path, tmp_path: Path) -> None:
    names = sorted(folder.name for folder in alike.iterdir())
    file = tmp_path / "clusters.json"
    file.write_text(
        json.dumps({"schema": "lorazip.clusters/1", "assignment": {name: int(name[1:]) % 3 for name in names}})
    )
    by_file, by_number = (
        plan(alike, CompressOptions(clusters=clusters)).schemes[0].bytes_bundle for clusters in (file, 3)
    )
    assert by_file == by_number


def test_a_plan_reads_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    root = ra.write_collection(tmp_path / "in", ra.plain(2))
    for path in root.rglob("adapter_model.safetensors"):
        data = bytearray(path.read_bytes())
        data[-400:] = b"\xff" * 400  # NaN
        path.write_bytes(data)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert plan(root, CompressOptions(rank=2)).adapters == 2
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CompressOptions(rank=0), "«rank» 0"),
        (CompressOptions(rank=-3), "«rank» -3"),
        (CompressOptions(clusters=0), "«clusters» 0"),
        (CompressOptions(clusters=10), "number of adapters, 9"),
        (CompressOptions(method="svd", clusters=2), "svd keeps every adapter on its own"),
        (CompressOptions(method="svd", clusters=Path("clusters.json")), "svd keeps every adapter on its own"),
        (CompressOptions(max_error=-0.1), "«max_error» -0.1"),
        (CompressOptions(max_error=1.5), "«max_error» 1.5"),
        (CompressOptions(max_error=float("nan")), "«max_error» nan"),
        (CompressOptions(dtype="f8"), "«dtype» f8"),  # type: ignore[arg-type]
        (CompressOptions(clusters=Path("/nowhere/clusters.json")), "neither a number nor a file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_make_no_sense_are_refused(
    alike: Path, tmp_path: Path, options: CompressOptions, words: str
) -> None:
    for attempt in (lambda: plan(alike, options), lambda: compress(alike, tmp_path / "out", options)):
        with pytest.raises(UsageError) as error:
            attempt()
        assert words in str(error.value)
        assert error.value.exit_code == 2
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "rank", "max_error", "kept"),
    [
        ("joint", None, None, 16),
        ("diag", None, 0.1, 16),
        ("svd", None, None, 4),
        ("svd", None, 0.1, None),
        ("svd", 2, 0.1, 2),
    ],
)
def test_the_rank_that_is_kept(method: str, rank: int | None, max_error: float | None, kept: int | None) -> None:
    assert replace(CompressOptions(), method=method, rank=rank, max_error=max_error).kept_rank == kept


def test_the_report_counts_the_bytes_on_disk(alike: Path, tmp_path: Path) -> None:
    report = compress(alike, tmp_path / "out", CompressOptions(rank=8))
    on_disk = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert report.summary.bytes_bundle == on_disk == Bundle(tmp_path / "out").size_bytes
    assert report.summary.saved_ratio == pytest.approx(1 - on_disk / report.summary.bytes_original)
