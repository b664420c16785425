"""The competitors of `frontier.py` on tiny collections: bytes by hand, exact errors, and Shannon's bound below."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from testing.random_adapters import LINEAR, MIXED, plain, write_collection

sys.path.insert(0, str(Path(__file__).parent))

import competitors
import frontier
import loglog
import spectra
from competitors import Point
from rounding import Level

from lorazip_core.adapter.collection import open_collection
from lorazip_core.maths.factored import squared_distance

SIDES = sum(module.d_out + module.d_in for module in LINEAR)  # 24 + 20, 10 + 20, 20 + 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("real"), plain(6, groups=2), seed=3)


@pytest.fixture(scope="module")
def measured(folder: Path) -> competitors.Measured:
    return competitors.measure(open_collection(folder))


def point(measured: competitors.Measured, competitor: str, setting: str) -> Point:
    return next(each for each in measured.points if (each.competitor, each.setting) == (competitor, setting))


def test_bytes_are_those_by_hand(measured: competitors.Measured) -> None:
    def own(competitor: str, setting: str) -> int:
        return point(measured, competitor, setting).bytes - measured.fixed

    assert measured.stored == 6 * 4 * SIDES * 2
    assert own("SVD, bf16", "rank 3") == 6 * 3 * SIDES * 2
    # All sides are shorter than a group of 32, so each has one scale of 16 bits.
    assert own("SVD, int4", "rank 2") == 6 * 2 * (SIDES * 4 + 6 * 16) // 8
    assert own("SVD, int4 by absmax", "rank 2") == own("SVD, int4", "rank 2")
    # Flattened: 4 · 24, 4 · 20, 4 · 10, 4 · 20, 4 · 20, 4 · 30 numbers in 3, 3, 2, 3, 3, 4 groups.
    assert own("B and A, groups of 32", "3 bits") == 6 * (4 * SIDES * 3 + 18 * 16) // 8
    # Two directions of each side, and two loadings for each of the 6 · 4 rows of A and columns of B.
    assert own("shared PCA (lorashare)", "k = 2") == 2 * (2 * SIDES + 3 * 2 * 24 * 2)
    # A mean and one direction of all factors, and a loading for each factor of an adapter.
    assert own("shared tasks (vlora)", "k = 1") == 2 * (2 * 4 * SIDES + 3 * 2 * 6)
    # At most all four components in 3 bits; at least one of them, and one bit for the others. Both say how many, in 3.
    low, high = (6 * (SIDES * bits + 6 * 16 * 4 + 3 * 3) / 8 for bits in (3 + 3 * 1, 4 * 3))
    assert low <= own("LoRAQuant", "3 bits @ 0.9") <= high


def test_what_all_keep_is_counted_once(tmp_path: Path) -> None:
    few, many = (
        spectra.besides(open_collection(write_collection(tmp_path / str(count), plain(count), seed=1)))
        for count in (1, 8)
    )
    assert few < many < few + 8 * len("a00000")
    collection = open_collection(write_collection(tmp_path / "mixed", MIXED, seed=1))
    tensors = 6 * 4 + 2 * 8  # three adapters with such a tensor, two of them with the same one
    assert tensors < spectra.besides(collection) < tensors + 1500


@pytest.mark.parametrize("competitor", ["SVD, bf16", "SVD, int4", "Delta-CoMe", "PrinMix", "B and A, groups of 32"])
def test_more_bytes_lose_less(measured: competitors.Measured, competitor: str) -> None:
    points = sorted((x for x in measured.points if x.competitor == competitor), key=lambda x: x.bytes)
    assert len(points) > 2
    errors = [x.mean for x in points]
    assert errors == sorted(errors, reverse=True)
    assert all(0 <= x.mean <= x.worst for x in points)


def test_shannon_is_below_all_that_code_each_adapter(measured: competitors.Measured) -> None:
    shared = {"shared PCA (lorashare)", "shared tasks (vlora)"}
    each_alone = [x for x in measured.points if x.competitor not in shared]
    assert {x.competitor for x in each_alone} > {"LoRAQuant", "PEFT, by energy", "Delta-CoMe by min-max"}
    for x in each_alone:
        assert measured.spectra.bound_of_the_mean(8 * (x.bytes - measured.fixed)) <= x.mean + 1e-5, x


def test_the_bound_is_that_of_one_gaussian() -> None:
    """One component with sides of equal length d: 1 − (1−δ)² at d log₂ 1/δ bits, once it pays to send it at all."""
    found = spectra.Spectra(1)
    b, a = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)), torch.randn(1, 64)
    stack = spectra.Stack(b[None], a[None], torch.tensor([0]), torch.tensor([1]))
    found.add(stack, stack.components()[0])
    for bits in (3, 4, 6):  # a number
        delta = 2.0 ** (-2 * bits)
        assert float(found.bound(16 / bits)) == pytest.approx(1 - (1 - delta) ** 2, rel=1e-6)
        assert found.bound_of_the_mean(128 * bits) == pytest.approx(1 - (1 - delta) ** 2, rel=1e-6)
    assert float(found.bound(1e9)) == pytest.approx(1, abs=1e-6)


def test_errors_by_grams_are_those_of_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(3, 40, 4, generator=generator), torch.randn(3, 4, 30, generator=generator)
    stack = spectra.Stack(b, a, torch.arange(3), torch.tensor([4, 4, 4]))
    _, u, v = stack.components()
    levels = (Level(2, 16), Level(4, 32), Level(16, rule="bf16"))
    choices = torch.tensor([[2, 1, 0, -1], [0, 0, 0, 0], [-1, 2, -1, 1]])
    found = competitors.Rounded(levels, u, v).lost(choices[None])[0]
    for row in range(3):
        kept = [(k, levels[level]) for k, level in enumerate(choices[row].tolist()) if level >= 0]
        near = [torch.stack([level.rounded(x[row, k]) for k, level in kept]) for x in (u, v)]
        expected = squared_distance((b[row], a[row]), (near[0].mT, near[1]))
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(("bits", "at_most"), [(1, 0.37), (2, 0.125), (3, 0.036), (4, 0.012), (8, 1e-4)])
def test_rounding_is_as_good_as_gaussians_allow(bits: int, at_most: float) -> None:
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 1e-12):
        error = (Level(bits, 128).rounded(scale * x) - scale * x).square().sum() / (scale * x).square().sum()
        assert 2.0 ** (-2 * bits) < float(error) < at_most
    others = [Level(bits, 128, rule).rounded(x) for rule in ("absmax", "minmax") if bits in (3, 4)]  # type: ignore[arg-type]
    assert all(
        (other - x).square().mean() >= 0.9 * (Level(bits, 128).rounded(x) - x).square().mean() for other in others
    )
    assert Level(bits, 128).size(1000) == bits * 1000 + 8 * 16
    assert not Level(bits, 128).rounded(torch.zeros(2, 5)).any()


def test_adapters_of_all_kinds(tmp_path: Path) -> None:
    found = competitors.measure(open_collection(write_collection(tmp_path, MIXED, seed=1)))
    exact = [x for x in found.points if x.setting == "rank 6" and x.competitor == "SVD, bf16"]
    assert [x.bytes - found.fixed for x in exact] == [found.stored]
    assert exact[0].worst < 1e-4
    assert all(x.mean == x.mean for x in found.points)


def test_errors_between_settings() -> None:
    points = [Point("x", "", 100, 0.4, 0.5), Point("x", "", 400, 0.1, 0.2), Point("x", "", 300, 0.6, 0.7)]
    assert [x.bytes for x in frontier.best(points)] == [100, 400]
    assert frontier.error_at(points, 99) is None
    assert frontier.error_at(points, 100) == 0.4
    assert frontier.error_at(points, 200) == pytest.approx(0.2)
    assert frontier.error_at(points, 1000) == 0.1
    points.append(Point("y", "", 150, 0.3, 0.9))
    found = frontier.Found("z", [], 1000, 0, points, [], [])
    assert frontier.strongest(found, 150) == ("x", pytest.approx(0.4 * 1.5**-1))
    assert frontier.strongest(found, 50) is None


def frontier_of(*points: Point) -> frontier.Found:
    """Ours loses 0.1 in 50 of 1,000 bytes, and 0.025 in 200; on lines of logarithms that is 0.05 in 100."""
    ours = [Point("lorazip coded", "", size, error, error) for size, error in ((50, 0.1), (200, 0.025))]
    return frontier.Found("z", ["a"] * 4, 1000, 0, list(points), [(50, 0.08), (200, 0.02)], [], ours)


def test_ours_is_compared_at_the_bytes_of_a_setting() -> None:
    """Not at those of the size of a column, and only where sizes are within the columns."""
    few, many = Point("x", "few", 100, 0.2, 0.2), Point("x", "many", 500, 0.001, 0.001)
    found = frontier_of(few, many)
    assert frontier.nearest(found, [few, many]) == (pytest.approx(0.25), 10, "few")
    assert frontier.nearest(found, [few, Point("x", "worse", 150, 0.05, 0.05)]) == (
        pytest.approx(0.05 * (1.5**-1) / 0.05),
        pytest.approx(1000 / 150),
        "worse",
    )
    assert frontier.nearest(found, [many, Point("x", "least", 10, 0.9, 0.9)]) is None
    assert frontier.nearest(found, [Point("x", "fewer than ours", 40, 0.9, 0.9)]) is None


def test_verdicts_say_what_is_missed_and_what_is_not_there() -> None:
    one = frontier_of(
        Point("x", "s", 100, 0.05 / 0.7, 1), Point("SVD, int4", "s", 100, 0.05 / 0.6, 1), Point("y", "s", 1, 0.9, 1)
    )
    other = frontier_of(Point("joint, 4 bits", "s", 100, 0.04, 1))
    rows = {line.split(" | ")[0].strip("| "): line for line in frontier.verdicts([one, other])}
    assert "0.70 at 10× (s) **missed** | not measured" in rows["x"]
    assert "| 0.65 | 0.60 at 10× (s) | not measured" in rows["SVD, int4"]
    assert "no setting: 1000.0× to 1000.0×" in rows["y"]
    assert "| 1 | not measured | 1.25 at 10× (s) **missed**" in rows["joint, 4 bits"]


def test_the_summary_has_the_best_of_every_family() -> None:
    found = frontier_of(
        Point("x", "", 90, 0.3, 1),
        Point("y", "", 90, 0.2, 1),
        Point("SVD, int4 by absmax", "", 90, 0.25, 1),
        Point("diag, 8 bits", "", 50, 0.125, 1),
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in frontier.summary(found)]
    at = {row[0]: row[1:] for row in rows}
    coded = ["diag, 8 bits", "0.1250"]
    assert at["10×"] == ["0.0500", "y", "0.2000", "0.25", "0.20", "0.2500", "0.20", *coded, "0.40", "1.25"]
    assert at["20×"] == ["0.1000", "none", "–", "–", "–", "–", "–", *coded, "0.80", "1.25"]
    assert at["40×"] == ["–", "none", "–", "–", "–", "–", "–", "none", "–", "–", "–"]


def test_more_clusters_than_adapters_are_said_not_to_be_had(folder: Path) -> None:
    options = argparse.Namespace(reuse=None, jd=["--method joint --clusters 7"], ours=[])
    found = frontier.survey(folder, "z", options)
    assert found.left_out == ["joint clusters 7: 7 clusters of 6 adapters"]
    assert any("cannot be had: joint clusters 7" in line for line in frontier.details(found))


def test_a_line_is_drawn_and_cut_off() -> None:
    lines = [loglog.Line("a & b", [(1, 0.5), (100, 0.1)], strong=True), loglog.Line("bound", [(2, 0.0)], bound=True)]
    root = ElementTree.fromstring(loglog.svg([loglog.Panel("<p>", lines)] * 3, "x", "y", (2, 200), 0.001))
    places = [each.get("transform") for each in root.iter("{http://www.w3.org/2000/svg}g") if each.get("transform")]
    assert places == ["translate(0,0)", "translate(560,0)", "translate(0,460)"]
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("<p>") == 3
    assert texts.count("a & b") == 1
    assert {"2", "50", "200", "0.001", "1"} <= set(texts)


@pytest.mark.slow
def test_the_script(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("a.json", "b.json", "a.svg")]
    words = [str(folder), "--first", "4", "--jd", "--method diag --rank 2", "--json", str(files[0])]
    assert frontier.main([*words, "--ours", "--method svd --rank 2", "--svg", str(files[2])]) == 0
    out = capsys.readouterr().out
    assert "| JD-Diag | diag rank 2 |" in out
    (found,) = json.loads(files[0].read_text())["collections"]
    assert len(found["adapters"]) == 4
    ours, bf16 = found["ours"][0], next(x for x in found["points"] if x["setting"] == "rank 2")
    assert ours["mean"] == pytest.approx(bf16["mean"], rel=1e-3)
    assert ours["bytes"] > bf16["bytes"]
    assert found["bound_of_ours"][0] < ours["mean"]
    assert "JD-Diag" in files[2].read_text()
    assert "diag, coded bases and cores" in files[2].read_text()
    again = [str(folder), "--first", "4", "--ours", "", "--reuse", str(files[0]), "--json", str(files[1])]
    assert frontier.main(again) == 0
    assert json.loads(files[1].read_text())["collections"][0]["points"] == found["points"]
    capsys.readouterr()
    assert frontier.main(["--show", str(files[0])]) == 0
    assert capsys.readouterr().out == out
    with pytest.raises(SystemExit, match="no collection"):
        frontier.main([str(folder), "--reuse", str(files[0])])
    with pytest.raises(SystemExit):
        frontier.main([str(folder), "--show", str(files[0])])
