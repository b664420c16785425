"""`lorazip cluster` through `main(argv)`: known groups on disk, the file, the choice of K, and compress by the file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from testing import random_adapters as ra
from testing.recorder import Recorder

from lorazip_cli.main import main
from lorazip_core.bundle.reader import Bundle
from lorazip_core.clustering.choose import _ladder
from lorazip_core.clustering.clusters_file import Assignment
from lorazip_core.clustering.run import ClusterOptions, cluster
from lorazip_core.sample import sample_path

MODULES = tuple(
    ra.Module(f"layers.{layer}.{name}", "linear", *shape)
    for layer in range(2)
    for name, shape in (("q_proj", (64, 64)), ("v_proj", (40, 64)), ("down_proj", (64, 96)))
)
LONERS = ("loner0", "loner1")
RANK = 5


def planted() -> tuple[ra.Recipe, ...]:
    """Six groups of 5 to 7 adapters around 5 directions each, of ranks 2 to 6 and energies 1 to 361, and two loners."""
    grouped = [
        ra.Recipe(f"g{g}/{k}", 2 + (k + g) % 5, MODULES, group=g, own=0.1, energy=1 + 3.0 * k)
        for g in range(6)
        for k in range(5 + g % 3)
    ]
    return *grouped, *(ra.Recipe(name, 4 + 2 * i, MODULES, group=100 + i, own=1.0) for i, name in enumerate(LONERS))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ra.write_collection(tmp_path_factory.mktemp("planted") / "adapters", planted())


@pytest.fixture(scope="module")
def found(adapters: Path) -> dict[str, Any]:
    """The file for six clusters."""
    return clusters_of(adapters, "6")


def clusters_of(adapters: Path, clusters: str, *more: str, rank: int = RANK) -> dict[str, Any]:
    file = adapters.with_name(f"{adapters.name}-{clusters}.json")
    argv = ["cluster", str(adapters), "-o", str(file), "--clusters", clusters, "--rank", str(rank), "-q", "--force"]
    assert main([*argv, *more]) == 0
    return json.loads(file.read_text())


def partition(assignment: dict[str, int], without: tuple[str, ...] = ()) -> set[frozenset[str]]:
    return {
        frozenset(name for name, other in assignment.items() if other == label and name not in without)
        for label in set(assignment.values())
    } - {frozenset()}


GROUPS = partition({recipe.name: recipe.group for recipe in planted()}, LONERS)


def test_known_groups_are_recovered_and_loners_named(found: dict[str, Any]) -> None:
    assert partition(found["assignment"], LONERS) == GROUPS
    assert [outlier["name"] for outlier in found["outliers"]] == list(LONERS)
    assert all(outlier["reason"] in {"loses-most", "shares-nothing"} for outlier in found["outliers"])


def test_with_a_cluster_for_each_the_loners_are_alone(adapters: Path) -> None:
    found = clusters_of(adapters, "8")
    assert partition(found["assignment"]) == GROUPS | {frozenset({name}) for name in LONERS}
    assert [(outlier["name"], outlier["reason"]) for outlier in found["outliers"]] == [
        (name, "alone") for name in LONERS
    ]


def test_names_order_and_the_way_of_writing_make_no_difference(
    adapters: Path, tmp_path: Path, found: dict[str, Any]
) -> None:
    """The same updates as other factors, under names in another order: the same groups, errors and outliers."""
    names = [recipe.name for recipe in planted()]
    renamed = dict(
        zip(names, random.Random(1).sample([f"x{i:02}" for i in range(len(names))], len(names)), strict=True)
    )
    for number, (old, new) in enumerate(renamed.items()):
        ra.rewrite(adapters / old, tmp_path / "in" / new, seed=number)
    again = clusters_of(tmp_path / "in", "6")
    expected = {renamed[name]: label for name, label in found["assignment"].items()}
    assert partition(again["assignment"]) == partition(expected)
    assert {outlier["name"] for outlier in again["outliers"]} == {renamed[name] for name in LONERS}
    errors = {adapter["name"]: adapter["squared_error"] for adapter in again["adapters"]}
    for adapter in found["adapters"]:
        assert errors[renamed[adapter["name"]]] == pytest.approx(adapter["squared_error"], rel=1e-2, abs=1e-5)


def test_the_file_says_how_everybody_is_served(adapters: Path, found: dict[str, Any], tmp_path: Path) -> None:
    by_name = {adapter["name"]: adapter for adapter in found["adapters"]}
    assert list(by_name) == sorted(found["assignment"])
    for name, adapter in by_name.items():
        assert adapter["cluster"] == found["assignment"][name]
        assert adapter["next_cluster"] != adapter["cluster"]
        assert adapter["squared_error"] < adapter["next_squared_error"] <= 1
        if name not in LONERS:
            assert adapter["nearest"].split("/")[0] == name.split("/")[0]
            assert adapter["held_out_squared_error"] < 0.6
    for number, figures in enumerate(found["clusters"]):
        own = [adapter["squared_error"] for adapter in found["adapters"] if adapter["cluster"] == number]
        assert figures["adapters"] == len(own)
        assert figures["mean_squared_error"] == pytest.approx(sum(own) / len(own))
        assert figures["max_squared_error"] == max(own)
        assert figures["similarity_within"] > 5 * figures["similarity_to_others"]
    assert found["objective"] == sorted(found["objective"], reverse=True)
    assert found["candidates"] == []


def test_errors_of_the_file_are_those_of_the_bundle_or_a_little_larger(
    adapters: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    """compress searches its bases longer, and then rounds them."""
    file = tmp_path / "clusters.json"
    file.write_text(json.dumps(found))
    argv = ["compress", str(adapters), "-o", str(tmp_path / "b"), "--clusters", str(file), "--rank", str(RANK), "-q"]
    assert main(argv) == 0
    entries = Bundle(tmp_path / "b").manifest.adapters
    stored = {entry.name: entry.squared_error for entry in entries}
    assert partition({entry.name: entry.cluster or 0 for entry in entries}) == partition(found["assignment"])
    mean = sum(stored.values()) / len(stored)
    claimed = sum(adapter["squared_error"] for adapter in found["adapters"]) / len(stored)
    assert 0.9 * claimed < mean < 1.02 * claimed


def test_near_duplicates_are_listed(tmp_path: Path) -> None:
    ra.write_collection(tmp_path / "in", ra.plain(4))
    ra.rewrite(tmp_path / "in" / "t01", tmp_path / "in" / "twin")
    (duplicate,) = clusters_of(tmp_path / "in", "1")["near_duplicates"]
    assert (duplicate["first"], duplicate["second"]) == ("t01", "twin")
    assert 0 <= duplicate["squared_distance"] < 1e-9


@pytest.fixture(scope="module")
def auto(adapters: Path) -> dict[str, Any]:
    """The file with the number of clusters left to lorazip."""
    return clusters_of(adapters, "auto")


class TestAuto:
    def test_six_groups_and_two_loners_are_eight_clusters(self, auto: dict[str, Any]) -> None:
        """Below, a whole group is lost; above, a basis is bought that serves nobody."""
        assert len(auto["clusters"]) == 8

    def test_the_table_is_what_it_chose_from(self, auto: dict[str, Any], adapters: Path) -> None:
        candidates = auto["candidates"]
        original = sum(path.stat().st_size for path in adapters.rglob("adapter_model.safetensors"))
        original += sum(path.stat().st_size for path in adapters.rglob("adapter_config.json"))
        assert [each["bytes_bundle"] for each in candidates] == sorted(each["bytes_bundle"] for each in candidates)
        for each in candidates:
            assert each["cost"] == pytest.approx(each["mean_squared_error"] + 1 - each["saved_ratio"])
            assert 1 - each["saved_ratio"] == pytest.approx(each["bytes_bundle"] / original)
        joint = [each for each in candidates if each["method"] == "joint"]
        settled = [each for each in joint if each["measured_on"] == "all"]
        (chosen,) = (each for each in candidates if each["chosen"])
        assert chosen["clusters"] == len(auto["clusters"])
        assert chosen == min(settled, key=lambda each: each["cost"])
        assert {1, 2, 3, 4} <= {each["clusters"] for each in joint}
        assert [each["rank"] for each in candidates if each["method"] == "svd"] == [1, 2, 4]

    @pytest.mark.slow
    def test_planned_bytes_of_the_choice_come_true(self, auto: dict[str, Any], adapters: Path, tmp_path: Path) -> None:
        argv = ["compress", str(adapters), "-o", str(tmp_path / "b"), "--clusters", "auto", "--rank", str(RANK), "-q"]
        assert main(argv) == 0
        manifest = Bundle(tmp_path / "b").manifest
        assert manifest.parameters.clusters == len(auto["clusters"])
        size = sum(path.stat().st_size for path in (tmp_path / "b").rglob("*") if path.is_file())
        (chosen,) = (each for each in auto["candidates"] if each["chosen"])
        assert chosen["bytes_bundle"] == pytest.approx(size, rel=0.05)

    @pytest.mark.slow
    def test_no_other_number_costs_less(self, auto: dict[str, Any], adapters: Path) -> None:
        (chosen,) = (each for each in auto["candidates"] if each["chosen"])
        kept = {each["clusters"]: 1 - each["saved_ratio"] for each in auto["candidates"] if each["method"] == "joint"}
        for clusters in (5, 6, 7):
            other = clusters_of(adapters, str(clusters))
            mean = sum(adapter["squared_error"] for adapter in other["adapters"]) / len(other["adapters"])
            assert mean + kept[clusters] > 1.01 * chosen["cost"]

    def test_the_ladder_climbs_by_quarters(self) -> None:
        assert list(_ladder(30)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 27]

    def test_svd_is_recommended_where_nothing_is_shared(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Nearly all energy in one direction each, and none in common: a basis of one serves one."""
        module = ra.Module("layers.0.q_proj", "linear", 128, 128)
        generator = torch.Generator().manual_seed(0)
        for number in range(6):
            b = torch.randn(128, 4, generator=generator) * torch.tensor([1, 0.1, 0.1, 0.1])
            factors = {module: (b, torch.randn(4, 128, generator=generator))}
            ra.write_factors(tmp_path / "in" / f"t{number}", factors)
        assert main(["cluster", str(tmp_path / "in"), "-o", str(tmp_path / "c.json"), "--rank", "1"]) == 0
        said = capsys.readouterr().err
        assert "these adapters share little: compress --method svd --rank 1 costs less than full cores" in said

    def test_a_single_adapter_is_one_cluster(self, tmp_path: Path) -> None:
        ra.write_collection(tmp_path / "in", ra.plain(1))
        found = clusters_of(tmp_path / "in", "auto")
        assert found["assignment"] == {"t00": 0}
        (only,) = found["adapters"]
        assert (only["nearest"], only["next_cluster"]) == (None, None)
        assert found["outliers"] == []


