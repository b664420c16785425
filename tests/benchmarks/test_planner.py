"""What `planner.py` draws, and what it says of predictions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from testing.random_adapters import plain, write_collection

sys.path.insert(0, str(Path(__file__).parent))

import planner
from planner import Outcome, Row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("real"), plain(6, groups=2), seed=3)


def row(bound: planner.Bound, value: float, found: Outcome) -> Row:
    return Row("z", 4, bound, value, Outcome(100, 0.1, 0.2), found, 1, 1.0, 8.0)


def test_bounds_are_of_all_kinds_and_the_same_again(folder: Path) -> None:
    drawn = planner.draw(folder, 8, 1)
    assert [bound for bound, _ in drawn] == [*planner.BOUNDS] * 2
    assert drawn == planner.draw(folder, 8, 1)
    assert drawn != planner.draw(folder, 8, 2)
    stored = 6 * 4 * 2 * 124  # adapters, ranks, bytes, sides
    for bound, value in drawn:
        if bound.startswith("budget"):
            smaller = stored / (value * (6 if bound == "budget_per_adapter" else 1))
            assert 0.99 * planner.SMALLER[0] < smaller < 1.02 * planner.SMALLER[1]
        else:
            assert 0 < value < 1


def test_what_is_used_is_a_share_of_the_bound() -> None:
    found = Outcome(120, 0.09, 0.25)
    assert row("budget", 160, found).used == 0.75
    assert row("budget_per_adapter", 40, found).used == 0.75
    assert row("max_mean_error", 0.1, found).used == pytest.approx(0.9)
    assert row("max_error", 0.2, found).used == pytest.approx(1.25)
    assert row("budget", 160, found).deviations == pytest.approx((0.2, -0.1, 0.25))


def test_the_summary_counts_what_is_near_and_what_is_not_held() -> None:
    rows = [row("budget", 110, Outcome(104, 0.1, 0.2)), row("max_error", 0.2, Outcome(90, 0.1, 0.21))]
    lines = list(planner.summary(rows))
    assert lines[0] == "bytes: at most 10.0% off, 1 of 2 within 5%"
    assert lines[1] == "mean: at most 0.0% off, 2 of 2 within 5%"
    assert lines[3] == "planning: 12% to 12% of a run"
    assert lines[4] == "1 of 2 bounds are not held"


def test_the_script_holds_plans_against_bundles(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [("budget", 12_000.0), ("max_error", 0.2)]
    monkeypatch.setattr(planner, "draw", lambda *_: [(bound, int(v) if bound == "budget" else v) for bound, v in drawn])
    assert planner.main([str(folder), "--json", str(tmp_path / "rows.json")]) == 0
    assert "all 2 bounds are held" in capsys.readouterr().out
    budget, error = json.loads((tmp_path / "rows.json").read_text())
    assert budget["found"]["bytes"] <= 12_000
    assert budget["predicted"]["bytes"] == pytest.approx(budget["found"]["bytes"], rel=0.2)
    assert budget["planning"] > 0
    assert error["planning"] == 0
    assert 0.1 < error["found"]["worst"] <= 0.2
