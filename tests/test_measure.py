"""The errors of a bundle, measured: in any batches the same, and without what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from random_bundle import SKETCHES, make_bundle

from lorazip_core import measure as measuring
from lorazip_core.adapter import open_collection
from lorazip_core.bundle import Bundle
from lorazip_core.measure import Measured, Pair, measure


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sound"))


def pairs_of(bundle: Bundle, originals: Path) -> list[Pair]:
    adapters = {adapter.name: adapter for adapter in open_collection(originals, allow_mixed_base=True).adapters}
    return [Pair(entry, adapters[entry.name]) for entry in bundle.manifest.adapters]


def figures(measured: dict[str, Measured]) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    return {name: (errors.norms, errors.distances) for name, errors in measured.items()}


def test_every_module_of_every_pair_is_told(sound: Path) -> None:
    bundle = Bundle(sound)
    pairs = pairs_of(bundle, sound.parent / "originals")
    told: list[int] = []
    measured, broken = measure(bundle, pairs, told.append)
    assert not broken
    assert sum(told) == sum(len(pair.original.parts) for pair in pairs)
    for pair in pairs:
        assert measured[pair.entry.name].norms.keys() == pair.original.parts.keys()


def test_neither_the_batches_nor_the_order_show_in_the_errors(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(sound)
    pairs = pairs_of(bundle, sound.parent / "originals")
    together, _ = measure(bundle, pairs, lambda _: None)
    monkeypatch.setattr(measuring, "_BATCH_NUMBERS", {"cpu": 1})
    each, _ = measure(bundle, pairs[::-1], lambda _: None)
    assert each.keys() == together.keys()
    for name, (norms, distances) in figures(together).items():
        assert each[name].norms == pytest.approx(norms, rel=1e-12)
        assert each[name].distances == pytest.approx(distances, rel=1e-9, abs=1e-20)


@pytest.mark.parametrize("name", [sketch.name for sketch in SKETCHES])
def test_an_original_cut_short_on_the_way_leaves_the_others(tmp_path: Path, name: str) -> None:
    bundle = Bundle(make_bundle(tmp_path))
    pairs = pairs_of(bundle, tmp_path / "originals")
    whole, _ = measure(bundle, pairs, lambda _: None)
    (weights,) = next(pair.original.weights for pair in pairs if pair.entry.name == name)
    assert weights.header is not None
    os.truncate(weights.path, weights.header.size + 8)
    left, broken = measure(bundle, pairs, lambda _: None)
    assert [(error.adapter, "is truncated" in error.reason) for error in broken] == [(name, True)]
    assert left.keys() == whole.keys() - {name}
    for other, errors in left.items():
        assert errors.squared_error == pytest.approx(whole[other].squared_error, rel=1e-9, abs=1e-20)