class TestCompressByFile:
    def test_a_file_for_other_weights_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The same names, but one was trained again."""
        root = ra.write_collection(tmp_path / "in", ra.plain(4))
        clusters_of(root, "2")
        shutil.rmtree(root / "t02")
        ra.write_collection(root, (ra.Recipe("t02", group=3),))
        file = tmp_path / "in-2.json"
        assert main(["compress", str(root), "-o", str(tmp_path / "b"), "--clusters", str(file), "-q"]) == 2
        said = capsys.readouterr().err
        assert said == (f"lorazip: error: --clusters {file}: it was made for other weights of 't02' (cluster again)\n")
        assert not (tmp_path / "b").exists()

    def test_a_file_without_an_adapter_that_is_skipped_is_taken(self, tmp_path: Path) -> None:
        """That it holds NaN shows only when its weights are read, after the file."""
        root = ra.write_collection(tmp_path / "in", ra.plain(4))
        tensors = load_file(root / "t02" / "adapter_model.safetensors")
        save_file({key: x * float("nan") for key, x in tensors.items()}, root / "t02" / "adapter_model.safetensors")
        file = tmp_path / "c.json"
        assert main(["cluster", str(root), "-o", str(file), "--clusters", "2", "--skip-bad", "-q"]) == 0
        assert "t02" not in json.loads(file.read_text())["assignment"]
        argv = ["compress", str(root), "-o", str(tmp_path / "b"), "--clusters", str(file), "--skip-bad", "-q"]
        assert main([*argv, "--dry-run"]) == 0
        assert main(argv) == 0
        assert [entry.name for entry in Bundle(tmp_path / "b").manifest.adapters] == ["t00", "t01", "t03"]

    def test_a_file_that_is_no_utf8_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = ra.write_collection(tmp_path / "in", ra.plain(1))
        file = tmp_path / "c.json"
        file.write_bytes(b'{"schema":"lorazip.clusters/1","assignment":{"a\xff":0}}')
        assert main(["compress", str(root), "-o", str(tmp_path / "b"), "--clusters", str(file)]) == 2
        assert "not an assignment of adapters to numbers" in capsys.readouterr().err

    def test_a_file_for_other_names_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = ra.write_collection(tmp_path / "in", ra.plain(4))
        clusters_of(root, "2")
        (root / "t03").rename(root / "t04")
        file = tmp_path / "in-2.json"
        assert main(["compress", str(root), "-o", str(tmp_path / "b"), "--clusters", str(file), "-q"]) == 2
        assert "it was made for other adapters: 't03' is not in the collection" in capsys.readouterr().err

    def test_a_file_for_another_rank_is_taken_and_mentioned(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root, file = ra.write_collection(tmp_path / "in", ra.plain(4)), tmp_path / "in-2.json"
        clusters_of(root, "2")
        for rank, said in ((RANK, False), (3, True)):
            argv = ["compress", str(root), "-o", str(tmp_path / "b"), "--clusters", str(file), "--force"]
            assert main([*argv, "--rank", str(rank)]) == 0
            assert ("were chosen for rank 5, not 3" in capsys.readouterr().err) == said

    def test_auto_cannot_be_planned(self, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compress", str(adapters), "--dry-run", "--clusters", "auto"]) == 2
        assert "--clusters auto cannot be planned" in capsys.readouterr().err


class TestCommand:
    def test_json_is_one_object_with_the_figures_of_the_file(
        self, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "c.json"
        assert main(["cluster", str(adapters), "-o", str(file), "--clusters", "3", "--rank", "5", "--json", "-q"]) == 0
        report = json.loads(capsys.readouterr().out)
        written = msgspec.json.decode(file.read_bytes(), type=Assignment)
        assert report["schema"] == "lorazip.cluster/1"
        assert report["clusters"] == msgspec.to_builtins(written.clusters)
        assert report["max_squared_error"] == max(adapter.squared_error for adapter in written.adapters)
        assert report["adapters"] == len(written.adapters)

    def test_what_it_says_and_two_runs_give_the_same_bytes(
        self, adapters: Path, auto: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "c.json"
        assert main(["cluster", str(adapters), "-o", str(file), "--rank", "5"]) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        for text in (
            "cost = mean squared error + bytes of the bundle / bytes of the originals",
            "38 adapters in 8 clusters of rank 5: squared error mean",
            "served by no cluster: 2\n  loner0: alone in its cluster\n  loner1: alone in its cluster\n",
            f"go on with: lorazip compress DIR -o BUNDLE --rank 5 --clusters {file}",
        ):
            assert text in captured.err
        assert file.read_bytes() == adapters.with_name("adapters-auto.json").read_bytes()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--clusters", "0"), "'0' is neither auto nor a number of 1 or more"),
            (("--clusters", "two"), "'two' is neither auto nor a number of 1 or more"),
            (("--clusters", "99"), "--clusters 99: must be between 1 and the number of adapters, 38"),
            (("--rank", "0"), "--rank"),
            (("--device", "tpu"), "'tpu' is none of auto, cpu, cuda, cuda:N"),
            (("--report", "OUT"), "-o and --report both name"),
        ],
    )
    def test_options_that_make_no_sense_exit_with_2(
        self,
        adapters: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        options: tuple[str, ...],
        words: str,
    ) -> None:
        file = tmp_path / "c.json"
        given = [str(file) if option == "OUT" else option for option in options]
        assert main(["cluster", str(adapters), "-o", str(file), *given]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
        assert not file.exists()

    def test_a_file_that_exists_is_kept_unless_forced(self, adapters: Path, tmp_path: Path) -> None:
        file = tmp_path / "c.json"
        file.write_text("mine")
        argv = ["cluster", str(adapters), "-o", str(file), "--clusters", "2", "--rank", "5", "-q"]
        assert main(argv) == 6
        assert file.read_text() == "mine"
        assert main([*argv, "--force"]) == 0
        assert json.loads(file.read_text())["schema"] == "lorazip.clusters/1"

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "new.json"])
    def test_no_file_goes_into_the_folder_of_an_adapter(self, tmp_path: Path, name: str) -> None:
        root = ra.write_collection(tmp_path / "in", ra.plain(2))
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert main(["cluster", str(root), "-o", str(root / "t00" / name), "--force", "-q"]) == 2
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before

    def test_a_name_cannot_forge_a_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = ra.write_collection(tmp_path / "in", ra.plain(2))
        (root / "t00").rename(root / "x\nlorazip: error: forged")
        assert main(["cluster", str(root), "-o", str(tmp_path / "c.json"), "--clusters", "2"]) == 0
        argv = ["compress", str(root), "-o", str(tmp_path / "b"), "--rank", "1", "--max-error", "0.0001"]
        assert main(argv) == 0
        assert not [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorazip: error")]

    def test_bad_adapters_are_named_or_skipped(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = ra.write_collection(tmp_path / "in", ra.plain(3))
        (root / "t01" / "adapter_model.safetensors").write_bytes(b"cut")
        file = tmp_path / "c.json"
        assert main(["cluster", str(root), "-o", str(file), "-q"]) == 3
        said = capsys.readouterr().err
        assert "adapter 't01'" in said
        assert "1 adapter cannot be used (--skip-bad goes on without)" in said
        assert not file.exists()
        assert main(["cluster", str(root), "-o", str(file), "--skip-bad", "--json", "-q"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [skipped["name"] for skipped in report["skipped"]] == ["t01"]
        assert set(json.loads(file.read_text())["assignment"]) == {"t00", "t02"}

    def test_the_page_is_written_beside_the_file(self, adapters: Path, tmp_path: Path) -> None:
        file, page = tmp_path / "c.json", tmp_path / "c.html"
        argv = ["cluster", str(adapters), "-o", str(file), "--clusters", "2", "--rank", "5", "-q"]
        assert main([*argv, "--report", str(page)]) == 0
        text = page.read_text()
        assert text.lower().startswith("<!doctype html>")
        assert "38 adapters in 2 clusters" in text


@pytest.mark.parametrize("clusters", [2, pytest.param("auto", marks=pytest.mark.slow)])
def test_progress_arrives_where_it_said_it_would(adapters: Path, clusters: Any) -> None:
    progress = Recorder()
    cluster(adapters, Path("unused.json"), ClusterOptions(clusters=clusters, rank=RANK), progress=progress)
    assert {"reading adapters", "clustering, round 1", "looking for near-duplicates"} <= set(progress.stages)
    assert ("trying numbers of clusters" in progress.stages) == (clusters == "auto")
    assert all(done == total for total, done in progress.stages.values())


def test_weights_per_module_still_report_squared_errors(adapters: Path) -> None:
    found = clusters_of(adapters, "6", "--weights", "module")
    assert partition(found["assignment"], LONERS) == GROUPS
    assert max(adapter["squared_error"] for adapter in found["adapters"]) <= 1


def test_the_sample_through_the_library() -> None:
    result = cluster(sample_path(), Path("unused.json"), ClusterOptions(clusters=2))
    assert result.similarity.shape == (16, 16)
    assert result.report.clusters == result.assignment.clusters
    assert sum(figures.adapters for figures in result.report.clusters) == 16
    assert not Path("unused.json").exists()
