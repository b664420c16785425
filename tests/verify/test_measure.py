"""The errors of a bundle, measured: the same wherever the originals go, and without those that cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from testing import random_adapters as ra
from testing.random_bundle import SKETCHES, make_bundle

from lorazip_cli.main import main
from lorazip_core.adapter.collection import open_collection
from lorazip_core.adapter.module import Module
from lorazip_core.adapter.reader import Adapter
from lorazip_core.base.digests import sha256_file
from lorazip_core.base.errors import AdapterError
from lorazip_core.bundle.decoder import decode
from lorazip_core.bundle.losses import Losses
from lorazip_core.bundle.reader import Bundle
from lorazip_core.maths.factored import Factors
from lorazip_core.reading import blocks, buffers, contents
from lorazip_core.reading.placement import HOST, Placement
from lorazip_core.verify import measure as measuring
from lorazip_core.verify.measure import Original, Pair, measure
from lorazip_core.verify.run import verify

# Blocks of one adapter, of some and of all of a layout. The last two are meant for a GPU, here in ordinary memory.
PLACEMENTS = {
    "host": HOST,
    "host, in blocks": Placement("host", 2**26),
    "streamed": Placement("streamed", 2**30),
    "streamed one by one": Placement("streamed", 1),
}
NAMES = [sketch.name for sketch in SKETCHES]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("sound"))


def pairs_of(bundle: Bundle) -> list[Pair]:
    adapters = open_collection(bundle.path.parent / "originals", allow_mixed_base=True).adapters
    by_name = {adapter.name: adapter for adapter in adapters}
    return [Pair(entry, by_name[entry.name]) for entry in bundle.manifest.adapters]


def measured(bundle: Bundle, pairs: list[Pair], placement: Placement = HOST) -> dict[str, Losses | str]:
    """By name the errors, or why there are none."""
    told: list[int] = []
    seen = measure(bundle, pairs, told.append, measurable=set(NAMES), placement=placement)
    assert told == [1] * len(pairs)
    found: dict[str, Losses | str] = {}
    for name, each in seen.items():
        if isinstance(each, Original):
            assert each.measured is not None
            found[name] = each.measured
        else:
            found[name] = each.reason
    return found


def same(errors: Losses | str, others: Losses | str) -> bool:
    assert isinstance(errors, Losses)
    assert isinstance(others, Losses)
    norms = errors.norms == pytest.approx(others.norms, rel=1e-12)
    return bool(norms and errors.distances == pytest.approx(others.distances, rel=1e-9, abs=1e-20))


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("most", [1, 2**22])
def test_neither_batches_nor_order_show_in_the_errors(
    sound: Path, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(sound)
    pairs = pairs_of(bundle)
    usual = measured(bundle, pairs)
    monkeypatch.setattr(measuring, "_BATCH_ELEMENTS", {"cpu": most})
    found = measured(bundle, pairs[::-1], PLACEMENTS[kind])
    assert found.keys() == usual.keys() == set(NAMES)
    for pair in pairs:
        errors = found[pair.entry.name]
        assert isinstance(errors, Losses)
        assert errors.norms.keys() == pair.original.parts.keys()
        assert same(errors, usual[pair.entry.name])


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_every_file_is_read_once(sound: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(sound)
    read: Counter[str] = Counter()
    usual = contents.read_contents

    def counted(adapter: Adapter, destination: contents.Destination) -> object:
        read[adapter.name] += 1
        return usual(adapter, destination)

    monkeypatch.setattr(blocks, "read_contents", counted)
    monkeypatch.setattr(Adapter, "tensor", lambda *_: pytest.fail("a tensor is read on its own"))
    seen = measure(bundle, pairs_of(bundle), lambda _: None, measurable=set(NAMES), placement=PLACEMENTS[kind])
    assert read == dict.fromkeys(NAMES, 1)
    for name, each in seen.items():
        assert isinstance(each, Original)
        folder = sound.parent / "originals" / name
        assert {file.path: file.sha256 for file in each.files} == {
            path.name: sha256_file(path) for path in folder.glob("adapter_*")
        }


def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_HOST_BYTES", 64)
    monkeypatch.setattr(blocks, "PIECE", 64)
    monkeypatch.setattr(buffers.InMemory, "piece", 64)


def test_an_original_too_large_for_the_buffers(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its digest comes from pieces, and its tensors are read once more, no more than a batch at a time."""
    bundle, originals = Bundle(sound), sound.parent / "originals"
    usual = measured(bundle, pairs_of(bundle))
    small_buffers(monkeypatch)
    found = measured(bundle, pairs_of(bundle))
    assert all(same(found[name], usual[name]) for name in NAMES)
    assert verify(sound, against=originals).findings == []
    monkeypatch.setattr(measuring, "_BATCH_ELEMENTS", {"cpu": 1})
    stacked: list[int] = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors, *rest: stacked.append(len(tensors)) or stack(tensors, *rest))
    measured(bundle, pairs_of(bundle))
    assert set(stacked) <= {1, 2}  # a module at a time, and norms beside distances


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of adapters of two layouts that take turns, so that rows of their cores do not follow each other."""
    root = tmp_path_factory.mktemp("twins")
    twin = Module("layers.9.q_proj", "linear", ra.Q.d_out, ra.Q.d_in)
    generator = torch.Generator().manual_seed(0)
    for number in range(7):
        rank = 4 if number % 2 else 3
        factors = {
            module: (
                torch.randn(module.d_out, r, generator=generator),
                torch.randn(r, module.d_in, generator=generator),
            )
            for module, r in ((ra.Q, rank), (twin, 2), (ra.V, rank))  # two of one shape, and of two ranks
        }
        ra.write_factors(root / "originals" / f"a{number}", factors, scale=1 + number)
    options = ["--rank", "5", "--dtype", "f32", "-q"]
    assert main(["compress", str(root / "originals"), "-o", str(root / "bundle"), *options]) == 0
    return root / "bundle"


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_errors_are_those_of_dense_updates(twins: Path, kind: str) -> None:
    bundle = Bundle(twins)
    names = {entry.name for entry in bundle.manifest.adapters}
    seen = measure(bundle, pairs_of(bundle), lambda _: None, measurable=names, placement=PLACEMENTS[kind])
    for entry in bundle.manifest.adapters:
        truth = ra.dense_updates(twins.parent / "originals" / entry.name)
        original = seen[entry.name]
        assert isinstance(original, Original)
        assert original.measured is not None
        assert list(original.measured.norms) == sorted(truth)
        modules = {module.name: module for module in bundle.modules(entry)}
        for module, update in truth.items():
            b, a = decode(bundle, entry, modules[module], torch.float64)
            lost = float(np.square(update - (b @ a).numpy()).sum())
            assert original.measured.distances[module] == pytest.approx(lost, rel=1e-9)
            assert original.measured.norms[module] == pytest.approx(float(np.square(update).sum()), rel=1e-9)


@pytest.mark.parametrize("most", [1, 600, 20_000])
def test_a_batch_has_no_more_numbers_than_it_may(twins: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    compared = measuring.squared_norm_and_distance

    def noted(x: Factors, y: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        updates, modules = x[0].shape[:2]
        sizes.append((updates * modules, sum(side.numel() for side in (*x, y[0]))))
        return compared(x, y)

    monkeypatch.setattr(measuring, "_BATCH_ELEMENTS", {"cpu": most})
    monkeypatch.setattr(measuring, "squared_norm_and_distance", noted)
    bundle = Bundle(twins)
    names = {entry.name for entry in bundle.manifest.adapters}
    measure(bundle, pairs_of(bundle), lambda _: None, measurable=names, placement=PLACEMENTS["streamed"])
    assert all(updates == 1 or numbers <= most for updates, numbers in sizes)
    assert (max(updates for updates, _ in sizes) > 1) == (most == 20_000)


def test_only_what_is_wanted_is_measured(sound: Path) -> None:
    bundle = Bundle(sound)
    seen = measure(bundle, pairs_of(bundle), lambda _: None, measurable={NAMES[0]})
    has = {name: isinstance(each, Original) and each.measured is not None for name, each in seen.items()}
    assert has == {name: name == NAMES[0] for name in NAMES}


@pytest.mark.parametrize("kind", PLACEMENTS)
def test_no_originals_at_all(sound: Path, kind: str) -> None:
    assert measured(Bundle(sound), [], PLACEMENTS[kind]) == {}


@pytest.mark.parametrize("kind", PLACEMENTS)
@pytest.mark.parametrize("name", NAMES)
def test_an_original_cut_short_on_the_way_leaves_the_others(tmp_path: Path, name: str, kind: str) -> None:
    bundle = Bundle(make_bundle(tmp_path))
    pairs = pairs_of(bundle)
    usual = measured(bundle, pairs)
    (weights,) = next(pair.original.weights for pair in pairs if pair.entry.name == name)
    assert weights.header is not None
    os.truncate(weights.path, weights.header.size + 8)
    found = measured(bundle, pairs, PLACEMENTS[kind])
    reason = found.pop(name)
    assert isinstance(reason, str)
    assert "is truncated" in reason
    assert all(same(errors, usual[other]) for other, errors in found.items())


def test_an_original_cut_short_between_two_reads_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(make_bundle(tmp_path))
    pairs = pairs_of(bundle)
    small_buffers(monkeypatch)
    bad = pairs[0].original

    def each_stored(adapter: Adapter, modules: Iterable[str]) -> object:
        if adapter is bad:
            raise AdapterError(adapter.name, "it is truncated")
        return usual(adapter, modules)

    usual = Adapter.each_stored
    monkeypatch.setattr(Adapter, "each_stored", each_stored)
    found = measured(bundle, pairs)
    assert {name for name, errors in found.items() if isinstance(errors, str)} == {bad.name}
